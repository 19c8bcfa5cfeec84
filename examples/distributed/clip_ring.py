"""A CLIP-like model over processes: texts go round while they are multiplied.

    torchrun --nproc-per-node 2 examples/distributed/clip_ring.py [--quick]

Each process has its part of the batch, and DistributedDataParallel takes the mean of gradients. The
loss is that of all pairs of the whole batch, at the memory of one process's part.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import neglog
from neglog.examples.distributed.beside import Part, compare, mean_of_all
from neglog.examples.trainers.clip_loop import Model, batch


def train(steps: int, part: Part) -> Iterator[float]:
    model: Any = Model()
    if part.group is not None:
        model = DistributedDataParallel(model, process_group=part.group)
    optimizer = torch.optim.AdamW(nn.Module.parameters(model), lr=1e-3)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        images, captions = (part.rows(x) for x in batch(generator))
        image, text, scale = model(images, captions)
        loss = neglog.clip_loss(image, text, scale, group=part.group, exchange="ring")  # the line
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield mean_of_all(loss, part)


if __name__ == "__main__":
    compare(train, steps=8)
