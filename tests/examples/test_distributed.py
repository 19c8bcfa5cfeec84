"""examples/distributed: what they print and when they fail. .ci/run runs each of them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch.distributed as dist

from neglog.examples.distributed import beside
from neglog.examples.distributed.beside import Part


def alike(steps: int, part: Part) -> Iterator[float]:
    for step in range(steps):
        yield 2.0 + step


def unlike(steps: int, part: Part) -> Iterator[float]:
    for step in range(steps):
        yield 2.0 + step + 0.01 * (part.group is None)


@pytest.fixture
def one_process(monkeypatch: Any, tmp_path: Any) -> Iterator[None]:
    """What torchrun would set, and a group of one; compare() ends it."""
    for name, value in {
        "RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    own = dist.init_process_group
    method = f"file://{tmp_path}/meet"
    monkeypatch.setattr(
        dist, "init_process_group", lambda kind: own(kind, init_method=method, rank=0, world_size=1)
    )
    monkeypatch.setattr(sys, "argv", ["name", "--steps", "3"])
    yield
    assert not dist.is_initialized()


def test_both_are_shown(one_process: None, capsys: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        beside.compare(alike, steps=12)
    assert ended.value.code == 0
    assert capsys.readouterr().out.count("4.000000") == 2


def test_losses_that_differ_are_a_failure(one_process: None, capsys: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        beside.compare(unlike, steps=12)
    assert ended.value.code == 1
    assert "the losses differ by more than" in capsys.readouterr().err


def test_without_torchrun(monkeypatch: Any) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(sys, "argv", ["clip_ring.py"])
    with pytest.raises(SystemExit, match="torchrun --nproc-per-node 2"):
        beside.compare(alike, steps=2)
