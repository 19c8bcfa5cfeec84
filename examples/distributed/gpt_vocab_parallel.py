"""A small GPT whose head is shared out to the processes by its classes.

    torchrun --nproc-per-node 2 examples/distributed/gpt_vocab_parallel.py [--quick]

All processes have the same text and the same blocks; each has some rows of the head and the
optimizer state of these. No process makes a logit of another's class.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

import neglog
from neglog.distributed.vocab_rows import shard_of
from neglog.examples.distributed.beside import Part, compare
from neglog.examples.trainers.text import VOCAB, batches

WIDTH, LENGTH = 64, 64


class Blocks(nn.Module):
    """Token ids (B, T) to hidden states (B, T, WIDTH)."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCAB, WIDTH)
        self.position = nn.Embedding(LENGTH, WIDTH)
        layer = nn.TransformerEncoderLayer(
            WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(LENGTH))

    def forward(self, ids: Tensor) -> Tensor:
        hidden: Tensor = self.blocks(
            self.token(ids) + self.position.weight, mask=self.mask, is_causal=True
        )
        return hidden


def train(steps: int, part: Part) -> Iterator[float]:
    blocks = Blocks()
    whole = torch.randn(VOCAB, WIDTH) / WIDTH**0.5
    head = nn.Parameter(whole[shard_of(VOCAB, part.rank, part.world)].clone())
    optimizer = torch.optim.AdamW([*blocks.parameters(), head], lr=1e-3)
    for ids in batches(LENGTH, steps):
        hidden = blocks(ids)
        if part.group is None:
            loss = neglog.linear_cross_entropy(hidden, head, ids, shift=True)
        else:
            loss = neglog.vocab_parallel_linear_cross_entropy(  # the line
                hidden, head, ids, part.group, shift=True
            )
        optimizer.zero_grad()
        loss.backward()  # the hidden states' gradient is whole in each, and so is that of blocks
        optimizer.step()
        yield float(loss.detach())


if __name__ == "__main__":
    compare(train, steps=12)
