"""Where neglog's kernels overtake torch's function: the number behind neglog.dispatch.CROSSOVER.

python bench/crossover.py [--dtype float32] [--rounds 30]
"""

import argparse

import torch

import neglog
from neglog import dispatch
from neglog.benchmark.cases import Contender
from neglog.benchmark.cases.cross_entropy import problem
from neglog.benchmark.measure import measure_small

SHAPES = ((16, 256), (8, 1024), (64, 256), (16, 1024), (128, 256), (32, 1024), (8, 8192),
          (64, 1024), (16, 8192), (128, 1024), (4, 32768), (256, 1024), (8, 32768))  # fmt: skip


def _kernels(logits, target):
    return neglog.cross_entropy(logits, target, backend=dispatch.kernel_backend())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    contenders = [
        Contender("eager", "torch eager", torch.nn.functional.cross_entropy, 3),
        Contender("neglog", "neglog", _kernels, 3),
    ]
    print(f"{'rows':>6} {'vocab':>6} {'numbers':>8} {'torch us':>9} {'kernels us':>10}  ratio")
    for rows, vocab in sorted(SHAPES, key=lambda shape: shape[0] * shape[1]):
        made = problem({"rows": rows, "vocab": vocab}, options.dtype, 0)
        seconds = measure_small(made, contenders, options.rounds).seconds
        first, second = (sorted(times)[len(times) // 2] * 1e6 for times in seconds.values())
        ratio = first / second
        print(f"{rows:6} {vocab:6} {rows * vocab:8} {first:9.1f} {second:10.1f}  {ratio:.2f}")


if __name__ == "__main__":
    main()
