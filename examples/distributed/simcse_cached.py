"""A sentence encoder on pairs, over processes, each of which sees its batch a few rows at a time.

    torchrun --nproc-per-node 2 examples/distributed/simcse_cached.py [--quick]

cached_step has the gradient of a batch that would not fit in memory, DistributedDataParallel its
mean over processes, and the loss each query against the keys of all: three sizes of batch, of which
none is the encoder's.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import neglog
from neglog.examples.distributed.beside import Part, compare, mean_of_all
from neglog.examples.trainers.text import VOCAB, tokens

BATCH, LENGTH, WIDTH, CHUNK = 512, 24, 64, 64


class Encoder(nn.Module):
    """Token ids (N, T) to embeddings (N, WIDTH)."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCAB, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, dropout=0.0, batch_first=True)
        self.blocks = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self, ids: Tensor) -> Tensor:
        embedded: Tensor = self.blocks(self.token(ids)).mean(1)
        return embedded


def pairs(steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Pieces of text, and the same with a fifth of the words left out."""
    text = tokens()
    generator = torch.Generator().manual_seed(2)
    for _ in range(steps):
        starts = torch.randint(len(text) - LENGTH, (BATCH, 1), generator=generator)
        ids = text[starts + torch.arange(LENGTH)]
        dropped = torch.rand(ids.shape, generator=generator) < 0.2
        yield ids, ids.masked_fill(dropped, 0)


def train(steps: int, part: Part) -> Iterator[float]:
    encoder: Any = Encoder()
    if part.group is not None:
        encoder = DistributedDataParallel(encoder, process_group=part.group)
    optimizer = torch.optim.AdamW(nn.Module.parameters(encoder), lr=1e-3)
    loss_of = partial(neglog.info_nce, temperature=0.05, group=part.group)
    for both in pairs(steps):
        optimizer.zero_grad()
        inputs = [part.rows(x) for x in both]
        loss = neglog.cached_step(encoder, inputs, loss_of, chunk_size=CHUNK)  # the line
        optimizer.step()
        yield mean_of_all(loss, part)


if __name__ == "__main__":
    compare(train, steps=8)
