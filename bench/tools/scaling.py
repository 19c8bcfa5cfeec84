"""Losses over processes: what each sends, holds and takes, beside what docs/scaling.md says.

    python bench/tools/scaling.py [--world 4] [--rows 8192] [--features 512] [--json FILE]
    python bench/tools/scaling.py --predict

Processes on this machine, a thread each, on gloo. Bytes: what the loopback device sent in a step,
by process. Memory: the peak of a step beyond inputs and gradients. Seconds: the median of the
steps. --predict prints what the same model says of GPUs, from the rates that stand below; none of
it is measured.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import neglog
from neglog.bench import terminal
from neglog.bench.machine import PeakMemory, processor
from neglog.distributed.blocks import RING_TILE_BYTES
from neglog.distributed.exchange import CUDA_PIECE_BYTES, PIECE_BYTES
from neglog.ops.pairs.schedule import CUDA_TILE_BYTES, TILE_BYTES

LOOPBACK = Path("/proc/net/dev")


# The model


class Shape(NamedTuple):
    """Of a process: rows, features, processes, bytes of a number, classes of all."""

    rows: int
    features: int
    world: int
    itemsize: int = 4
    vocab: int = 0
    cuda: bool = False

    @property
    def block(self) -> int:
        """Bytes of one process's keys."""
        return self.rows * self.features * self.itemsize

    @property
    def block_gradient(self) -> int:
        """Their gradient is added up in float32."""
        return self.rows * self.features * 4


class Cost(NamedTuple):
    """Of a step, forward and backward, for each process."""

    flops: float
    sent: float
    memory: float
    overlaps: bool  # whether what is sent travels while the products are formed


def contrastive(s: Shape, exchange: str, both: bool) -> Cost:
    """clip_loss (both directions) or info_nce: each pair's score is made twice, and multiplied with
    the keys and with the queries."""
    flops = 8.0 * s.rows * s.rows * s.world * s.features
    others = s.world - 1
    states = (16 + 12) * s.rows * others if both else 0
    if exchange == "gather":
        sent = others * (s.block + s.block_gradient) + states
        # All keys and the sums of their gradients; two parts of these that arrive.
        memory = s.world * (s.block + s.block_gradient) + 2 * s.block_gradient
        memory += CUDA_TILE_BYTES if s.cuda else TILE_BYTES
        return Cost(flops, sent, memory, False)
    sent = 2 * others * s.block + s.world * s.block_gradient + states
    piece, tile = (CUDA_PIECE_BYTES, CUDA_TILE_BYTES) if s.cuda else (PIECE_BYTES, RING_TILE_BYTES)
    memory = 6 * min(piece, s.block_gradient) + tile
    return Cost(flops, sent, memory, True)


