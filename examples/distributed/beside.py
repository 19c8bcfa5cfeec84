"""One training, twice: over the processes that torchrun started, and by one of them alone with the
whole batch. Same seed, same data; do the losses agree?"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from time import perf_counter
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from neglog.bench import terminal

AGREE = 1e-4  # relative; each step adds rounding, which the optimizer carries on


class Part(NamedTuple):
    """What a process works on: rank of world. One process alone is 0 of 1, without a group."""

    rank: int
    world: int
    group: Any

    def rows(self, x: Tensor) -> Tensor:
        """Its rows of the whole batch: unlike numbers where they do not divide."""
        return x.tensor_split(self.world)[self.rank]


# (steps, part) to the loss of the whole batch at each step
Training = Callable[[int, Part], Iterator[float]]


def mean_of_all(loss: Tensor, part: Part) -> float:
    """The mean over processes, which is the loss of the whole batch."""
    value = loss.detach().double().clone()
    if part.group is not None:
        dist.all_reduce(value, group=part.group)
    return float(value) / part.world


def compare(training: Training, steps: int, quick_steps: int = 3) -> None:
    """Runs a training over all processes, then in one; prints both, exits with 1 if they differ."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help=f"{quick_steps} steps")
    parser.add_argument("--steps", type=int, default=steps, metavar="N", help=f"({steps})")
    options = parser.parse_args()
    steps = quick_steps if options.quick else options.steps
    if "RANK" not in os.environ:
        sys.exit(f"start it by torchrun: torchrun --nproc-per-node 2 {sys.argv[0]}")
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(max(1, torch.get_num_threads() // world))
    many = _timed(training, steps, Part(rank, world, dist.group.WORLD))
    failed = 0
    if rank == 0:
        failed = _show(many, _timed(training, steps, Part(0, 1, None)), world)
    dist.barrier()
    dist.destroy_process_group()
    sys.exit(failed)


def _timed(training: Training, steps: int, part: Part) -> list[tuple[float, float]]:
    """Loss and seconds of each step."""
    torch.manual_seed(0)
    found, last = [], perf_counter()
    for loss in training(steps, part):
        now = perf_counter()
        found.append((loss, now - last))
        last = now
    return found


def _show(many: list[tuple[float, float]], one: list[tuple[float, float]], world: int) -> int:
    rows, worst = [], 0.0
    for step, ((loss, took), (alone, took_alone)) in enumerate(zip(many, one, strict=True), 1):
        difference = abs(loss - alone) / abs(alone)
        worst = max(worst, difference)
        times = (f"{took * 1e3:.0f}", f"{took_alone * 1e3:.0f}")
        rows.append((str(step), f"{loss:.6f}", f"{alone:.6f}", f"{difference:.0e}", *times))
    columns = ("step", f"{world} processes", "one", "difference", "ms", "ms, one")
    screen = terminal.console()
    terminal.show(screen, terminal.Table("Loss of the whole batch", columns, rows, {}))
    if not rows or not worst <= AGREE:
        print(f"the losses differ by more than {AGREE}", file=sys.stderr)
        return 1
    return 0
