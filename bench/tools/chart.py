"""The chart of README, drawn from a committed measurement.

python bench/tools/chart.py [RESULTS.json] [PICTURE.svg]

It stands on a white card with a border, so that it reads alike on a white and on a dark page.
"""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

from neglog.bench.figure import COMPILE, INK, MUTED, NEGLOG, RULE, TORCH, new_figure
from neglog.bench.report import shape_text

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results" / "epyc-zen5-2cores-memory-float32.json"
PICTURE = ROOT / "docs" / "img" / "speed.svg"
# Contenders by name: what the chart calls them, and their colors.
BARS = {
    "eager": ("torch eager", TORCH),
    "compile": ("torch.compile", COMPILE),
    "neglog": ("neglog", NEGLOG),
    "inplace": ("neglog, in place", "#7fb0df"),
}
THICK = 0.2


def draw(report: dict[str, Any]) -> Any:
    """Milliseconds of each shape, one bar a contender, the ratio to torch eager behind it."""
    results = report["results"]
    heading = f"{report['op']}, {results[0]['dtype']}: loss and gradient on the CPU, milliseconds"
    figure = new_figure((8.8, 1.7 + 0.95 * len(results)), heading, _caption(report))
    figure.patch.set(facecolor="white", edgecolor=RULE, linewidth=2)
    axes = figure.add_subplot()
    for number, name in enumerate(BARS):
        _bars(axes, results, number, name)
    shapes = [shape_text(result["shape"]).replace(" x ", "\n") for result in results]
    axes.set_yticks(range(len(shapes)), shapes, color=INK)
    axes.set_ylim(len(shapes) - 0.5, -0.5)
    axes.set_xlim(right=axes.get_xlim()[1] * 1.08)
    axes.set_xticks([])
    axes.spines[["bottom", "left"]].set_visible(False)
    axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1), ncols=len(BARS), labelcolor=INK)
    command = f"python -m neglog {report['command']} {report['op']} --suite {report['suite']}"
    axes.set_xlabel(f"times faster: than torch eager. Measured by {command}", loc="left",
                    fontsize=8.5, color=MUTED)  # fmt: skip
    return figure


def _bars(axes: Any, results: list[dict[str, Any]], number: int, name: str) -> None:
    label, color = BARS[name]
    found = [_contender(result, name) for result in results]
    places = [line + (number - 1.5) * THICK for line in range(len(results))]
    values = [contender["total_ms"] for contender in found]
    axes.barh(places, values, height=0.9 * THICK, color=color, label=label)
    for place, contender in zip(places, found, strict=True):
        ratio = contender["times_faster"].get("eager", 1.0)
        text = f" {contender['total_ms']:.0f}"
        if name != "eager":
            text += f"   {ratio:.1f} times faster"
        axes.text(contender["total_ms"], place, text, va="center", fontsize=8.5)


def _contender(result: dict[str, Any], name: str) -> dict[str, Any]:
    return next(c for c in result["contenders"] if c["name"] == name)


def _caption(report: dict[str, Any]) -> str:
    versions, contender = report["versions"], report["results"][0]["contenders"][0]
    rounds = len(contender["total_seconds"])
    return (
        f"{report['processor']}, {report['cores']} cores, {report['isa']}; torch "
        f"{versions['torch']}; medians of {rounds} rounds in turn"
    )


def main(results: str = str(RESULTS), picture: str = str(PICTURE)) -> None:
    report = json.loads(Path(results).read_text(encoding="utf-8"))
    figure = draw(report)
    Path(picture).parent.mkdir(parents=True, exist_ok=True)
    # Text stays text: it can be searched and selected, and a change of it can be read in a diff.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "neglog"}):
        figure.savefig(picture, format="svg", metadata={"Date": None})
    text = Path(picture).read_text(encoding="utf-8")
    # Verdana is as wide: where DejaVu Sans is not installed, a label keeps its place.
    text = text.replace("'DejaVu Sans'", "'DejaVu Sans', Verdana, sans-serif")
    Path(picture).write_text(
        "".join(f"{line.rstrip()}\n" for line in text.splitlines()), encoding="utf-8"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
