"""What a run is held against, computed from its rows alone. The goals were set for an H200."""

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

from measure import Row

FORWARD, BOTH, IN_PLACE = "forward", "forward, backward", "in place"
GIB = 2**30 / 1e6
LARGE, IMAGES, ODD = (8192, 131072), (32768, 1000), (8192, 50257)
LINEAR, CLIP, MILLION = (4096, 4096, 128256), (65536, 768), (1_000_000, 768)
Found = dict[tuple[str, str], Row]


def nll_case(shape: tuple[int, int], part: str = "", dtype: str = "bfloat16") -> str:
    return f"nll {shape[0]} x {shape[1]} {dtype} {part}".rstrip()


def linear_case(shape: tuple[int, int, int], share: float) -> str:
    return f"linear {' x '.join(map(str, shape))} bfloat16, {share:.0%} counted"


def clip_case(shape: tuple[int, int]) -> str:
    return f"clip_loss {shape[0]} x {shape[1]} bfloat16"


class Value(NamedTuple):
    """`number` is None where nothing was measured, NaN where neglog failed; `note` says more."""

    number: float | None
    note: str = ""


class Goal(NamedTuple):
    what: str
    value: Callable[[Found], Value]
    bound: float
    unit: str
    at_most: bool = False

    def met(self, number: float) -> bool:
        return number <= self.bound if self.at_most else number >= self.bound


def own(found: Found, case: str, *fields: str) -> list[float] | None:
    """Fields of neglog's row: NaN where it failed, None where it did not run."""
    row = found.get((case, "neglog"), {})
    if "failed" in row:
        return [math.nan] * len(fields)
    return [row[field] for field in fields] if "ms" in row else None


def of_copy(found: Found, shape: tuple[int, int], part: str) -> Value:
    """The rate, of the bytes that must move, over that of a copy of the same logits."""
    rate, copy = own(found, nll_case(shape, part), "GB/s"), found.get((nll_case(shape), "copy"), {})
    if rate is None or "GB/s" not in copy:
        return Value(None)
    return Value(100 * rate[0] / copy["GB/s"])


def against(found: Found, way: str, part: str) -> Value:
    """The least ratio over the shapes in bfloat16 at which both were measured."""
    ratios = []
    for (case, other), row in found.items():
        if other != way or "ms" not in row or not case.startswith("nll "):
            continue
        if case.endswith(f" bfloat16 {part}") and (ms := own(found, case, "ms")):
            ratios.append((row["ms"] / ms[0], case.split(" bfloat16")[0]))
    if not ratios:
        return Value(None)
    least = min(ratios, key=lambda ratio: (not math.isnan(ratio[0]), ratio[0]))
    return Value(least[0], f"at {least[1]}, the least of {len(ratios)}")


def time_of(found: Found, case: str) -> Value:
    ms = own(found, case, "ms")
    return Value(None if ms is None else ms[0])


def memory_of(found: Found, case: str) -> Value:
    fields = own(found, case, "peak MB", "gradients MB")
    return Value(None if fields is None else fields[0] - fields[1])


def goals() -> list[Goal]:
    bounds = ((LARGE, (90, 85, 85)), (IMAGES, (75,) * 3), (ODD, (75,) * 3))
    floors = [
        Goal(f"{nll_case(shape, part)}, of the copy's rate",
             partial(of_copy, shape=shape, part=part), bound, "%")
        for shape, three in bounds
        for part, bound in zip((FORWARD, BOTH, IN_PLACE), three, strict=True)
    ]  # fmt: skip
    others = (
        ("quack-kernels", BOTH, 1.0), ("quack-kernels", IN_PLACE, 1.0),
        ("liger-kernel", IN_PLACE, 2.0),  # over its logits is the only way it has
        ("torch.compile", BOTH, 1.3),
    )  # fmt: skip
    ratios = [
        Goal(f"nll {part}, {way}'s time over neglog's", partial(against, way=way, part=part),
             bound, "x")
        for way, part, bound in others
    ]  # fmt: skip
    full, masked = (linear_case(LINEAR, share) for share in (1.0, 0.15))
    return [
        *floors,
        *ratios,
        Goal(full, partial(time_of, case=full), 17.3, "ms", True),
        Goal(f"{full}, peak less its gradients", partial(memory_of, case=full), GIB, "MB",
             True),
        Goal(masked, partial(time_of, case=masked), 3.2, "ms", True),
        Goal(clip_case(CLIP), partial(time_of, case=clip_case(CLIP)), 44, "ms", True),
        Goal(f"{clip_case(MILLION)} completes", partial(time_of, case=clip_case(MILLION)),
             math.inf, "ms", True),
    ]  # fmt: skip


def evaluate(rows: Iterable[Row]) -> list[Row]:
    """met is None where nothing was measured; False, with measured None, where neglog failed."""
    found = {(row["case"], row["way"]): row for row in rows if "way" in row}
    results = []
    for goal in goals():
        number, note = goal.value(found)
        failed = number is not None and math.isnan(number)
        results.append({
            "goal": goal.what,
            "bound": goal.bound if math.isfinite(goal.bound) else None,
            "unit": goal.unit,
            "at most": goal.at_most,
            "measured": None if failed else number,
            "met": None if number is None else goal.met(number),
            "note": "failed" if failed else note,
        })  # fmt: skip
    return results


def lines(results: Iterable[Row], device: str) -> Iterable[str]:
    yield f"Goals on {device}" + (
        "" if "H200" in device else ": the milliseconds were set for an H200, which this is not"
    )
    for result in results:
        said = {True: "met", False: "not met", None: "not measured"}[result["met"]]
        number, bound = (
            "" if result[key] is None else f"{result[key]:.4g} {result['unit']}"
            for key in ("measured", "bound")
        )
        goal = f"{'<=' if result['at most'] else '>='} {bound}" if bound else ""
        note = f" ({result['note']})" if result["note"] else ""
        yield f"{result['goal']:<72} {number:>12} {goal:>11}  {said}{note}"
