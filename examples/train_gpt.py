"""Train a small causal language model with neglog.cross_entropy, on a text file of your own.

    python examples/train_gpt.py [STEPS] [FILE]

Words that are not among the most frequent become ignore_index: they are read, never asked for.
"""

import re
import sys
from collections import Counter
from pathlib import Path

import torch
from torch import nn

import neglog

VOCAB, CONTEXT, WIDTH, BATCH, IGNORED = 4096, 64, 128, 16, -100


class CausalLM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCAB, WIDTH)
        self.position = nn.Embedding(CONTEXT, WIDTH)
        layer = nn.TransformerEncoderLayer(
            WIDTH,
            nhead=4,
            dim_feedforward=4 * WIDTH,
            dropout=0.0,
            batch_first=True,
            norm_first=True,
        )
        self.blocks = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, VOCAB)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(CONTEXT))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.token(ids) + self.position.weight
        return self.head(self.blocks(x, mask=self.mask, is_causal=True))


def read_words(name: str | None) -> torch.Tensor:
    if name is not None:
        text = Path(name).read_text(encoding="utf-8")
    else:
        from pydoc_data.topics import topics

        text = "\n".join(topics.values())
    words = re.findall(r"\w+|[^\w\s]", text)
    # Id 0 is every word that is too rare for an id of its own.
    ids = {word: rank for rank, (word, _) in enumerate(Counter(words).most_common(VOCAB - 1), 1)}
    return torch.tensor([ids.get(word, 0) for word in words])


def main(steps: str = "200", name: str | None = None) -> None:
    torch.manual_seed(0)
    words = read_words(name)
    model = CausalLM()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(int(steps)):
        start = torch.randint(len(words) - CONTEXT, (BATCH, 1))
        window = words[start + torch.arange(CONTEXT + 1)]
        target = window[:, 1:].masked_fill(window[:, 1:] == 0, IGNORED)
        logits = model(window[:, :-1])
        # The head's output is not read again, so its gradient may take its place in memory.
        loss = neglog.cross_entropy(
            logits.flatten(0, 1), target.flatten(), ignore_index=IGNORED, inplace_backward=True
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            print(f"step {step:4}  loss {loss.item():.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
