"""Teach a small model a rule by its reward alone: GRPO with neglog.linear_token_logprobs.

    python examples/policy_gradient.py [STEPS]

The reward of a token is 1 where it is the one before it plus 1, modulo NUMBERS. Each prompt is
continued several times, and a continuation's advantage is its reward beside those of the others.
The loss needs the log-probability and the entropy of each token that was drawn. They are taken from
the hidden states: the logits of a batch are never in memory.
"""

import sys

import torch
from torch import nn

import neglog

VOCAB, NUMBERS, WIDTH, LENGTH, PROMPTS, SAMPLES = 512, 8, 64, 16, 16, 8
TEMPERATURE, CLIP, ENTROPY_BONUS, UPDATES = 1.0, 0.2, 1e-3, 4


class Policy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.layers(self.token(ids))[0]
        return hidden

    def logprobs(self, ids: torch.Tensor) -> neglog.TokenLogprobs:
        """Of each token but the first, given those before it."""
        return neglog.linear_token_logprobs(
            self(ids), self.head.weight, ids, linear_bias=self.head.bias, shift=True,
            temperature=TEMPERATURE,
        )  # fmt: skip

    @torch.no_grad()
    def draw(self, prompt: torch.Tensor) -> torch.Tensor:
        ids = prompt
        for _ in range(LENGTH):
            logits = self.head(self(ids)[:, -1]) / TEMPERATURE
            ids = torch.cat([ids, torch.multinomial(logits.softmax(-1), 1)], 1)
        return ids


def main(steps: str = "40") -> None:
    torch.manual_seed(0)
    policy = Policy()
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-2)
    for step in range(int(steps)):
        ids = policy.draw(torch.randint(NUMBERS, (PROMPTS, 1)).repeat_interleave(SAMPLES, 0))
        reward = (ids[:, 1:] == (ids[:, :-1] + 1) % NUMBERS).float()
        of_group = reward.mean(1).view(PROMPTS, SAMPLES)
        advantage = (of_group - of_group.mean(1, keepdim=True)) / (
            of_group.std(1, keepdim=True) + 1e-4
        )
        advantage = advantage.view(-1, 1)
        with torch.no_grad():
            old = policy.logprobs(ids).logprob
        for _ in range(UPDATES):
            found = policy.logprobs(ids)
            ratio = torch.exp(found.logprob - old)
            clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
            gain = torch.minimum(ratio * advantage, clipped * advantage)
            loss = -(gain + ENTROPY_BONUS * found.entropy).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if step % 10 == 0 or step == int(steps) - 1:
            print(f"step {step:4}  reward {reward.mean():.3f}  entropy {found.entropy.mean():.2f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
