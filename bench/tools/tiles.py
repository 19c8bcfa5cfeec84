"""How large a tile should be on the GPU at hand: what neglog assumes, beside other sizes.

python bench/tools/tiles.py [--seconds N]

clip_loss by rows and columns of a tile of similarities, linear_cross_entropy by the workspace of
its logits, each forward and backward in bfloat16. A product of 768 columns is 192 blocks for 8192
rows, 1.45 waves of 132 multiprocessors: so sizes that make whole waves are among them.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch

import neglog
from neglog.bench import goals, report, terminal
from neglog.bench.budget import Budget
from neglog.bench.cases import load
from neglog.bench.clocks import Clock, CUDAClock
from neglog.bench.contender import Contender, Problem
from neglog.bench.measure import Plan, measure
from neglog.ops.pairs import schedule

DEVICE = "cuda"
SIDES = (4096, 5632, 8192, 11264, 16384)
SHAPES = [*((side, side) for side in SIDES), (16384, 4096), (4096, 16384)]
WORKSPACES = (256, 512, 1024, 2048)


@contextmanager
def tiles_of(height: int, width: int) -> Iterator[None]:
    before = schedule.CUDA_TILE_BYTES, schedule.CUDA_WIDTH
    schedule.CUDA_TILE_BYTES, schedule.CUDA_WIDTH = height * width * 2, width
    try:
        yield
    finally:
        schedule.CUDA_TILE_BYTES, schedule.CUDA_WIDTH = before


def measured(problem: Problem, name: str, loss: Callable, clock: Clock, budget: Budget) -> None:
    plan = Plan(15, strict=False, budget=budget, limit=75.0)
    contender = Contender(name, name, loss, 1, library="neglog")
    result = report.as_json(measure(problem, [contender], clock, plan))
    print(*terminal.plain(report.long_table("", [result])), sep="\n", flush=True)


def clip(clock: Clock, budget: Budget) -> None:
    problem = load("clip_loss").problem(goals.CLIP, "bfloat16", 0, DEVICE)
    loss = partial(neglog.clip_loss, options={"workspace_mb": 2 * max(SIDES) ** 2 / 2**20})
    for height, width in SHAPES:
        with tiles_of(height, width):  # the backward reads them too
            measured(problem, f"tiles of {height} x {width}", loss, clock, budget)


def linear(clock: Clock, budget: Budget) -> None:
    problem = load("linear_cross_entropy").problem(goals.LINEAR, "bfloat16", 0, DEVICE)
    for megabytes in WORKSPACES:
        loss = partial(neglog.linear_cross_entropy, options={"workspace_mb": megabytes})
        measured(problem, f"{megabytes} MB of logits", loss, clock, budget)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench/tools/tiles.py: nothing to time: torch finds no CUDA device", file=sys.stderr)
        return 2
    clock, budget = CUDAClock(), Budget(options.seconds)
    clip(clock, budget)
    linear(clock, budget)
    return 0


if __name__ == "__main__":
    sys.exit(main())
