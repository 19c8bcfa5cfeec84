"""The losses timed on the GPU at hand, against torch and other libraries; goals come last.

python -m neglog.bench.device [--json FILE] [--seconds N] [--small]

--seconds: no case starts after so many; of 180 or more, 60 are kept for the last, a million pairs.
--small: sizes at which a run says only that everything runs. It needs torch and NumPy alone. What
is right is the tests' affair: python -m pytest tests/csrc
"""

from __future__ import annotations

import argparse
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from neglog import dispatch

from . import files, goals, machine, report, rivals, terminal
from .budget import Budget
from .cases import HEAD, PAIRS, ROWS, Shape, load, shapes
from .clocks import Clock, CUDAClock
from .contender import Contender, Problem
from .measure import Plan, failure, measure
from .report import JSON

DEVICE = "cuda"
ROUNDS = 15
CONTENDER_SECONDS = 75.0  # a compiler that takes longer than this is given up
MILLION_SECONDS = 60.0
LONGEST = 600.0
CROSS_ENTROPY = (goals.LARGE, goals.IMAGES, goals.ODD, goals.MEDIUM)
SMALL_CROSS_ENTROPY = shapes(ROWS, (64, 5000))
(SMALL_LINEAR,) = shapes(HEAD, (64, 32, 5000))
SMALL_CLIP, SMALL_MILLION = shapes(PAIRS, (1024, 64), (4096, 64))


class Case(NamedTuple):
    """One loss at one shape.

    who: "ours" are torch and neglog, "others" other libraries beside neglog, "once" neglog's first
    call. options: of the case's `problem`. needs: the seconds without which it does not start.
    """

    op: str
    shape: Shape
    dtype: str = "bfloat16"
    who: str = "ours"
    options: dict[str, Any] = {}  # noqa: RUF012 - never written
    needs: float = 5.0

    @property
    def note(self) -> str:
        """What the shape does not say, as the problem's spec has it."""
        counted = self.options.get("counted", 1.0)
        return "" if counted == 1.0 else f"{counted:.0%} counted"


def cases(small: bool) -> list[Case]:
    """Ours, then other libraries, which may take the GPU down with them; a million pairs last."""
    rows = SMALL_CROSS_ENTROPY if small else CROSS_ENTROPY
    head = SMALL_LINEAR if small else goals.LINEAR
    pairs, million = (SMALL_CLIP, SMALL_MILLION) if small else (goals.CLIP, goals.MILLION)
    ours = [
        *(Case("cross_entropy", shape) for shape in rows),
        Case("linear_cross_entropy", head),
        Case("linear_cross_entropy", head, options={"counted": goals.MASKED_SHARE}),
        Case("clip_loss", pairs),
        *(Case(op, rows[-1]) for op in ("token_logprobs", "kl_div", "kl_div_top_k")),
    ]
    return [
        *ours,
        *(Case("cross_entropy", shape, "float32") for shape in rows),
        *(case._replace(who="others") for case in ours),
        Case("clip_loss", million, who="once", options={"check": False}, needs=MILLION_SECONDS),
    ]


def groups(case: Case, problem: Problem) -> Iterator[list[Contender]]:
    """The contenders that are timed in turn. Another library stands beside neglog alone, so that
    one which fails spoils no other's measurement; one that overwrites, beside neglog in place."""
    made = load(case.op).contenders(problem)
    by_name = {contender.name: contender for contender in made}
    if case.who == "once":
        yield [by_name["neglog"]]
    elif case.who == "ours":
        # A compilation takes seconds: of one dtype.
        compiled = case.dtype == "bfloat16"
        yield [
            contender
            for contender in made
            if "large" in contender.suites and (compiled or contender.name != "compile")
        ]
    else:
        for rival in rivals.contenders(problem):
            yield [by_name["inplace" if rival.overwrites else "neglog"], rival]


