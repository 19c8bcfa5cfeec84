"""The goals that measurements are held against, computed from their JSON alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

from .cases import HEAD, OPS, PAIRS, ROWS, Shape, shapes
from .report import JSON

GIB = 2**30 / 1e6
LARGE, IMAGES, ODD, MEDIUM = shapes(
    ROWS, (8192, 131072), (32768, 1000), (8192, 50257), (8192, 32000)
)
(LINEAR,) = shapes(HEAD, (4096, 4096, 128256))
CLIP, MILLION = shapes(PAIRS, (65536, 768), (1_000_000, 768))
TINY, LESS_TINY = shapes(ROWS, (8, 10), (64, 1000))
MASKED_SHARE = 0.15
Part = str  # "forward", "forward, backward" or "in place"
FORWARD, BOTH, IN_PLACE = "forward", "forward, backward", "in place"


class Value(NamedTuple):
    """`number` is None where nothing was measured, NaN where neglog failed; `note` says more."""

    number: float | None
    note: str = ""


class Goal(NamedTuple):
    """A bound on a number. A bound of infinity asks only that there is a number."""

    what: str
    value: Callable[[list[JSON]], Value]
    bound: float
    unit: str
    at_most: bool = False

    def met(self, number: float) -> bool:
        """NaN meets nothing."""
        return number <= self.bound if self.at_most else number >= self.bound


class Where(NamedTuple):
    """Which results a goal speaks of."""

    op: str
    shape: Shape
    dtype: str = "bfloat16"
    note: str = ""

    def __str__(self) -> str:
        sizes = " x ".join(map(str, self.shape.values()))
        return f"{self.op} {sizes} {self.dtype}" + (f", {self.note}" if self.note else "")

    def of(self, results: list[JSON]) -> list[JSON]:
        """Those results."""
        wanted = (self.op, self.shape, self.dtype, self.note)
        return [
            result
            for result in results
            if (result["op"], result["shape"], result["dtype"], result["note"]) == wanted
        ]


class Found(NamedTuple):
    """A contender's entry and the result that it stands in."""

    contender: JSON
    result: JSON


def _find(results: list[JSON], where: Where, name: str) -> Found | float | None:
    """NaN where the contender failed, None where it was not measured."""
    failed = False
    for result in where.of(results):
        for contender in result["contenders"]:
            if contender["name"] == name:
                return Found(contender, result)
        # A case that cannot be prepared says so in neglog's name.
        why = result["left_out"].get(name, result["left_out"].get("neglog", ""))
        failed |= why.startswith("failed")
    return math.nan if failed else None


def share_of_copy(results: list[JSON], where: Where, part: Part) -> Value:
    """The rate of the bytes that must move, over the rate of a copy of the same logits: its 1 read
    and 1 write against 1 read forward, and 1 read and 1 write with the gradient."""
    found = _find(results, where, "inplace" if part == IN_PLACE else "neglog")
    if not isinstance(found, Found):
        return Value(found)
    if part == FORWARD:
        return Value(50 * found.result["yardstick"]["ms"] / found.contender["forward_ms"])
    return Value(100 * found.result["yardstick"]["ms"] / found.contender["total_ms"])


def least_ratio(results: list[JSON], other: str, part: Part) -> Value:
    """The other's time over neglog's, at the bfloat16 shape where it is least."""
    name = "inplace" if part == IN_PLACE else "neglog"
    ratios = [
        (contender["times_faster"][other], " x ".join(map(str, result["shape"].values())))
        for result in results
        if (result["op"], result["dtype"]) == ("cross_entropy", "bfloat16")
        for contender in result["contenders"]
        if contender["name"] == name and other in contender["times_faster"]
    ]
    if not ratios:
        return Value(None)
    least, shape = min(ratios)
    return Value(least, f"at {shape}, the least of {len(ratios)}")


def milliseconds(results: list[JSON], where: Where) -> Value:
    """Of forward and backward."""
    found = _find(results, where, "neglog")
    return Value(found.contender["total_ms"] if isinstance(found, Found) else found)


def memory_beside_gradients(results: list[JSON], where: Where) -> Value:
    """The peak less the bytes of the gradients, in MB."""
    found = _find(results, where, "neglog")
    if not isinstance(found, Found):
        return Value(found)
    peak, gradients = (found.contender[key] for key in ("peak_extra_bytes", "gradient_bytes"))
    return Value((peak - gradients) / 1e6)


def over_yardstick(results: list[JSON], where: Where) -> Value:
    """How many times the yardstick's time a call of neglog takes."""
    found = _find(results, where, "neglog")
    return Value(found.contender["yardsticks"] if isinstance(found, Found) else found)


