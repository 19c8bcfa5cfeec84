"""Where the CUDA kernels are tested: on a GPU and, emulated, on the CPU; their error budgets."""

from typing import Any, NamedTuple

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from neglog import dispatch
from neglog.ops.linear_nll import cuda as linear_cuda
from neglog.ops.pairs.cuda import CudaTiles
from neglog.tiles import gemm
from tests.support import emulated

ON_GPU = dispatch.best("cuda") if torch.cuda.is_available() else None
DEVICES = [*(["emulated"] if emulated.AVAILABLE else []), *(["cuda"] if ON_GPU else [])]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Largest errors relative to 1 + the largest number: of losses, and of gradients, rounded once.
LOSS = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-6, torch.float16: 2e-6}
GRADIENT = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}
NONE, MEAN, SUM = 0, 1, 2
# label_smoothing, logit_scale, softcap, z_loss
OPTIONS = {
    "plain": (0.0, 1.0, 0.0, 0.0),
    "smoothing": (0.1, 1.0, 0.0, 0.0),
    "scaled": (0.0, 0.7, 0.0, 0.1),
    "all": (0.2, 0.7, 5.0, 0.1),
}


class Device(NamedTuple):
    name: str  # of torch's device
    ops: Any


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch):
    """Where tensors lie, and the ops that work there; the schedules over them use those too."""
    # A GPU's tiles have the dtype of their operands; so have those they are compared with.
    monkeypatch.setattr(gemm, "float32_is_faster", lambda dtype: False)
    if request.param == "cuda":
        return Device("cuda", torch.ops.neglog)
    ops = emulated.operators()
    monkeypatch.setattr(CudaTiles, "ops", ops)
    monkeypatch.setattr(linear_cuda, "ops", ops)
    return Device("cpu", ops)


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request):
    return request.param


def real_of(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def off(found, expected):
    """The largest error relative to 1 + the largest finite number; NaN and inf in their places."""
    found = found.detach().double().cpu()
    expected = torch.as_tensor(expected, dtype=torch.float64, device="cpu")
    assert found.shape == expected.shape
    assert torch.equal(found.isnan(), expected.isnan())
    finite = expected.isfinite()
    assert torch.equal(found[~finite].nan_to_num(), expected[~finite].nan_to_num())
    if not finite.any():
        return 0.0
    difference = (found - expected)[finite].abs().max()
    return float(difference / (1 + expected[finite].abs().max()))


class Waits(TorchDispatchMode):
    """Refuses what makes the host wait for the device, as a graph that is captured does."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "equal"), name
        return func(*args, **(kwargs or {}))