def vocabulary_parallel(s: Shape, reduces: bool = True) -> Cost:
    """Three products with the head's classes here; three numbers a row to all, and the gradient of
    the hidden states, added up."""
    flops = 6.0 * s.rows * s.features * s.vocab / s.world
    others = s.world - 1
    gradient = 2 * others / s.world * s.rows * s.features * s.itemsize if reduces else 0
    classes = -(-s.vocab // s.world)
    # The logits, and the head's gradient as it is formed, before it is multiplied by the upstream.
    memory = s.itemsize * classes * (s.rows + s.features)
    return Cost(flops, 3 * 4 * s.rows * others + gradient, memory, False)


class Machine(NamedTuple):
    """Rates of one process: FLOPs a second, bytes a second to others, seconds of a message."""

    flops: float
    network: float
    latency: float


def seconds(cost: Cost, s: Shape, machine: Machine, messages: int) -> float:
    compute, network = cost.flops / machine.flops, cost.sent / machine.network
    either = max(compute, network) if cost.overlaps else compute + network
    return either + messages * machine.latency


# An H100's rate of bfloat16 products; NVLink within 8, and 400 Gb/s a GPU beyond.
GPUS = {
    8: Machine(700e12, 400e9, 10e-6),
    64: Machine(700e12, 45e9, 20e-6),
    1024: Machine(700e12, 45e9, 40e-6),
}


def predict(screen: Any) -> None:
    columns = ("GPUs", "rows a GPU", "features", "gather", "ring", "gather holds", "ring holds")
    rows = []
    for world, machine in GPUS.items():
        for count, features in ((512, 512), (4096, 512), (4096, 1024)):
            s = Shape(count, features, world, 2, cuda=True)
            gather, ring = (contrastive(s, kind, True) for kind in ("gather", "ring"))
            steps = 3 * world * max(1, -(-s.block_gradient // CUDA_PIECE_BYTES))
            times = (seconds(gather, s, machine, 8), seconds(ring, s, machine, steps))
            rows.append(
                (
                    str(world), str(count), str(features), *(f"{t * 1e3:.2f} ms" for t in times),
                    *(terminal.megabytes(int(x.memory)) for x in (gather, ring)),
                )
            )  # fmt: skip
    title = "Predicted, not measured: clip_loss in bfloat16, forward and backward"
    terminal.show(screen, terminal.Table(title, columns, rows))
    columns = ("GPUs", "rows", "features", "vocabulary", "products", "sent", "logits here")
    rows = []
    for world in (2, 4, 8):
        s = Shape(8192, 4096, world, 2, 128256, cuda=True)
        cost, machine = vocabulary_parallel(s), GPUS[8]
        rows.append(
            (
                str(world), "8192", "4096", "128256", f"{cost.flops / machine.flops * 1e3:.1f} ms",
                f"{cost.sent / machine.network * 1e3:.2f} ms", terminal.megabytes(int(cost.memory)),
            )
        )  # fmt: skip
    title = (
        "Predicted, not measured: vocab_parallel_linear_cross_entropy in bfloat16, within a node"
    )
    terminal.show(screen, terminal.Table(title, columns, rows))


# Measured


def embeddings(s: Shape, rank: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rank)
    made = [torch.randn(s.rows, s.features, generator=generator) for _ in range(2)]
    return [torch.nn.functional.normalize(x, dim=1).requires_grad_() for x in made]


def clip(s: Shape, rank: int, exchange: Any) -> tuple[list[Tensor], Callable[[], Tensor]]:
    x, y = embeddings(s, rank)
    group = dist.group.WORLD
    return [x, y], lambda: neglog.clip_loss(x, y, 14.0, group=group, exchange=exchange)


def siglip(s: Shape, rank: int, exchange: Any) -> tuple[list[Tensor], Callable[[], Tensor]]:
    x, y = embeddings(s, rank)
    group = dist.group.WORLD
    return [x, y], lambda: neglog.siglip_loss(x, y, 14.0, -9.0, group=group, exchange=exchange)


def head(s: Shape, rank: int, exchange: Any) -> tuple[list[Tensor], Callable[[], Tensor]]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(s.rows, s.features, generator=generator, requires_grad=True)
    target = torch.randint(0, s.vocab, (s.rows,), generator=generator)
    weight = (torch.randn(s.vocab // s.world, s.features) / s.features**0.5).requires_grad_()

    def run() -> Tensor:
        loss: Tensor = neglog.vocab_parallel_linear_cross_entropy(hidden, weight, target)
        return loss

    return [hidden, weight], run


CASES: dict[str, tuple[Any, str]] = {
    "clip_loss, gather": (clip, "gather"),
    "clip_loss, ring": (clip, "ring"),
    "siglip_loss, gather": (siglip, "gather"),
    "siglip_loss, ring": (siglip, "ring"),
    "vocab_parallel_linear_cross_entropy": (head, ""),
}


def model_of(name: str, s: Shape) -> Cost:
    if name.startswith("vocab"):
        return vocabulary_parallel(s)
    cost = contrastive(s, CASES[name][1], name.startswith("clip"))
    if name == "siglip_loss, gather":  # which forms gradients in the forward
        return cost._replace(flops=cost.flops * 3 / 4)
    return cost


def bytes_sent() -> int:
    """By all processes on the loopback device."""
    for line in LOOPBACK.read_text(encoding="utf-8").splitlines():
        device, _, numbers = line.partition(":")
        if device.strip() == "lo":
            return int(numbers.split()[8])
    return 0


def work(name: str, s: Shape, steps: int, rank: int, folder: str, sender: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=s.world
    )
    make, exchange = CASES[name]
    learned, run = make(s, rank, exchange)

    def step() -> None:
        run().backward()

    step()
    for x in learned:
        x.grad = None
    dist.barrier()
    before = bytes_sent()
    with PeakMemory() as memory:
        step()
    dist.barrier()
    sent = (bytes_sent() - before) / s.world
    gradients = sum(x.grad.nbytes for x in learned)
    times = []
    for _ in range(steps):
        dist.barrier()
        start = perf_counter()
        step()
        dist.barrier()
        times.append(perf_counter() - start)
    sender.send((memory.extra - gradients, sent, median(times)))
    dist.barrier()
    dist.destroy_process_group()


def measured(name: str, s: Shape, steps: int) -> tuple[float, float, float]:
    """Bytes held by a process, the most of all; bytes sent; seconds."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(s.world):
            receiver, sender = context.Pipe(duplex=False)
            arguments = (name, s, steps, rank, folder, sender)
            processes.append(context.Process(target=work, args=arguments))
            pipes.append(receiver)
            processes[-1].start()
        found = [receiver.recv() for receiver in pipes]
        for process in processes:
            process.join()
    held, sent, times = zip(*found, strict=True)
    return max(held), sent[0], median(times)


def product_rate() -> float:
    """FLOPs a second of all threads, of a product."""
    x, y = torch.randn(2048, 512), torch.randn(512, 4096)
    torch.mm(x, y)
    start = perf_counter()
    for _ in range(5):
        torch.mm(x, y)
    return 5 * 2.0 * 2048 * 512 * 4096 / (perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--world", type=int, default=4, metavar="N", help="processes (4)")
    parser.add_argument("--rows", type=int, default=8192, metavar="N", help="of each (8192)")
    parser.add_argument("--features", type=int, default=512, metavar="N", help="(512)")
    parser.add_argument("--vocab", type=int, default=32000, metavar="N", help="(32000)")
    parser.add_argument("--only", default="", metavar="NAME", help="losses with this in their name")
    parser.add_argument("--steps", type=int, default=3, metavar="N", help="timed (3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here")
    parser.add_argument("--predict", action="store_true", help="of GPUs, from the model alone")
    options = parser.parse_args()
    screen = terminal.console()
    if options.predict:
        predict(screen)
        return
    rate, cores = product_rate(), torch.get_num_threads()
    screen.print(
        f"{processor()}, {cores} cores; {rate / 1e9:.0f} GFLOP/s of products, all together"
    )
    s = Shape(options.rows, options.features, options.world, 4, options.vocab)
    report: dict[str, Any] = {"shape": s._asdict(), "processor": processor(), "flops": rate}
    rows = []
    for name in (name for name in CASES if options.only in name):
        of = s._replace(rows=s.rows // 4) if name.startswith("vocab") else s
        cost = model_of(name, of)
        held, sent, took = measured(name, of, options.steps)
        report[name] = {"memory": held, "sent": sent, "seconds": took, "model": cost._asdict()}
        if options.json:  # after each: the next may be cut short
            options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        floor = cost.flops * s.world / rate
        rows.append(
            (
                name, terminal.megabytes(int(cost.memory)), terminal.megabytes(int(held)),
                f"{cost.sent / 1e6:.1f} MB", f"{sent / 1e6:.1f} MB", f"{floor:.2f} s",
                f"{took:.2f} s",
            )
        )  # fmt: skip
    columns = ("loss", "holds", "measured", "sends", "measured", "products", "measured")
    title = f"A step of a process of {s.world}, {s.rows} rows of {s.features} each, float32"
    terminal.show(screen, terminal.Table(title, columns, rows))


if __name__ == "__main__":
    main()
