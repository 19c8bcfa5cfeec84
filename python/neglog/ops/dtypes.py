"""The dtypes of the ops: which the kernels take, and in which they compute."""

from __future__ import annotations

from ctypes import c_float

import torch
from torch import Tensor

# As the kernels number them (kernels/cython/nll.pyx).
DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that losses, weights and log-sum-exps of such scores are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def softcap_in(real: torch.dtype, softcap: float) -> float:
    """A softcap where `real` is computed in, 0 for none; the kernels have the same rule. Beyond the
    dtype's range a cap is none: as inf it would make inf * 0. As 0 it would make 0 / 0."""
    limits = torch.finfo(real)
    if softcap == 0 or softcap > limits.max:
        return 0.0
    return max(softcap, limits.tiny)


def divides_late(dtype: torch.dtype) -> bool:
    """Whether a mean's divisor waits for the backward. In float16 a gradient divided by thousands
    of rows is below the smallest number, and a loss scale that comes after cannot bring it back."""
    return dtype == torch.float16


def rounded(value: float, dtype: torch.dtype) -> float:
    """As a tensor of the accumulation dtype holds it. An eager backward has the number itself, that
    of the registered op a tensor: so they divide by the same."""
    return value if dtype == torch.float64 else c_float(value).value


def number(value: float, dtype: torch.dtype) -> Tensor:
    """() on the CPU, whatever torch.set_default_device says: its memory may be written. Inf where
    the value is beyond the dtype's range."""
    try:
        return torch.scalar_tensor(value, dtype=dtype, device="cpu")
    except RuntimeError:  # it makes no inf of a finite number
        return torch.scalar_tensor(rounded(value, dtype), dtype=dtype, device="cpu")


def quotient(numerator: float, divisor: float) -> float:
    """Division as tensors do it: 0 / 0 is NaN (a mean over nothing), x / 0 infinite."""
    return numerator / divisor if divisor else numerator * float("inf")
