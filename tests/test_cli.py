"""The command line as a user meets it: exit codes, files, and what is refused."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neglog.benchmark import Mismatch, files
from neglog.benchmark.cases.cross_entropy import contenders, problem
from neglog.benchmark.measure import verify
from neglog.cli import main
from neglog.demo.text import Tokenizer, load

SMALL = (
    "bench",
    "cross_entropy",
    "--rows",
    "200",
    "--vocab",
    "1000",
    "--no-compile",
    "--repeat",
    "2",
)


def neglog(*arguments: str, code: str | None = None, cwd: Path | None = None, **environment: str):
    """Another process: its output is no terminal, and what it forbids itself stays forbidden."""
    command = ["-m", "neglog", *arguments] if code is None else ["-c", code]
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=cwd,
        env=os.environ | environment,
    )  # fmt: skip


def without(module: str, *arguments: str):
    """The command where a package is not installed."""
    code = (
        f"import sys; sys.modules[{module!r}] = None\n"
        f"from neglog.cli import main; sys.exit(main({list(arguments)!r}))"
    )
    return neglog(code=code)


def test_info_says_what_is_loaded_and_why():
    told = neglog("info")
    assert told.returncode == 0, told.stderr
    for name in ("cython", "numba", "torch", "cuda"):
        assert f"backend {name}" in told.stdout
    assert re.search(r"ISA level +x86_64_v\d|ISA level +generic", told.stdout)
    assert re.search(r"OpenMP +\S+gomp", told.stdout)
    older = neglog("info", NEGLOG_ISA="x86_64_v2")
    assert re.search(r"x86_64_v3 +NEGLOG_ISA asks for x86_64_v2", older.stdout)


@pytest.mark.parametrize("module", ["rich", "torch", "neglog.kernels.cpu"])
def test_info_needs_numpy_alone(module):
    told = without(module, "info")
    assert told.returncode == 0, told.stderr
    assert "backend cython" in told.stdout


@pytest.mark.parametrize("command", [("demo", "--quick"), SMALL])
@pytest.mark.parametrize("module", ["rich", "torch"])
def test_a_missing_package_is_named(command, module):
    refused = without(module, *command)
    assert refused.returncode == 2
    assert f"needs {module}: pip install 'neglog[demo]'" in refused.stderr


def test_an_unknown_backend_ends_the_bench():
    refused = neglog(*SMALL, NEGLOG_BACKEND="abacus")
    assert refused.returncode == 2
    assert "NEGLOG_BACKEND: unknown backend: 'abacus'" in refused.stderr


def test_bench_verifies_measures_and_writes(tmp_path):
    told = neglog(*SMALL, "--json", "b.json", "--plot", "b.png", cwd=tmp_path)
    assert told.returncode == 0, told.stderr
    report = json.loads((tmp_path / "b.json").read_text())
    (result,) = report["results"]
    names = [contender["name"] for contender in result["contenders"]]
    assert names[:4] == ["eager", "neglog", "new_memory", "inplace"]
    for contender in result["contenders"]:
        assert len(contender["total_seconds"]) == 2
        assert 0 <= contender["largest_relative_error"] < 1e-5
        assert 0 < contender["forward_ms"] <= contender["total_ms"]
        assert contender["name"] in told.stdout or contender["label"].strip() in told.stdout
    assert files.made_by_us(tmp_path / "b.png")
    assert files.made_by_us(tmp_path / "b.json")


def test_bench_of_a_small_shape_names_torch(tmp_path):
    path = tmp_path / "b.json"
    assert main([*SMALL[:2], "--rows", "8", "--vocab", "10", "--no-compile", "--repeat", "1",
                 "--json", str(path)]) == 0  # fmt: skip
    contender = json.loads(path.read_text())["results"][0]["contenders"][1]
    assert contender["label"] == "neglog (torch)"


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_bench_small_suite(dtype, capsys):
    assert main(["bench", "cross_entropy", "--suite", "small", "--repeat", "1",
                 "--dtype", dtype]) == 0  # fmt: skip
    assert "rows 512 x vocab 1,000" in capsys.readouterr().out


def test_a_wrong_gradient_is_no_match():
    shape = {"rows": 200, "vocab": 1000}
    made = problem(shape, "float32", 0)
    eager = contenders(False, shape)[0]
    verify(eager, made)
    wrong = eager._replace(loss=lambda x, t: eager.loss(x, t) + 1e-3 * x[0, 0])
    with pytest.raises(Mismatch, match="off the float64 oracle"):
        verify(wrong, made)
    with pytest.raises(Mismatch, match="expected cython, ran by none"):
        verify(eager._replace(backend="cython"), made)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--rows", "3", "--suite", "small"), "a suite brings its own shapes"),
        (("--json", "here.txt"), "expected a name that ends in .json"),
        (("--plot", "no/such/folder/b.png"), "is not a folder that can be written to"),
    ],
)
def test_bench_refuses_before_it_measures(arguments, message, capsys):
    assert main(["bench", "cross_entropy", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_no_file_of_the_user_is_overwritten(tmp_path, capsys):
    mine = tmp_path / "mine.png"
    mine.write_text("a picture of my cat")
    assert main(["demo", "--quick", "--out", str(mine)]) == 2
    assert "was not made by neglog; --force overwrites it" in capsys.readouterr().err
    assert mine.read_text() == "a picture of my cat"


def test_demo_trains_twice_alike_and_draws(tmp_path):
    told = neglog("demo", "--steps", "3", cwd=tmp_path)
    assert told.returncode == 0, told.stderr
    losses = re.findall(r"^(torch|neglog) +step +3/3 +loss ([\d.]+)", told.stdout, re.MULTILINE)
    assert [name for name, _ in losses] == ["torch", "neglog"]
    assert float(losses[0][1]) == pytest.approx(float(losses[1][1]), abs=2e-4)
    assert re.search(r"held-out perplexity", told.stdout)
    picture = tmp_path / "demo.png"
    assert files.made_by_us(picture)
    assert files.check_output(str(picture), ".png", force=False) == picture  # ours: no refusal


TOKENIZER = Tokenizer("the cat sat on the mat, the end.\n\nfrom cat import mat")


@settings(deadline=None)
@given(st.text())
def test_tokens_spell_every_text(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text
    assert TOKENIZER.decode(TOKENIZER.encode(text, spelled=0.5)) == text


def test_held_out_text_is_not_trained_on():
    data = load()
    assert int(data.train.max()) < len(data.tokenizer)
    held_out = data.tokenizer.decode(data.held_out.tolist())
    assert held_out not in data.tokenizer.decode(data.train.tolist())
    assert len(data.held_out) > 10_000
