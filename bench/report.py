"""What bench/device.py writes and prints: versions, rows, goals."""

import json
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import goals
import rivals
import torch
from measure import Row

import neglog

Versions = dict[str, str | None]


def said(command: list[str], pattern: str) -> str | None:
    """What a program says of itself; None where there is no such program."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(pattern, done.stdout)
    return found.group(1) if found else None


def versions() -> Versions:
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = None
    nvcc = [shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc", "--version"]
    smi = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "CUDA": torch.version.cuda,
        "triton": triton,
        "neglog": neglog.__version__,
        "nvcc": said(nvcc, r"release ([\d.]+)"),
        "driver": said(smi, r"([\d.]+)"),
    }


def write(path: str, device: str, about: Versions, rows: list[Row]) -> None:
    content = {
        "device": device,
        "versions": about | rivals.versions(),
        "not importable": rivals.absent(),
        "rows": rows,
        "goals": goals.evaluate(rows),
    }
    with open(path, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1, allow_nan=False)


def table(rows: list[Row]) -> Iterator[str]:
    for row in rows:
        start = f"{row['case']:<56} {row['way']:<28}"
        if "ms" not in row:
            why = "failed" if "failed" in row else "skipped"
            yield f"{start} {why}: {row[why][:60]}"
            continue
        rate = next(f"{row[unit]:.0f} {unit}" for unit in ("GB/s", "TFLOP/s") if unit in row)
        yield f"{start} {row['ms']:>9.3f} ms {rate:>14} {row['peak MB']:>9.0f} MB"


def disagreements(rows: list[Row]) -> Iterator[str]:
    """Losses that are not neglog's: what computes something else is no comparison."""
    losses = [row for row in rows if "loss" in row]
    ours = {row["case"]: row["loss"] for row in losses if row["way"] == "neglog"}
    for row in losses:
        loss, own = row["loss"], ours.get(row["case"])
        strange = isinstance(loss, str) or isinstance(own, str)  # NaN or inf
        if own is not None and (strange or abs(loss - own) > 0.02 * abs(own)):
            yield f"{row['case']}: the loss of {row['way']} is {loss}, neglog's {own}"


def tell(rows: list[Row], device: str, small: bool) -> None:
    print(f"\n{device}, torch {torch.__version__}")
    missing = "; ".join(f"{name} ({why})" for name, why in rivals.absent().items())
    print("not importable:", missing or ("none" if rivals.tried else "not tried"))
    print(*table(rows), *disagreements(rows), sep="\n")
    if not small:
        print(*goals.lines(goals.evaluate(rows), device), sep="\n")
