"""The goals of a GPU's run, and of small calls, on invented results."""

import pytest

from neglog.bench import goals
from neglog.bench.cases import OPS
from neglog.bench.goals import Where

FULL = Where("linear_cross_entropy", goals.LINEAR)
MASKED = FULL._replace(note="15% counted")
CLIP, MILLION = Where("clip_loss", goals.CLIP), Where("clip_loss", goals.MILLION)
ODD = Where("cross_entropy", goals.ODD)


def entry(name="neglog", **fields):
    return {"name": name, "total_ms": 1.0, "forward_ms": 1.0, "times_faster": {},
            "peak_extra_bytes": 0, "gradient_bytes": 0, **fields}  # fmt: skip


def result(where, *contenders, **left_out):
    return {**where._asdict(), "contenders": list(contenders), "left_out": left_out,
            "yardstick": {"ms": 1.0}}  # fmt: skip


def invented():
    """The results of a run in which each goal is met just so."""
    ratios = {"quack-kernels": 1.0, "compile": 1.3}
    in_place = {"quack-kernels": 1.0, "liger-kernel": 2.0}
    made = []
    for shape, (forward, both, over) in (
        (goals.LARGE, (90, 85, 85)), (goals.IMAGES, (75,) * 3), (goals.ODD, (75,) * 3)
    ):  # fmt: skip
        made.append(result(
            Where("cross_entropy", shape),
            entry(forward_ms=50 / forward, total_ms=100 / both, times_faster=dict(ratios)),
            entry("inplace", total_ms=100 / over, times_faster=dict(in_place)),
        ))  # fmt: skip
    sizes = {"peak_extra_bytes": 2**30 + 1000, "gradient_bytes": 1000}
    for where, ms in ((FULL, 17.3), (MASKED, 3.2), (CLIP, 44.0), (MILLION, 15000.0)):
        made.append(result(where, entry(total_ms=ms, **sizes)))
    return made


def judged(results, verdict):
    return {goal["goal"] for goal in goals.evaluate(results, goals.CUDA) if goal["met"] is verdict}


def test_goals_that_are_met_just_so():
    assert len(goals.CUDA) == 18
    assert len(judged(invented(), True)) == 18


def changes():
    """Each number that a goal is made of, a little worse; the last, of which nothing is asked but
    that there is one, fails."""
    for index in range(6):
        for number, contender in enumerate(invented()[index]["contenders"]):
            for key in ("forward_ms", "total_ms", "peak_extra_bytes"):
                yield index, number, key, None
            for other in contender["times_faster"]:
                yield index, number, "times_faster", other


def test_each_number_that_is_worse_misses_a_goal_and_each_goal_can_be_missed():
    seen = set()
    for index, number, key, other in changes():
        results = invented()
        contender = results[index]["contenders"][number]
        if other:
            contender["times_faster"][other] *= 0.99
        else:
            contender[key] *= 1.01
        missed = judged(results, False)
        assert len(missed) <= 1
        seen |= missed
    results = invented()
    results[-1] = result(MILLION, neglog="failed: no memory")
    assert judged(results, False) | seen == {goal.what for goal in goals.CUDA}


def test_where_neglog_failed_its_goals_are_missed_and_where_another_did_they_are_open():
    results = [result(FULL, neglog="failed: no memory")]
    evaluated = goals.evaluate(results, goals.CUDA)
    missed = [goal for goal in evaluated if goal["met"] is not None]
    assert [(goal["met"], goal["measured"], goal["note"]) for goal in missed] == [
        (False, None, "failed")
    ] * 2  # its time and its memory
    results = [result(FULL, entry("chunked"), neglog="skipped: no time left")]
    assert judged(results, None) == {goal.what for goal in goals.CUDA}


def test_a_case_that_could_not_be_prepared_misses_all_goals_of_its_shape():
    missed = judged([result(ODD, neglog="failed: no memory")], False)
    assert len(missed) == 3
    assert all("8192 x 50257" in what for what in missed)


def test_nothing_measured_is_neither_met_nor_missed():
    assert judged([], None) == {goal.what for goal in goals.CUDA}
    *_, last = goals.lines(goals.evaluate([], goals.CUDA))
    assert last.rstrip().endswith("not measured")


def test_the_least_ratio_counts_and_only_that_of_bfloat16():
    results = invented()
    results[1]["contenders"][0]["times_faster"]["compile"] = 1.1
    slow = entry(times_faster={"compile": 0.1})
    results.append(result(ODD._replace(dtype="float32"), slow))
    (goal,) = [g for g in goals.evaluate(results, goals.CUDA) if "compile's" in g["goal"]]
    assert (goal["measured"], goal["met"]) == (1.1, False)
    assert goal["note"] == "at 32768 x 1000, the least of 3"


def test_another_device_is_said_to_be_one():
    assert "H200, which this is not" in goals.heading("NVIDIA H100 80GB HBM3")
    assert goals.heading("NVIDIA H200") == "Goals on NVIDIA H200"


# At the bound, and beyond it.
@pytest.mark.parametrize(("share", "met"), [(1.0, True), (1.01, False)])
def test_the_goals_on_a_cpu(share, met):
    classes = OPS["cross_entropy"].suites["classes"]
    bounds = [(goals.TINY, 1.4), (goals.LESS_TINY, 0.9), *((shape, 0.5) for shape in classes)]
    results = [
        result(
            Where("cross_entropy", shape, "float32"),
            # Twice inverted, a ratio may end a rounding above what it was.
            entry(times_faster={"eager": 1 / (share * bound * (1 - 1e-9))}),
        )
        for shape, bound in bounds
    ]
    for op, dtype, bound in (
        ("linear_cross_entropy", "float32", 1.0), ("linear_cross_entropy", "bfloat16", 1.0),
        ("clip_loss", "float32", 1.0), ("clip_loss", "bfloat16", 1.05),
    ):  # fmt: skip
        where = Where(op, OPS[op].default, dtype)
        results.append(result(where, entry(yardsticks=share * bound)))
    judged = goals.evaluate(results, goals.CPU)
    assert [goal["met"] for goal in judged] == [met] * len(results)