def kernel_over_torch(results: list[JSON], where: Where) -> Value:
    """How many times torch eager's time a call of neglog takes."""
    found = _find(results, where, "neglog")
    if not isinstance(found, Found):
        return Value(found)
    return Value(1 / found.contender["times_faster"]["eager"])


def _shares() -> Iterator[Goal]:
    for shape, bounds in ((LARGE, (90, 85, 85)), (IMAGES, (75,) * 3), (ODD, (75,) * 3)):
        where = Where("cross_entropy", shape)
        for part, bound in zip((FORWARD, BOTH, IN_PLACE), bounds, strict=True):
            value = partial(share_of_copy, where=where, part=part)
            yield Goal(f"{where} {part}, of the copy's rate", value, bound, "%")


def _ratios() -> Iterator[Goal]:
    for name, part, bound in (
        ("quack-kernels", BOTH, 1.0),
        ("quack-kernels", IN_PLACE, 1.0),
        ("liger-kernel", IN_PLACE, 2.0),  # it always overwrites its logits
        ("compile", BOTH, 1.3),
    ):
        value = partial(least_ratio, other=name, part=part)
        yield Goal(f"cross_entropy {part}, {name}'s time over neglog's", value, bound, "x")


def _times() -> Iterator[Goal]:
    full = Where("linear_cross_entropy", LINEAR)
    masked = full._replace(note=f"{MASKED_SHARE:.0%} counted")
    clip, million = Where("clip_loss", CLIP), Where("clip_loss", MILLION)
    yield Goal(str(full), partial(milliseconds, where=full), 17.3, "ms", True)
    yield Goal(f"{full}, peak less its gradients",
               partial(memory_beside_gradients, where=full), GIB, "MB", True)  # fmt: skip
    yield Goal(str(masked), partial(milliseconds, where=masked), 3.2, "ms", True)
    yield Goal(str(clip), partial(milliseconds, where=clip), 44, "ms", True)
    yield Goal(f"{million} completes", partial(milliseconds, where=million), math.inf, "ms", True)


# Set for an H200.
CUDA = (*_shares(), *_ratios(), *_times())


def _over_torch() -> Iterator[Goal]:
    classes = OPS["cross_entropy"].suites["classes"]
    for shape, bound in ((TINY, 1.4), (LESS_TINY, 0.9), *((shape, 0.5) for shape in classes)):
        where = Where("cross_entropy", shape, "float32")
        value = partial(kernel_over_torch, where=where)
        yield Goal(f"{where}, time over torch's", value, bound, "x", True)


def _over_matmuls() -> Iterator[Goal]:
    for op, dtype, bound in (
        ("linear_cross_entropy", "float32", 1.0),
        ("linear_cross_entropy", "bfloat16", 1.0),
        ("clip_loss", "float32", 1.0),
        ("clip_loss", "bfloat16", 1.05),
    ):
        where = Where(op, OPS[op].default, dtype)
        value = partial(over_yardstick, where=where)
        yield Goal(f"{where}, time over three matmuls'", value, bound, "x", True)


CPU = (*_over_torch(), *_over_matmuls())


def evaluate(results: list[JSON], goals: Iterable[Goal]) -> list[JSON]:
    """met is None where nothing was measured; False, with measured None, where neglog failed."""
    judged = []
    for goal in goals:
        number, note = goal.value(results)
        failed = number is not None and math.isnan(number)
        judged.append({
            "goal": goal.what,
            "bound": goal.bound if math.isfinite(goal.bound) else None,
            "unit": goal.unit,
            "at most": goal.at_most,
            "measured": None if failed else number,
            "met": None if number is None else goal.met(number),
            "note": "failed" if failed else note,
        })  # fmt: skip
    return judged


def lines(judged: Iterable[JSON]) -> Iterator[str]:
    """A line for each goal."""
    for goal in judged:
        verdict = {True: "met", False: "not met", None: "not measured"}[goal["met"]]
        number, bound = (
            "" if goal[key] is None else f"{goal[key]:.4g} {goal['unit']}"
            for key in ("measured", "bound")
        )
        limit = f"{'<=' if goal['at most'] else '>='} {bound}" if bound else ""
        note = f" ({goal['note']})" if goal["note"] else ""
        yield f"{goal['goal']:<72} {number:>12} {limit:>11}  {verdict}{note}"


def heading(device: str) -> str:
    """The goals' own device is named where this one is another."""
    if "H200" in device:
        return f"Goals on {device}"
    return f"Goals on {device}: the milliseconds were set for an H200, which this is not"
