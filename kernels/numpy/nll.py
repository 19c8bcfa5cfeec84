"""The kernels on NumPy arrays: checks, memory, and the addresses they want. No torch."""

from __future__ import annotations

import operator
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from neglog.kernels import load
from neglog.kernels.memory import large_buffer
from neglog.kernels.threads import checked

INT64_MAX = 2**63 - 1
DTYPE_CODES = {"float32": 0, "float64": 1, "bfloat16": 2, "float16": 3}


class NLL(NamedTuple):
    """Losses and log-sum-exps by row, (N,); lse + lse_low is the log-sum-exp to twice the digits.

    total_weight divides the sum for a mean. correct and entropy are None unless stats are asked.
    """

    loss: NDArray
    lse: NDArray
    lse_low: NDArray
    total_weight: float
    correct: NDArray[np.bool_] | None
    entropy: NDArray | None


class _Problem(NamedTuple):
    """The arguments that forward, backward and fused share, and the arrays they point into."""

    arguments: tuple
    total_weight: float
    real: type
    logits: NDArray
    keep_alive: tuple


def address(array: NDArray | None) -> int:
    return 0 if array is None else array.ctypes.data


def rows_of(name: str, array: ArrayLike) -> tuple[NDArray, int]:
    """(N, V) with adjacent columns, and its dtype's code; copied only if its columns are apart."""
    a = np.asarray(array)
    if a.ndim != 2:
        raise ValueError(f"{name}: expected shape (N, V), got {a.shape}")
    code = DTYPE_CODES.get(a.dtype.name)
    if code is None:
        raise TypeError(f"{name}: expected one of {', '.join(DTYPE_CODES)}, got {a.dtype}")
    if not a.flags.aligned or (a.shape[1] > 1 and a.strides[1] != a.itemsize):
        a = np.ascontiguousarray(a)
    if a.strides[0] % a.itemsize or not a.dtype.isnative:
        a = np.ascontiguousarray(a, a.dtype.newbyteorder("="))
    return a, code


def _problem(
    kernel,
    logits: ArrayLike,
    target: ArrayLike,
    weight: ArrayLike | None,
    ignore_index: int,
    label_smoothing: float,
    logit_scale: float,
    softcap: float | None,
    z_loss: float,
) -> _Problem:
    x, code = rows_of("logits", logits)
    rows, vocab = x.shape
    real = np.float64 if code == 1 else np.float32
    t = np.asarray(target)
    if t.ndim == 2:
        if t.shape != x.shape:
            raise ValueError(f"target: expected the logits' shape {x.shape}, got {t.shape}")
        t = rows_of("target", t.astype(x.dtype, copy=False))[0]
    elif t.shape != (rows,):
        raise ValueError(f"target: expected shape {(rows,)} or {x.shape}, got {t.shape}")
    elif t.dtype.kind not in "iu":
        raise TypeError(f"target: expected integers for shape (N,), got {t.dtype}")
    elif t.dtype == np.uint64 and (t > INT64_MAX).any():  # would turn negative
        raise IndexError(f"target {t.max()} is out of range: expected 0 <= target < {vocab}")
    else:
        t = np.ascontiguousarray(t, np.int64)
    w = None if weight is None else np.ascontiguousarray(weight, real)
    if w is not None and w.shape != (vocab,):
        raise ValueError(f"weight: expected shape {(vocab,)}, got {w.shape}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing: expected 0 <= value <= 1, got {label_smoothing}")
    if softcap is not None and not 0 < softcap < np.inf:
        raise ValueError(f"softcap: expected a finite number above 0 or None, got {softcap}")
    try:
        ignore_index = operator.index(ignore_index)
    except TypeError:
        raise TypeError(f"ignore_index: expected an integer, got {ignore_index!r}") from None
    index, probs = (t, None) if t.ndim == 1 else (None, t)
    total = kernel.total_weight(
        rows, vocab, address(index), address(probs), address(w), ignore_index, code
    )
    probs_stride = 0 if probs is None else probs.strides[0] // probs.itemsize
    arguments = (
        code, rows, vocab, address(x), x.strides[0] // x.itemsize,
        address(index), address(probs), probs_stride,
        address(w), ignore_index, label_smoothing, logit_scale, softcap or 0.0, z_loss,
    )  # fmt: skip
    return _Problem(arguments, total, real, x, (x, t, w))


def new_gradient(logits: NDArray) -> NDArray:
    buffer = large_buffer(logits.size * logits.itemsize)
    if buffer is None:
        return np.empty(logits.shape, logits.dtype)
    return np.ndarray(logits.shape, logits.dtype, buffer=buffer)


def _overlaps_inputs(out: NDArray, problem: _Problem) -> bool:
    logits, *others = problem.keep_alive
    if any(array is not None and np.may_share_memory(out, array) for array in others):
        return True
    same = out.ctypes.data == logits.ctypes.data and out.strides == logits.strides
    return not same and np.may_share_memory(out, logits)


