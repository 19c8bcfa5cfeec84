"""What a picture shows: no label cut off, one color for each library, no legend on a curve."""

import json
import runpy
from pathlib import Path
from xml.etree import ElementTree

import pytest

from neglog.bench import figure, plot, terminal
from neglog.bench.cases import load
from neglog.bench.clocks import CPUClock
from neglog.bench.measure import Plan, measure
from neglog.bench.report import as_json
from neglog.bench.terminal import Table

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def result():
    case = load("clip_loss")
    problem = case.problem({"rows": 32, "features": 8}, "float32", 0)
    contenders = [c for c in case.contenders(problem) if c.name != "compile"]
    return as_json(measure(problem, contenders, CPUClock(), Plan(rounds=1)))


def drawn(made):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(made).draw()
    return made


def test_labels_of_any_length_fit(result):
    contenders = [
        dict(c, label=f"{c['label']}, with a long explanation") for c in result["contenders"]
    ]
    made = drawn(plot.large_figure([dict(result, contenders=contenders)], "here"))
    for axes in made.axes:
        for text in axes.get_yticklabels():
            if text.get_text():
                assert text.get_window_extent().x0 >= 0


def test_each_library_has_one_color(result):
    made = plot.large_figure([result], "here")
    colors = [bar.get_facecolor()[:3] for bar in made.axes[1].patches]
    by_library = {}
    for contender, color in zip(result["contenders"], colors, strict=True):
        by_library.setdefault(contender["library"], set()).add(color)
    assert sorted(by_library) == ["neglog", "torch"]
    assert [len(some) for some in by_library.values()] == [1, 1]
    assert by_library["torch"] != by_library["neglog"]


def test_without_rich_a_table_is_text():
    made = terminal.plain(Table("title", ("", "number"), [("a", "1"), ("long", "1,000")]))
    assert list(made) == ["title", "      number", "a          1", "long   1,000"]


def test_the_chart_says_what_was_measured_where_and_how(tmp_path):
    chart = runpy.run_path(str(ROOT / "bench" / "tools" / "chart.py"))
    chart["main"](picture=str(tmp_path / "speed.svg"))
    command = "python -m neglog bench cross_entropy --suite memory"
    processor = json.loads(chart["RESULTS"].read_text())["processor"]
    for path in (tmp_path / "speed.svg", ROOT / "docs" / "img" / "speed.svg"):
        texts = " ".join(ElementTree.parse(path).getroot().itertext())
        for part in (command, processor, "cross_entropy, float32", "milliseconds", "neglog"):
            assert part in texts


def test_the_title_stands_above_the_panels():
    made = figure.new_figure((6, 3), "heading", "subtitle")
    axes = made.add_subplot()
    axes.set_title("panel")
    drawn(made)
    lowest = min(text.get_window_extent().y0 for text in made.texts)
    assert axes.title.get_window_extent().y1 < lowest
