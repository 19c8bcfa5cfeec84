"""Queue.push over processes: every queue holds the keys of all, in one order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

import neglog
from tests.support import ranks

SIZE, DIM = 10, 3


def keys_of(rank: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows = (rank + step) % 3  # none, on some rank of each step
    generator = torch.Generator().manual_seed(10 * rank + step)
    return torch.randn(rows, DIM, generator=generator), torch.arange(rows) + 100 * rank + 10 * step


def holds_the_keys_of_all(rank: int, world: int) -> None:
    ours = neglog.nn.Queue(SIZE, DIM, with_ids=True)
    whole = neglog.nn.Queue(SIZE, DIM, with_ids=True)
    for step in range(5):
        ours.push(*keys_of(rank, step), group=dist.group.WORLD)
        parts = [keys_of(each, step) for each in range(world)]
        whole.push(*(torch.cat(x) for x in zip(*parts, strict=True)))
        assert torch.equal(ours.keys, whole.keys)
        assert torch.equal(ours.key_ids(), whole.key_ids())
        assert torch.equal(ours.position, whole.position)


def is_not_alike(rank: int, world: int) -> None:
    queue = neglog.nn.Queue(SIZE + rank, DIM)
    with pytest.raises(
        RuntimeError, match=r"group: expected one size in all processes, got 10, 11, 12"
    ):
        queue.push(torch.randn(2, DIM), group=dist.group.WORLD)
    queue = neglog.nn.Queue(SIZE, DIM)
    if rank == 1:
        queue.push(torch.randn(2, DIM))
    with pytest.raises(RuntimeError, match="group: expected one filled in all processes"):
        queue.push(torch.randn(2, DIM), group=dist.group.WORLD)
    with pytest.raises(TypeError, match="group: expected a ProcessGroup"):
        queue.push(torch.randn(2, DIM), group="all")


CHECKS: dict[str, Any] = {x.__name__: x for x in (holds_the_keys_of_all, is_not_alike)}


def test_processes(tmp_path: Any) -> None:
    said = ranks.run(CHECKS, 3, tmp_path)
    assert not any(map(any, said.values())), said
