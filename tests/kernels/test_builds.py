"""What `neglog.kernels` offers, what importing it costs, and how it says which build runs."""

import json
import sys

import pytest

from neglog import kernels
from neglog.kernels import builds
from tests.support.processes import python


@pytest.fixture(autouse=True)
def fresh_choice():
    """The choice of a build is made once a process; each test here makes its own."""
    functions = (kernels.isa_builds, kernels.available, kernels.load)
    for function in functions:
        function.cache_clear()
    yield
    for function in functions:
        function.cache_clear()


def test_public_names():
    assert dir(kernels) == sorted(kernels.__all__)
    for name in kernels.__all__:
        assert getattr(kernels, name) is not None
    with pytest.raises(
        AttributeError, match=r"module 'neglog\.kernels' has no attribute 'nll_forwrd'"
    ):
        kernels.nll_forwrd  # noqa: B018


def test_importing_loads_no_kernel():
    code = "import sys, json, neglog.kernels; print(json.dumps(sorted(sys.modules)))"
    modules = json.loads(python(code).stdout)
    assert not {"torch", "numba", "numpy", "neglog.kernels.cython"} & set(modules)


def test_one_reason_is_said_once(monkeypatch):
    monkeypatch.setitem(sys.modules, "neglog.kernels.cython.cpu_level", None)
    state = kernels.available("cython")
    assert not state.usable
    assert state.why == "not built: neglog was installed without a C++ compiler"
    with pytest.raises(ImportError, match="the cython kernels cannot run: not built: neglog was"):
        kernels.load("nll", "cython")


def test_each_reason_is_said_once_with_its_levels(monkeypatch):
    """On a processor with less than the builds need."""
    monkeypatch.setattr(builds, "_processor_level", lambda: 1)
    assert kernels.isa_level() is None
    assert kernels.available("cython").why == (
        "x86_64_v4, x86_64_v3, x86_64_v2: the processor has x86-64-v1; "
        "generic: not built for this machine"
    )


def test_without_compiled_kernels_numba_warns_once(monkeypatch):
    monkeypatch.setitem(sys.modules, "neglog.kernels.cython.cpu_level", None)
    builds._warn_once_that_numba_runs.cache_clear()
    with pytest.warns(RuntimeWarning, match=r"Numba compiles .* \(not built: .*compiler\)") as said:
        loaded = [kernels.load(family).__name__ for family in ("nll", "pairs")]
    assert loaded == ["neglog.kernels.numba.nll", "neglog.kernels.numba.pairs"]
    assert len(said) == 1


def test_without_any_kernel_the_error_says_why(monkeypatch):
    monkeypatch.setitem(sys.modules, "neglog.kernels.cython.cpu_level", None)
    monkeypatch.setattr(builds, "find_spec", lambda name: None)
    with pytest.raises(
        ImportError, match=r"(?s)tried\n  cython: not built.*\n  numba: .*pip install"
    ):
        kernels.load("nll")


def refusing_to_load(monkeypatch, family, message):
    """Importing a family's compiled kernels raises ImportError, as the dynamic loader would."""
    real = builds.importlib.import_module

    def import_module(name):
        if name.endswith(f".{family}") and ".cython." in name:
            raise ImportError(message)
        return real(name)

    monkeypatch.setattr(builds.importlib, "import_module", import_module)


# The first kernels that are loaded decide which build runs, the second come later.
@pytest.mark.parametrize("family", ["nll", "pairs"])
def test_without_address_space_the_error_is_of_memory_and_passes(monkeypatch, family):
    with monkeypatch.context() as changes:
        message = "nll.so: failed to map segment from shared object"
        refusing_to_load(changes, family, message)
        with pytest.raises(MemoryError, match=f"no memory to load .*{family}: {message}"):
            kernels.load(family)
    assert ".cython." in kernels.load(family).__name__


def test_compiled_kernels_that_do_not_load_say_why(monkeypatch):
    refusing_to_load(monkeypatch, "pairs", "undefined symbol: GOMP_parallel")
    with pytest.raises(ImportError, match=r"pairs for \w+ do not load.*GOMP.*'numba'"):
        kernels.load("pairs")


def test_builds_that_do_not_load_leave_the_work_to_numba(monkeypatch):
    refusing_to_load(monkeypatch, "nll", "undefined symbol: GOMP_parallel")
    assert "does not load: undefined symbol" in kernels.available("cython").why
    builds._warn_once_that_numba_runs.cache_clear()
    with pytest.warns(RuntimeWarning, match="does not load: undefined symbol"):
        assert kernels.load("nll").__name__ == "neglog.kernels.numba.nll"


def test_bad_names(monkeypatch):
    with pytest.raises(ValueError, match="backend: expected one of cython, numba, got 'gpu'"):
        kernels.available("gpu")
    monkeypatch.setenv("NEGLOG_ISA", "mmx")
    with pytest.raises(ValueError, match=r"NEGLOG_ISA: expected one of x86_64_v4, .*, got 'mmx'"):
        kernels.isa_builds()