def run(case: Case, clock: Clock, budget: Budget) -> Iterator[JSON]:
    """The results of a case, or one that says why there are none."""
    if (left := budget.left()) < case.needs:
        why = f"skipped: {max(left, 0):.0f} s left, {case.needs:.0f} needed"
        yield _left_out(case, why)
        return
    torch.compiler.reset()  # each shape compiles anew, and eight of a function are the most
    once = case.who == "once"
    plan = Plan(
        ROUNDS, strict=False, budget=budget, limit=LONGEST if once else CONTENDER_SECONDS, once=once
    )
    try:
        problem = load(case.op).problem(case.shape, case.dtype, 0, DEVICE, **case.options)
        for contenders in groups(case, problem):
            yield report.as_json(measure(problem, contenders, clock, plan))
    except Exception as error:  # in what the case prepares: no memory, say
        yield _left_out(case, failure(error))
    clock.clear()


def _left_out(case: Case, why: str) -> JSON:
    name = "others" if case.who == "others" else "neglog"
    return {
        "op": case.op, "shape": case.shape, "dtype": case.dtype, "note": case.note,
        "contenders": [], "left_out": {name: why},
    }  # fmt: skip


def results_of(chosen: list[Case], clock: Clock, budget: Budget) -> Iterator[JSON]:
    """Of all cases, the last with the seconds that were kept for it."""
    *before, last = chosen
    for case in before:
        # Other libraries are imported here, when ours has been measured.
        if case.who != "others" or rivals.functions(case.op):
            yield from run(case, clock, budget)
    budget.kept = 0.0
    yield from run(last, clock, budget)


def facts(device: str) -> JSON:
    """All that decides how fast it runs."""
    nvcc = [shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc", "--version"]
    smi = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    tools = {
        "CUDA": torch.version.cuda,
        "nvcc": _printed(nvcc, r"release ([\d.]+)"),
        "driver": _printed(smi, r"([\d.]+)"),
    }
    return report.environment() | {
        "device": device, "backend": "cuda", "versions": machine.versions("triton") | tools,
    }  # fmt: skip


def _printed(command: list[str], pattern: str) -> str | None:
    """What a program prints of itself; None where there is no such program."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(pattern, done.stdout)
    return found.group(1) if found else None


def write(path: Path, about: JSON, results: list[JSON]) -> None:
    """Everything that is known so far."""
    files.write_json(path, {
        "command": "device", **about, "versions": about["versions"] | rivals.versions(),
        "not importable": rivals.absent(), "results": results,
        "goals": goals.evaluate(results, goals.CUDA),
    })  # fmt: skip


def print_results(results: list[JSON], device: str, small: bool) -> None:
    """Table, what is wrong with it, goals."""
    heading = f"\n{device}, torch {torch.__version__}"
    print(*terminal.plain(report.long_table(heading, results)), sep="\n")
    missing = "; ".join(f"{name} ({why})" for name, why in rivals.absent().items())
    print("not importable:", missing or "none that was tried")
    for line in report.mismatches(results):
        print(line)
    if not small:
        print(goals.heading(device))
        print(*goals.lines(goals.evaluate(results, goals.CUDA)), sep="\n")


def main(arguments: list[str] | None = None) -> int:
    """1 where neglog failed or was wrong, 2 where there is nothing to time."""
    parser = argparse.ArgumentParser("neglog.bench.device", description=str(__doc__).split("\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args(arguments)
    state = next(state for state in dispatch.describe() if state.name == "cuda")
    if not (state.usable and torch.cuda.is_available()):
        why = "torch finds no CUDA device" if state.usable else state.why
        print(f"neglog.bench.device: nothing to time: {why}", file=sys.stderr)
        return 2
    long = options.seconds is not None and options.seconds >= 3 * MILLION_SECONDS
    budget = Budget(options.seconds, kept=MILLION_SECONDS if long else 0.0)
    device = torch.cuda.get_device_name()
    about, results = facts(device), []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # cut off: the table is printed
    try:
        for result in results_of(cases(options.small), CUDAClock(), budget):
            results.append(result)
            print(*terminal.plain(report.long_table("", [result])), sep="\n", flush=True)
            if options.json:  # after each: a later one may be killed
                write(options.json, about, results)
    finally:
        print_results(results, device, options.small)
    return int(any(_neglog_failed(result) for result in results))


def _neglog_failed(result: JSON) -> bool:
    wrong = any(c["mismatch"] for c in result["contenders"] if c["library"] == "neglog")
    why = result["left_out"]
    return wrong or any(why.get(name, "").startswith("failed") for name in ("neglog", "inplace"))


if __name__ == "__main__":
    sys.exit(main())