def _stats(problem: _Problem, wanted: bool) -> tuple[NDArray | None, NDArray | None]:
    rows = problem.arguments[1]
    if not wanted:
        return None, None
    return np.empty(rows, bool), np.empty(rows, problem.real)


def nll_forward(
    logits: ArrayLike,
    target: ArrayLike,
    *,
    weight: ArrayLike | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    stats: bool = False,
    threads: int | None = None,
    backend: str | None = None,
) -> NLL:
    """Negative log-likelihood of each row's target under softmax of its logits.

    logits: (N, V) float32, float64, float16 or (from ml_dtypes) bfloat16; any row stride.
    target: (N,) integers, `ignore_index` meaning "skip this row", or (N, V) probabilities.
    weight: (V,) class weights. Other options as in neglog.cross_entropy.
    Losses are float32, float64 for float64 logits.

    Raises IndexError for a target out of range, ValueError and TypeError for shapes and dtypes.
    """
    kernel = load("nll", backend)
    problem = _problem(
        kernel, logits, target, weight, ignore_index, label_smoothing, logit_scale, softcap, z_loss
    )
    rows = problem.arguments[1]
    loss, lse, low = (np.empty(rows, problem.real) for _ in range(3))
    correct, entropy = _stats(problem, stats)
    kernel.forward(
        *problem.arguments, address(loss), address(lse), address(low), address(correct),
        address(entropy), checked(threads),
    )  # fmt: skip
    return NLL(loss, lse, low, problem.total_weight, correct, entropy)


def nll_backward(
    grad: ArrayLike,
    result: NLL,
    logits: ArrayLike,
    target: ArrayLike,
    *,
    weight: ArrayLike | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    grad_lse: ArrayLike | None = None,
    threads: int | None = None,
    backend: str | None = None,
) -> NDArray:
    """The gradient of the logits, (N, V), given the gradient of the losses of `nll_forward`.

    grad: a scalar or (N,); for a mean pass 1 / result.total_weight.
    grad_lse: (N,), the gradient of the log-sum-exps, if they were used too.
    """
    kernel = load("nll", backend)
    problem = _problem(
        kernel, logits, target, weight, ignore_index, label_smoothing, logit_scale, softcap, z_loss
    )
    rows, vocab = problem.arguments[1:3]
    for name, kept in (("lse", result.lse), ("lse_low", result.lse_low)):
        if kept.shape != (rows,) or kept.dtype != problem.real:
            raise ValueError(
                f"result.{name}: expected shape {(rows,)} and {np.dtype(problem.real)}, those of "
                f"these logits, got {kept.shape} and {kept.dtype}"
            )
    upstream = np.ascontiguousarray(np.broadcast_to(np.asarray(grad, problem.real), (rows,)))
    through_lse = None if grad_lse is None else np.ascontiguousarray(grad_lse, problem.real)
    if through_lse is not None and through_lse.shape != (rows,):
        raise ValueError(f"grad_lse: expected shape {(rows,)}, got {through_lse.shape}")
    out = new_gradient(problem.logits)
    kernel.backward(
        *problem.arguments, address(result.lse), address(result.lse_low), address(upstream), 1,
        1.0, address(through_lse), address(out), vocab, checked(threads),
    )  # fmt: skip
    return out


def nll_forward_backward(
    logits: ArrayLike,
    target: ArrayLike,
    *,
    weight: ArrayLike | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    stats: bool = False,
    grad_scale: float = 1.0,
    out: NDArray | None = None,
    threads: int | None = None,
    backend: str | None = None,
) -> tuple[NLL, NDArray]:
    """Losses and, in the same pass, the gradient of `grad_scale` times their sum.

    out: where the gradient goes, (N, V) of the logits' dtype; it may be `logits` themselves, which
    are then overwritten. A new array if None.
    """
    kernel = load("nll", backend)
    problem = _problem(
        kernel, logits, target, weight, ignore_index, label_smoothing, logit_scale, softcap, z_loss
    )
    x = problem.logits
    if out is None:
        out = new_gradient(x)
    elif not isinstance(out, np.ndarray):
        raise TypeError(f"out: expected an array, got {type(out).__name__}")
    elif out.shape != x.shape or out.dtype != x.dtype:
        raise ValueError(f"out: expected {x.shape} {x.dtype}, got {out.shape} {out.dtype}")
    elif not (out.flags.c_contiguous and out.flags.writeable):
        raise ValueError("out: expected a writeable array with contiguous rows")
    elif _overlaps_inputs(out, problem):
        raise ValueError(
            "out: expected an array of its own or the logits themselves, got one that "
            "shares memory with an input"
        )
    loss, lse = (np.empty(len(x), problem.real) for _ in range(2))
    correct, entropy = _stats(problem, stats)
    kernel.forward_backward(
        *problem.arguments, address(loss), address(lse), address(correct), address(entropy),
        grad_scale, address(out), x.shape[1], checked(threads),
    )  # fmt: skip
    return NLL(loss, lse, np.zeros_like(lse), problem.total_weight, correct, entropy), out
