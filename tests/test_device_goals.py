"""The goals of bench/device.py, on invented rows."""

import importlib
import sys
from pathlib import Path

import pytest


@pytest.fixture
def goals(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "bench")
    yield importlib.import_module("goals")
    for name in ("goals", "measure"):
        del sys.modules[name]


def row(case, way, **fields):
    return {"case": case, "way": way, "ms": 1.0, "GB/s": 1.0, "peak MB": 1.0, **fields}


def full_rows(goals):
    """Rows of an invented run in which each goal is met just so."""
    rows = []
    for shape, three in (
        (goals.LARGE, (90, 85, 85)), (goals.IMAGES, (75,) * 3), (goals.ODD, (75,) * 3)
    ):  # fmt: skip
        rows.append(row(goals.nll_case(shape), "copy", **{"GB/s": 100.0}))
        for part, rate in zip((goals.FORWARD, goals.BOTH, goals.IN_PLACE), three, strict=True):
            rows.append(row(goals.nll_case(shape, part), "neglog", **{"GB/s": float(rate)}))
        both, in_place = (goals.nll_case(shape, part) for part in (goals.BOTH, goals.IN_PLACE))
        rows += [row(both, "quack-kernels"), row(in_place, "quack-kernels")]
        rows += [
            row(both, "torch.compile") | {"ms": 1.3},
            row(in_place, "liger-kernel") | {"ms": 2.0},
        ]
    sizes = {"peak MB": goals.GIB + 1084.0, "gradients MB": 1084.0}
    for case, ms in (
        (goals.linear_case(goals.LINEAR, 1.0), 17.3), (goals.linear_case(goals.LINEAR, 0.15), 3.2),
        (goals.clip_case(goals.CLIP), 44.0), (goals.clip_case(goals.MILLION), 15000.0),
    ):  # fmt: skip
        rows.append(row(case, "neglog", **sizes) | {"ms": ms})
    return rows


def test_goals_that_are_met_just_so(goals):
    results = goals.evaluate(full_rows(goals))
    assert len(results) == 18
    assert [result["goal"] for result in results if result["met"] is not True] == []


def missed(goals, rows):
    return {result["goal"] for result in goals.evaluate(rows) if result["met"] is False}


def test_each_row_that_is_worse_misses_a_goal_and_each_goal_can_be_missed(goals):
    seen, count = set(), len(full_rows(goals))
    for index in range(count - 1):  # of the last nothing is asked but that it completes
        rows = full_rows(goals)
        ours = 1.01 if rows[index]["way"] == "neglog" else 0.99
        rows[index] |= {"ms": rows[index]["ms"] * ours, "GB/s": rows[index]["GB/s"] / ours}
        worse = missed(goals, rows)
        assert worse, rows[index]
        seen |= worse
    rows = full_rows(goals)
    rows[-4]["peak MB"] += 1
    seen |= missed(goals, rows)
    rows[-1] = {"case": rows[-1]["case"], "way": "neglog", "failed": "no memory"}
    seen |= missed(goals, rows)
    assert seen == {result["goal"] for result in goals.evaluate(rows)}


def test_where_neglog_failed_its_goals_are_missed_and_where_another_did_they_are_open(goals):
    case = goals.linear_case(goals.LINEAR, 1.0)
    (time, memory) = [
        result
        for result in goals.evaluate([{"case": case, "way": "neglog", "failed": "no memory"}])
        if result["met"] is not None
    ]
    assert (time["met"], memory["met"]) == (False, False)
    assert (time["measured"], time["note"]) == (None, "failed")
    both = goals.nll_case(goals.LARGE, goals.BOTH)
    rows = [row(both, "neglog"), {"case": both, "way": "quack-kernels", "failed": "no"}]
    assert {result["met"] for result in goals.evaluate(rows)} == {None}


def test_nothing_measured_is_neither_met_nor_missed(goals):
    results = goals.evaluate([])
    assert {result["met"] for result in results} == {None}
    *_, last = goals.lines(results, "H200")
    assert last.rstrip().endswith("not measured")


def test_the_least_ratio_counts_and_only_that_of_bfloat16(goals):
    rows = full_rows(goals)
    slow = goals.nll_case(goals.ODD, goals.BOTH, "float32")
    rows += [row(slow, "neglog"), row(slow, "torch.compile") | {"ms": 0.1}]
    for one in rows:
        if one["way"] == "torch.compile" and str(goals.IMAGES[0]) in one["case"]:
            one["ms"] = 1.1
    (result,) = [r for r in goals.evaluate(rows) if "torch.compile" in r["goal"]]
    assert (result["measured"], result["met"]) == (1.1, False)
    assert result["note"] == "at nll 32768 x 1000, the least of 3"


def test_another_device_is_said_to_be_one(goals):
    first, *_ = goals.lines([], "NVIDIA H100 80GB HBM3")
    assert "H200, which this is not" in first
    first, *_ = goals.lines([], "NVIDIA H200")
    assert first == "Goals on NVIDIA H200"
