"""What the tests share: the builds to run, the cases to run them on, and error budgets."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from neglog import dispatch, kernels
from tests.cuda_devices import device, dtype  # noqa: F401 - fixtures, by name

# Every line of it needs a GPU with the kernels on it; bench/device.sh runs it there.
collect_ignore = [] if dispatch.best("cuda") and torch.cuda.is_available() else ["test_gpu.py"]
COMPILED = [build.name for build in kernels.isa_builds() if build.usable]
BUILDS = [*COMPILED, *(["numba"] if kernels.available("numba").usable else [])]


def forget_choices() -> None:
    for function in (kernels.isa_builds, kernels.available, kernels.load):
        function.cache_clear()


@pytest.fixture(params=BUILDS)
def build(request, monkeypatch) -> str:
    """Each compiled ISA level that runs here, and the Numba twin; the backend's name is returned
    and `kernels.load` of it gives exactly that build."""
    forget_choices()
    if request.param == "numba":
        yield "numba"
    else:
        monkeypatch.setenv("NEGLOG_ISA", request.param)
        assert (
            kernels.load("nll", "cython").__name__ == f"neglog.kernels.cython.{request.param}.nll"
        )
        yield "cython"
    monkeypatch.undo()
    forget_choices()


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20240817)


# Options of nll, each with all it interacts with.
OPTIONS = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "weight": {"weight": True},
    "weight, smoothing, z_loss": {"weight": True, "label_smoothing": 0.3, "z_loss": 1e-2},
    "scale, softcap": {"logit_scale": 0.5, "softcap": 3.0},
    "all": {
        "weight": True,
        "label_smoothing": 0.2,
        "z_loss": 0.1,
        "logit_scale": 1.7,
        "softcap": 30.0,
    },
}


@pytest.fixture(params=OPTIONS.values(), ids=OPTIONS.keys())
def options(request) -> dict:
    return dict(request.param)


def drawn_weight(options: dict, vocab: int, rng: np.random.Generator) -> dict:
    """The options with weights drawn for this vocabulary where they are asked for."""
    if not options.get("weight"):
        return options
    return {**options, "weight": rng.uniform(0.1, 2.0, vocab).astype(np.float32)}


def relative_error(actual, expected) -> float:
    """The largest |actual - expected| / (1 + |expected|); NaN and inf must be in their places."""
    a, e = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert a.shape == e.shape, (a.shape, e.shape)
    np.testing.assert_array_equal(np.isnan(a), np.isnan(e))
    np.testing.assert_array_equal(np.where(np.isinf(a), a, 0), np.where(np.isinf(e), e, 0))
    finite = np.isfinite(e)
    if not finite.any():
        return 0.0
    return float(np.max(np.abs(a[finite] - e[finite]) / (1 + np.abs(e[finite]))))
