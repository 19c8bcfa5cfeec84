"""Fixtures that the tests share."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from neglog import dispatch, kernels
from tests.support.backends import BACKENDS, KERNELS
from tests.support.cuda_devices import device, dtype  # noqa: F401 - fixtures, by name
from tests.support.nll_cases import OPTIONS

# Every line of it needs a GPU with the kernels on it; bench/device.sh runs it there.
ON_GPU = dispatch.best("cuda") and torch.cuda.is_available()
collect_ignore = [] if ON_GPU else ["csrc/test_gpu.py"]
COMPILED = [build.name for build in kernels.isa_builds() if build.usable]


def clear_caches() -> None:
    for function in (kernels.isa_builds, kernels.available, kernels.load):
        function.cache_clear()


@pytest.fixture(params=[*COMPILED, *(["numba"] if "numba" in KERNELS else [])])
def every_build(request, monkeypatch) -> Iterator[str]:
    """Each ISA level that runs here, and the Numba version: the name of its backend.

    `kernels.load` of that name gives this build. For what the compiler decides: the instructions
    for each dtype, the rests of blocks, NaN and inf.
    """
    clear_caches()
    if request.param == "numba":
        yield "numba"
    else:
        monkeypatch.setenv("NEGLOG_ISA", request.param)
        kernel = kernels.load("nll", "cython")
        assert kernel.__name__ == f"neglog.kernels.cython.{request.param}.nll"
        yield "cython"
    monkeypatch.undo()
    clear_caches()


@pytest.fixture(params=KERNELS)
def kernel_backend(request) -> Iterator[str]:
    """The best compiled build, and the Numba version, demanded. For what the sources decide: what
    an option does, derivatives, memory, threads."""
    with dispatch.use(request.param):
        yield request.param


@pytest.fixture(params=BACKENDS)
def backend(request) -> Iterator[str]:
    """These two and torch, demanded. Where the formula in torch's ops is a third answer: the losses
    over embeddings, options that torch has not, and what composes several ops."""
    with dispatch.use(request.param):
        yield request.param


@pytest.fixture(params=[name for name in BACKENDS if name != "numba"])
def compiled_or_torch(request) -> Iterator[str]:
    """The best compiled build, or the formula. For Python above the ops, where Numba's backend is
    a word that is handed down."""
    with dispatch.use(request.param):
        yield request.param


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20240817)


@pytest.fixture(params=OPTIONS.values(), ids=OPTIONS.keys())
def options(request) -> dict:
    return dict(request.param)
