"""A GPT small enough to read at once: pre-norm blocks, learned positions, tied head."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CONTEXT = 128


class Block(nn.Module):
    """Causal attention, then a multilayer perceptron, each beside a residual path."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(batch, time, width) in and out."""
        batch, time, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, time, 3, self.heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each (batch, heads, time, width / heads)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, time, width))
        return x + self.mlp(x)


class GPT(nn.Module):
    """Logits of the next token at each position."""

    def __init__(
        self, vocab: int, context: int = CONTEXT, width: int = 128, layers: int = 2, heads: int = 4
    ) -> None:
        super().__init__()
        self.context = context
        self.token = nn.Embedding(vocab, width)
        self.position = nn.Parameter(torch.zeros(context, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.apply(_initialise)

    def hidden(self, ids: Tensor) -> Tensor:
        """ids (batch, time) -> what the head multiplies, (batch, time, width)."""
        x = self.token(ids) + self.position[: ids.shape[1]]
        return self.norm(self.blocks(x))

    def forward(self, ids: Tensor) -> Tensor:
        """ids (batch, time) -> logits (batch, time, vocab)."""
        return F.linear(self.hidden(ids), self.token.weight)

    @torch.no_grad()
    def generate(
        self, ids: list[int], count: int, generator: torch.Generator, temperature: float = 0.7
    ) -> list[int]:
        """`count` more ids, sampled one by one."""
        for _ in range(count):
            logits = self(torch.tensor([ids[-self.context :]]))[0, -1]
            p = torch.softmax(logits / temperature, dim=-1)
            ids = [*ids, int(torch.multinomial(p, 1, generator=generator))]
        return ids


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
