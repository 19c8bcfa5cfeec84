"""`neglog bench`: what it measures, prints and writes, for every loss and both suites."""

import json

import pytest

from neglog import dispatch
from neglog.bench import files, goals
from neglog.bench.cases import OPS
from neglog.cli import main

# Small enough for a second each. nt_xent's two views must be of equal number, and sup_con's rows
# have labels of four.
SHAPES = {"rows": 64, "vocab": 300, "features": 16}


def bench(op, *arguments):
    sizes = [f"--{name}={SHAPES[name]}" for name in OPS[op].default]
    return main(["bench", op, *sizes, "--no-compile", "--repeat=2", *arguments])


def test_it_checks_measures_and_writes(tmp_path, capsys):
    table, picture = str(tmp_path / "b.json"), str(tmp_path / "b.png")
    assert bench("cross_entropy", "--json", table, "--plot", picture) == 0
    (result,) = json.loads((tmp_path / "b.json").read_text())["results"]
    names = [contender["name"] for contender in result["contenders"]]
    assert names[:6] == ["eager", "neglog", "third", "changing", "new_memory", "inplace"]
    printed = capsys.readouterr().out
    for contender in result["contenders"]:
        assert len(contender["total_seconds"]) == len(contender["forward_seconds"]) == 2
        assert 0 <= contender["largest_relative_error"] < 1e-5
        assert contender["forward_ms"] > 0
        assert contender["total_ms"] > 0
        assert contender["label"].strip() in printed
    assert files.made_by_us(tmp_path / "b.png")
    assert files.made_by_us(tmp_path / "b.json")


@pytest.mark.parametrize("op", [op for op in OPS if op != "cross_entropy"])
def test_every_loss_is_measured(op, tmp_path, capsys):
    table, picture = tmp_path / "b.json", tmp_path / "b.png"
    assert bench(op, "--json", str(table), "--plot", str(picture)) == 0
    (result,) = json.loads(table.read_text())["results"]
    assert result["op"] == op
    assert {"eager", "neglog"} <= {contender["name"] for contender in result["contenders"]}
    assert result["yardstick"]["rate"] > 0


def test_no_line_is_folded_where_there_is_no_terminal(capsys):
    assert bench("clip_loss") == 0
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "given room" in line]
    assert row.rstrip().endswith("MB")


def test_the_backend_that_ran_is_in_the_table(capsys):
    with dispatch.use("numba"):
        assert bench("linear_cross_entropy") == 0
    assert "neglog (numba)" in capsys.readouterr().out


@pytest.fixture
def two_shapes_a_suite(monkeypatch):
    assert goals.CPU  # made of the shapes when it is imported: of those that stand in OPS
    small = ({"rows": 8, "vocab": 10}, {"rows": 32, "vocab": 100})
    classes = ({"rows": 200, "vocab": 2}, {"images": 2, "classes": 3, "height": 8, "width": 5})
    op = OPS["cross_entropy"]._replace(suites={"small": small, "classes": classes})
    monkeypatch.setitem(OPS, "cross_entropy", op)


# float32 has the goal, bfloat16 the fewest digits.
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("suite", ["small", "classes"])
def test_suites_of_brief_calls(suite, dtype, two_shapes_a_suite, tmp_path, capsys):
    picture = tmp_path / "b.png"
    command = ["bench", "cross_entropy", f"--suite={suite}", "--repeat=1", f"--dtype={dtype}"]
    assert main([*command, "--no-compile", "--plot", str(picture)]) == 0
    printed = capsys.readouterr().out
    last = {"small": "rows 32 x vocab 100", "classes": "classes 3 x height 8 x width 5"}[suite]
    assert last in printed
    assert files.made_by_us(picture)
    goal = [line for line in printed.splitlines() if "time over torch's" in line]
    assert len(goal) == (suite == "small" and dtype == "float32")
    assert all("<= 1.4 x" in line and line.rstrip().endswith("met") for line in goal)


def test_a_suite_that_a_loss_has_not(capsys):
    assert main(["bench", "clip_loss", "--suite=classes"]) == 2
    assert "clip_loss has no suite classes: large, small" in capsys.readouterr().err


def test_the_help_says_what_each_suite_is(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "small: calls whose fixed cost decides;" in printed
    assert "class axis is not the last (cross_entropy)" in printed
