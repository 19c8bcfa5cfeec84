"""How large a tile should be on the GPU at hand: what ops/pairs.py and tiling.py assume, tried.

python bench/tiles.py [--seconds N]

clip_loss by rows and columns of a tile of similarities, linear_cross_entropy by the workspace of
its logits, each forward and backward in bfloat16. A product of 768 columns is 192 blocks for 8192
rows, 1.45 waves of 132 multiprocessors: so sizes that make whole waves are among them.
"""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import goals
import torch
from measure import Clock, gradients, measured
from torch.nn import functional as F

import neglog
from neglog.ops import pairs as pairs_op

DEVICE = "cuda"
SIDES = (4096, 5632, 8192, 11264, 16384)
WORKSPACES = (256, 512, 1024, 2048)
FLOATS = 8 * goals.CLIP[0] ** 2 * goals.CLIP[1] / 1e12


@contextmanager
def tiles_of(height: int, width: int) -> Iterator[None]:
    before = pairs_op.CUDA_TILE_BYTES, pairs_op.CUDA_WIDTH
    pairs_op.CUDA_TILE_BYTES, pairs_op.CUDA_WIDTH = height * width * 2, width
    try:
        yield
    finally:
        pairs_op.CUDA_TILE_BYTES, pairs_op.CUDA_WIDTH = before


def clip(clock: Clock) -> None:
    torch.manual_seed(0)
    made = (torch.randn(goals.CLIP, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    image, text = (F.normalize(x, dim=1).requires_grad_() for x in made)
    scale = torch.tensor(100.0, device=DEVICE, requires_grad=True)
    memory = {"workspace_mb": 2 * max(SIDES) ** 2 / 2**20}
    way = gradients(
        lambda: neglog.clip_loss(image, text, scale, options=memory), image, text, scale
    )
    for height, width in [*((side, side) for side in SIDES), (16384, 4096), (4096, 16384)]:
        with tiles_of(height, width):
            ways = {f"tiles of {height} x {width}": way}
            list(measured(goals.clip_case(goals.CLIP), ways, FLOATS, "TFLOP/s", clock))


def linear(clock: Clock) -> None:
    torch.manual_seed(0)
    rows, features, vocab = goals.LINEAR
    x = torch.randn(rows, features, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    weight = (torch.randn(vocab, features, device=DEVICE) / features**0.5).bfloat16()
    weight.requires_grad_()
    target = torch.randint(vocab, (rows,), device=DEVICE)
    floats = 6 * rows * features * vocab / 1e12
    for megabytes in WORKSPACES:
        options = {"workspace_mb": megabytes}
        way = gradients(
            lambda options=options: neglog.linear_cross_entropy(x, weight, target, options=options),
            x, weight,
        )  # fmt: skip
        ways = {f"{megabytes} MB of logits": way}
        list(measured(goals.linear_case(goals.LINEAR, 1.0), ways, floats, "TFLOP/s", clock))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench/tiles.py: nothing to time: torch finds no CUDA device", file=sys.stderr)
        return 2
    clock = Clock(options.seconds)
    clip(clock)
    linear(clock)
    return 0


if __name__ == "__main__":
    sys.exit(main())
