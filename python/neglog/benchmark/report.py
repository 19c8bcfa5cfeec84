"""What was measured, as tables and as JSON."""

from __future__ import annotations

from statistics import median
from typing import Any

import torch

from neglog import dispatch, kernels
from neglog.benchmark import machine
from neglog.benchmark.cases import Spec
from neglog.benchmark.measure import Measurement, Result, SmallResult
from neglog.benchmark.terminal import duration, megabytes, table


def environment() -> dict[str, Any]:
    """All that decides how fast it runs."""
    return {
        "processor": machine.processor(),
        "cores": machine.cores(),
        "threads": torch.get_num_threads(),
        "backend": dispatch.forced() or dispatch.kernel_backend() or "torch",
        "isa": kernels.isa_level(),
        "versions": machine.versions(),
    }


def header(facts: dict[str, Any]) -> str:
    """The environment in two lines."""
    versions = facts["versions"]
    return (
        f"{facts['processor']}, {facts['cores']} cores, {facts['threads']} threads\n"
        f"torch {versions['torch']}, neglog {versions['neglog']}, backend {facts['backend']}, "
        f"kernels {facts['isa'] or 'not compiled'}"
    )


def shape_text(shape: dict[str, int]) -> str:
    """rows 2,048 x vocab 32,000."""
    return " x ".join(f"{name} {size:,}" for name, size in shape.items())


def _baselines(measured: Measurement) -> list[Result]:
    return [r for r in measured.results if r.contender.name in ("eager", "compile")]


def _units(spec: Spec) -> str:
    return "copies" if spec.yardstick.startswith("copy") else "tiles"


def large_table(op: str, measured: Measurement) -> Any:
    """One row a contender, and the yardstick last."""
    spec = measured.spec
    size = megabytes(spec.nbytes)
    title = f"{op}, {shape_text(spec.shape)}, {spec.dtype} ({size})"
    baselines = _baselines(measured)
    ratios = [f"x {b.contender.label.removeprefix('torch').strip(' .')}" for b in baselines]
    made = table(
        title, "", "forward", "fwd + bwd", *ratios, spec.unit, _units(spec), "extra memory"
    )
    stick = median(measured.yardstick)
    for result in measured.results:
        total = median(result.total)
        made.add_row(
            result.contender.label,
            duration(median(result.forward)),
            duration(total),
            *(f"{result.over(baseline):.2f}" for baseline in baselines),
            f"{result.contender.work * spec.unit_work / total / 1e9:.1f}",
            f"{total / stick:.2f}",
            megabytes(result.extra),
            style="bold" if result.contender.name == "neglog" else None,
        )
    rate = spec.yardstick_work * spec.unit_work / stick / 1e9
    made.add_section()
    made.add_row(
        spec.yardstick, "", duration(stick), *("" for _ in baselines),
        f"{rate:.1f}", "1.00", "", style="dim",
    )  # fmt: skip
    return made


def notes(measured: Measurement) -> str:
    """What the table's columns mean, and who is missing from it."""
    stick = measured.spec.yardstick
    worst = max(measured.results, key=lambda result: result.error)
    lines = [
        f"Every loss and gradient agrees with the float64 oracle (largest relative error "
        f"{worst.error:.1e}, {worst.contender.label.strip()}).",
        "x: how many times faster; median of the rounds' own ratios, "
        f"{len(measured.yardstick)} rounds in turn.",
        "Extra memory: at the peak, nothing kept from before; the gradient itself is in it.",
        f"{measured.spec.unit}: {measured.spec.model}",
        f"{_units(measured.spec).capitalize()}: time in units of the {stick}.",
    ]
    if any(result.contender.new_memory for result in measured.results):
        lines.append(
            "In new memory: without the pages of the last gradient, which neglog keeps for the "
            "next."
        )
    if any(result.extra is None for result in measured.results):
        lines.append("Memory: not available, this system does not let a process reset its peak.")
    lines += [f"Left out: {name}: {why}" for name, why in measured.left_out.items()]
    return "\n".join(lines)


def large_json(measured: Measurement) -> dict[str, Any]:
    """Every round of every contender, and what the table derives from them."""
    spec = measured.spec
    baselines = _baselines(measured)
    stick = median(measured.yardstick)
    return {
        "shape": spec.shape,
        "dtype": spec.dtype,
        "unit": spec.unit,
        "model": spec.model,
        "yardstick": {"label": spec.yardstick, "seconds": measured.yardstick,
                      "rate": spec.yardstick_work * spec.unit_work / stick / 1e9},
        "left_out": measured.left_out,
        "contenders": [
            {
                "name": r.contender.name,
                "label": r.contender.label,
                "forward_seconds": r.forward,
                "total_seconds": r.total,
                "forward_ms": median(r.forward) * 1e3,
                "total_ms": median(r.total) * 1e3,
                "times_faster": {b.contender.name: r.over(b) for b in baselines},
                "rate": r.contender.work * spec.unit_work / median(r.total) / 1e9,
                "yardsticks": median(r.total) / stick,
                "peak_extra_bytes": r.extra,
                "largest_relative_error": r.error,
            }
            for r in measured.results
        ],
    }  # fmt: skip


def _ratio(result: SmallResult) -> float:
    first, second = result.seconds.values()
    return median(a / b for a, b in zip(first, second, strict=True))


def small_table(op: str, dtype: str, results: list[SmallResult]) -> Any:
    """One row a shape: microseconds of forward and backward together."""
    title = f"{op}, small shapes, {dtype}: forward and backward"
    made = table(title, "shape", "torch eager", "neglog", "torch / neglog", "calls a round", "by")
    for result in results:
        first, second = (median(times) * 1e6 for times in result.seconds.values())
        made.add_row(
            shape_text(result.shape), f"{first:.1f} us", f"{second:.1f} us",
            f"{_ratio(result):.2f}", str(result.calls), ", ".join(result.ran),
        )  # fmt: skip
    return made


def small_json(dtype: str, result: SmallResult) -> dict[str, Any]:
    """Every round, in seconds a call."""
    return {
        "shape": result.shape,
        "dtype": dtype,
        "calls_per_round": result.calls,
        "seconds_per_call": result.seconds,
        "torch_over_neglog": _ratio(result),
        "backends": result.ran,
    }
