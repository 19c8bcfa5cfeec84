"""What was measured: as JSON, and from that as tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from statistics import median
from typing import Any

import torch

from neglog import dispatch, kernels

from . import machine
from .measure import Measurement, Result
from .terminal import Table, duration, megabytes

JSON = dict[str, Any]


def environment() -> JSON:
    """All that decides how fast it runs."""
    return {
        "processor": machine.processor(),
        "cores": machine.cores(),
        "threads": torch.get_num_threads(),
        "backend": dispatch.demanded() or dispatch.best("cpu") or "torch",
        "isa": kernels.isa_level(),
        "versions": machine.versions(),
    }


def header(facts: JSON) -> str:
    """The environment in two lines."""
    versions = facts["versions"]
    return (
        f"{facts['processor']}, {facts['cores']} cores, {facts['threads']} threads\n"
        f"torch {versions['torch']}, neglog {versions['neglog']}, backend {facts['backend']}, "
        f"kernels {facts['isa'] or 'not compiled'}"
    )


def as_json(measured: Measurement) -> JSON:
    """Every round of every contender, and what the tables derive from them."""
    spec = measured.spec
    stick = spec.of_rounds(measured.yardstick) if measured.yardstick else None
    return {
        "op": spec.op,
        "shape": spec.shape,
        "dtype": spec.dtype,
        "note": spec.note,
        "input_bytes": spec.nbytes,
        "unit": spec.unit,
        "model": spec.model,
        "calls_per_round": measured.calls,
        "yardstick": {
            "label": spec.yardstick,
            "seconds": measured.yardstick,
            "ms": stick and stick * 1e3,
            "rate": stick and spec.yardstick_work * spec.unit_work / stick / 1e9,
        },
        "left_out": measured.left_out,
        "contenders": [_contender_json(measured, result, stick) for result in measured.results],
    }


def _contender_json(measured: Measurement, result: Result, stick: float | None) -> JSON:
    contender, checked, total = result.contender, result.checked, median(result.total)
    baselines = [r for r in measured.results if r.contender.baseline and r is not result]
    return {
        "name": contender.name,
        "label": contender.label,
        "library": contender.library,
        "backends": checked.backends if checked else [],
        "forward_seconds": result.forward,
        "total_seconds": result.total,
        "forward_ms": median(result.forward) * 1e3 if result.forward else None,
        "total_ms": total * 1e3,
        "times_faster": {b.contender.name: result.over(b) for b in baselines},
        "rate": contender.work * measured.spec.unit_work / total / 1e9,
        "yardsticks": stick and total / stick,
        "peak_extra_bytes": result.extra,
        "gradient_bytes": result.gradient_bytes,
        "loss": _number(checked.loss) if checked else None,
        "largest_relative_error": _number(checked.error) if checked else None,
        "mismatch": checked.mismatch if checked else None,
    }


def _number(value: float | None) -> float | str | None:
    """JSON has no NaN and no infinity."""
    return value if value is None or math.isfinite(value) else str(value)


def shape_text(shape: dict[str, int]) -> str:
    """rows 2,048 x vocab 32,000."""
    return " x ".join(f"{name} {size:,}" for name, size in shape.items())


def title(result: JSON) -> str:
    """The loss, its shape and dtype, and what the shape does not say."""
    parts = [result["op"], shape_text(result["shape"]), result["dtype"], result.get("note")]
    return ", ".join(part for part in parts if part)


def label(contender: JSON) -> str:
    """With the backend that ran, where neglog was left to choose it."""
    if contender["name"] != "neglog" or not contender.get("backends"):
        return contender["label"]
    return f"{contender['label']} ({', '.join(contender['backends'])})"


def _baselines(result: JSON) -> list[JSON]:
    """Those that the others are compared with, in the order of the contenders."""
    names = {name for c in result["contenders"] for name in c["times_faster"]}
    return [c for c in result["contenders"] if c["name"] in names]


def _units(result: JSON) -> str:
    label = result["yardstick"]["label"]
    if label.startswith("copy"):
        return "copies"
    return "of the matmuls" if "matmuls" in label else "of cross_entropy"


def large_table(result: JSON) -> Table:
    """One row a contender, and the yardstick last."""
    baselines = _baselines(result)
    ratios = (f"x {b['label'].removeprefix('torch').strip(' .')}" for b in baselines)
    columns = (
        "", "forward", "fwd + bwd", *ratios, result["unit"], _units(result), "extra memory",
    )  # fmt: skip
    rows: list[tuple[str, ...]] = []
    emphasis: dict[int, str] = {}
    for contender in result["contenders"]:
        if contender["name"] == "neglog":
            emphasis[len(rows)] = "bold"
        rows.append((
            label(contender), duration(contender["forward_ms"] / 1e3),
            duration(contender["total_ms"] / 1e3),
            *(_ratio(contender, baseline) for baseline in baselines),
            f"{contender['rate']:.1f}", f"{contender['yardsticks']:.2f}",
            megabytes(contender["peak_extra_bytes"]),
        ))  # fmt: skip
    stick = result["yardstick"]
    emphasis[len(rows)] = "dim"
    rows.append((
        stick["label"], "", duration(stick["ms"] / 1e3), *("" for _ in baselines),
        f"{stick['rate']:.1f}", "1.00", "",
    ))  # fmt: skip
    size = megabytes(result["input_bytes"])
    return Table(f"{title(result)} ({size})", columns, rows, emphasis)


def _ratio(contender: JSON, baseline: JSON) -> str:
    return f"{contender['times_faster'].get(baseline['name'], 1.0):.2f}"


def brief_table(results: list[JSON], suite: str) -> Table:
    """One row a shape: microseconds of forward and backward together."""
    labels = {c["name"]: c["label"].strip() for c in results[0]["contenders"]}
    columns = ("shape", *labels.values(), "torch eager / neglog", "calls a round", "neglog ran by")
    rows: list[tuple[str, ...]] = []
    for result in results:
        found = {contender["name"]: contender for contender in result["contenders"]}
        times = (f"{found[x]['total_ms'] * 1e3:.1f} us" if x in found else "" for x in labels)
        rows.append((
            shape_text(result["shape"]), *times, _ratio(found["neglog"], found["eager"]),
            str(result["calls_per_round"]), ", ".join(found["neglog"]["backends"]),
        ))  # fmt: skip
    heading = f"{results[0]['op']}, suite {suite}, {results[0]['dtype']}: forward and backward"
    return Table(heading, columns, rows)


def long_table(heading: str, results: Iterable[JSON]) -> Table:
    """All results in one: one row a contender, or what kept it from being measured."""
    rows: list[tuple[str, ...]] = []
    for result in results:
        for contender in result["contenders"]:
            forward = contender["forward_ms"]
            rows.append((
                title(result), contender["label"].strip(),
                "" if forward is None else f"{forward:.3f} ms", f"{contender['total_ms']:.3f} ms",
                f"{contender['rate']:.0f} {result['unit']}",
                megabytes(contender["peak_extra_bytes"]), "",
            ))  # fmt: skip
        for name, why in result["left_out"].items():
            rows.append((title(result), name, "", "", "", "", why[:70]))
    columns = ("", "contender", "forward", "fwd + bwd", "rate", "extra memory", "")
    return Table(heading, columns, rows)


def mismatches(results: Iterable[JSON]) -> Iterator[str]:
    """Contenders that compute something else: their times are no comparison."""
    for result in results:
        for contender in result["contenders"]:
            if contender["mismatch"]:
                yield contender["mismatch"]


def notes(result: JSON) -> str:
    """What the table's columns mean, and who is missing from it."""
    stick = result["yardstick"]["label"]
    checked = [c for c in result["contenders"] if c["largest_relative_error"] is not None]
    worst = max(checked, key=lambda contender: contender["largest_relative_error"])
    lines = [
        f"Every loss and gradient agrees with the float64 oracle (largest relative error "
        f"{worst['largest_relative_error']:.1e}, {worst['label'].strip()}).",
        "forward: the loss without its gradient; fwd + bwd: another call, with it.",
        "x: how many times faster; median of the rounds' own ratios, "
        f"{len(result['yardstick']['seconds'])} rounds in turn.",
        "extra memory: at the peak, nothing kept from before; the gradient itself is in it.",
        f"{result['unit']}: {result['model']}",
        f"{_units(result)}: time over that of the {stick}.",
    ]
    names = {contender["name"] for contender in result["contenders"]}
    if "new_memory" in names:
        lines.append(
            "in new memory: without the pages of the last gradient, which neglog keeps for the "
            "next."
        )
    if any(contender["peak_extra_bytes"] is None for contender in result["contenders"]):
        lines.append("Memory: not available, this system does not let a process reset its peak.")
    lines += [f"{name}: {why}" for name, why in result["left_out"].items()]
    return "\n".join(lines)
