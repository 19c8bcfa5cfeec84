"""nll on NumPy arrays: checks the arguments, allocates the results, and passes addresses."""

from __future__ import annotations

import operator
from types import ModuleType
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from neglog.kernels.builds import load
from neglog.kernels.memory import large_buffer
from neglog.kernels.threads import thread_count

INT64_MAX = 2**63 - 1
# The type that is computed in: np.float32 or np.float64.
RealType: TypeAlias = type[np.floating[Any]]
DTYPE_CODES = {"float32": 0, "float64": 1, "bfloat16": 2, "float16": 3}


class NLL(NamedTuple):
    """What nll_forward returns. Arrays are (N,), float32, or float64 for float64 logits.

    loss: the losses of the rows, 0 for an ignored one.
    lse, lse_low: the log-sum-exp of a row's scores is lse + lse_low, to twice the digits. Both are
        0 in an ignored row without stats=True: its logits are not read.
    total_weight: what to divide the sum of the losses by for a mean: the sum over the rows that
        are not ignored of token_weight and the weight of the target's class, multiplied, each 1
        where it is not given, and for probabilities the latter.
    correct, entropy: whether the target has the highest score, and the entropy of the row's
        softmax; None without stats=True.
    argmax: the first column with the highest score, or with a NaN; None without stats=True.
    """

    loss: NDArray
    lse: NDArray
    lse_low: NDArray
    total_weight: float
    correct: NDArray[np.bool_] | None
    entropy: NDArray | None
    argmax: NDArray[np.int64] | None


class _Problem(NamedTuple):
    """The arguments that all kernels share, and the arrays they point into."""

    arguments: tuple[Any, ...]
    total_weight: float
    real: RealType
    logits: NDArray
    counted: NDArray[np.bool_] | None  # None where all do
    arrays: tuple[NDArray | None, ...]  # logits, target, weights; keeps them alive


def array_of(name: str, value: ArrayLike) -> NDArray:
    """As an array. One with a mask is refused: its numbers where the mask is set would count."""
    if isinstance(value, np.ma.MaskedArray):
        ignored = "; a row whose target is ignore_index does not count"
        hint = ignored if name in ("logits", "target") else ""
        raise TypeError(f"{name}: expected an array without a mask, got a MaskedArray{hint}")
    try:
        return np.asarray(value)
    except ValueError as error:  # lists of lists of unlike lengths
        raise ValueError(f"{name}: expected an array; {error}") from None


def reals_of(
    name: str, value: ArrayLike, shapes: tuple[tuple[int, ...], ...], real: RealType
) -> NDArray:
    """As a new array of the type that is computed in, of one of some shapes: the last is named."""
    a = array_of(name, value)
    _check_real(name, a)
    if a.shape not in shapes:
        scalar = "a scalar or " if () in shapes else ""
        raise ValueError(f"{name}: expected {scalar}shape {shapes[-1]}, got {a.shape}")
    return np.array(a, real, order="C")


def _check_real(name: str, array: NDArray) -> None:
    if array.dtype.kind not in "fiub" and array.dtype.name not in DTYPE_CODES:
        raise TypeError(f"{name}: expected real numbers, got {array.dtype}")


def check_flag(name: str, value: Any) -> None:
    """True or False: any other object would stand for one of them by its truth, "no" for True."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")


def check_kind_of_result(result: Any, kind: type, function: str) -> None:
    if not isinstance(result, kind):
        got = type(result).__name__
        raise TypeError(f"result: expected the {kind.__name__} of {function}, got {got}")


def load_kernel(family: str, backend: Any) -> ModuleType:
    if backend is not None and not isinstance(backend, str):
        raise TypeError(f"backend: expected a str or None, got {type(backend).__name__}")
    return load(family, backend)


def number_of(name: str, value: Any, real: RealType, lowest: float = -np.inf) -> float:
    """A finite number of the type that is computed in, from `lowest`."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected a number, got {value!r}") from None
    except OverflowError:
        number = np.inf  # an int beyond float64
    if not abs(number) <= float(np.finfo(real).max):
        raise ValueError(f"{name}: expected a finite number of {np.dtype(real)}, got {number}")
    if number < lowest:
        raise ValueError(f"{name}: expected a number from {lowest:g}, got {number}")
    return number


def address(array: NDArray | None) -> int:
    """Where an array's numbers are in memory, 0 for None."""
    return 0 if array is None else array.ctypes.data


def rows_of(name: str, array: ArrayLike) -> tuple[NDArray, int]:
    """(N, V) whose rows are contiguous, and its dtype's code; a copy only where they are not."""
    a = array_of(name, array)
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


def _target_of(target: ArrayLike, logits: NDArray) -> NDArray:
    """(N,) int64, or (N, V) probabilities in the logits' dtype."""
    t, (rows, vocab) = array_of("target", target), logits.shape
    if t.ndim == 2:
        if t.shape != logits.shape:
            raise ValueError(f"target: expected the logits' shape {logits.shape}, got {t.shape}")
        _check_real("target", t)
        return rows_of("target", t.astype(logits.dtype, copy=False))[0]
    if t.shape != (rows,):
        raise ValueError(f"target: expected shape {(rows,)} or {logits.shape}, got {t.shape}")
    if t.dtype.kind not in "iu":
        raise TypeError(f"target: expected integers for shape (N,), got {t.dtype}")
    if t.dtype == np.uint64 and (t > INT64_MAX).any():  # as int64 it would be negative
        raise IndexError(f"target {t.max()} is out of range: expected 0 <= target < {vocab}")
    return np.ascontiguousarray(t, np.int64)


def _checked_options(
    real: RealType, label_smoothing: float, logit_scale: float, softcap: float | None, z_loss: float
) -> tuple[float, float, float, float]:
    """These four as numbers; a softcap of 0 is none."""
    smoothing = number_of("label_smoothing", label_smoothing, np.float64)
    if not 0.0 <= smoothing <= 1.0:
        raise ValueError(f"label_smoothing: expected 0 <= value <= 1, got {label_smoothing}")
    scale = number_of("logit_scale", logit_scale, real)
    return smoothing, scale, softcap_of("softcap", softcap), number_of("z_loss", z_loss, real, 0)


def softcap_of(name: str, softcap: float | None) -> float:
    """0 for none. Beyond float32 it is none too, which is the kernels' to say."""
    if softcap is None:
        return 0.0
    try:
        cap = number_of(name, softcap, np.float64)
    except ValueError:
        cap = 0.0
    if cap <= 0:
        raise ValueError(f"{name}: expected a finite number above 0 or None, got {softcap:g}")
    return cap


def ignore_index_of(ignore_index: Any) -> int:
    try:
        index = operator.index(ignore_index)
    except TypeError:
        raise TypeError(f"ignore_index: expected an integer, got {ignore_index!r}") from None
    if not -INT64_MAX - 1 <= index <= INT64_MAX:
        bits = index.bit_length()
        raise ValueError(f"ignore_index: expected an integer of int64, got one of {bits} bits")
    return index


def _problem(
    kernel: ModuleType,
    logits: ArrayLike,
    target: ArrayLike,
    weight: ArrayLike | None,
    token_weight: ArrayLike | None,
    ignore_index: int,
    label_smoothing: float,
    logit_scale: float,
    softcap: float | None,
    z_loss: float,
) -> _Problem:
    x, code = rows_of("logits", logits)
    rows, vocab = x.shape
    real: RealType = np.float64 if code == DTYPE_CODES["float64"] else np.float32
    t = _target_of(target, x)
    w = None if weight is None else reals_of("weight", weight, ((vocab,),), real)
    u = None if token_weight is None else reals_of("token_weight", token_weight, ((rows,),), real)
    options = _checked_options(real, label_smoothing, logit_scale, softcap, z_loss)
    ignore_index = ignore_index_of(ignore_index)
    index, probs = (t, None) if t.ndim == 1 else (None, t)
    total = kernel.total_weight(
        rows, vocab, address(index), address(probs), address(w), address(u), ignore_index, code
    )
    probs_stride = 0 if probs is None else row_stride(probs)
    arguments = (
        code, rows, vocab, address(x), row_stride(x),
        address(index), address(probs), probs_stride,
        address(w), address(u), ignore_index, *options,
    )  # fmt: skip
    counted = None if index is None else t != ignore_index
    if u is not None:
        counted = (u != 0) if counted is None else counted & (u != 0)
    return _Problem(arguments, total, real, x, counted, (x, t, w, u))


def new_gradient(logits: NDArray) -> NDArray:
    """An array of the logits' shape and dtype, of any content; large ones on huge pages."""
    buffer = large_buffer(logits.size * logits.itemsize)
    if buffer is None:
        return np.empty(logits.shape, logits.dtype)
    return np.ndarray(logits.shape, logits.dtype, buffer=buffer)


def _overlaps_inputs(out: NDArray, problem: _Problem, others: tuple[NDArray | None, ...]) -> bool:
    """Whether `out` shares memory with an input, unless it is the logits, element by element."""
    logits = problem.logits
    for array in (*problem.arrays[1:], *others):
        if array is not None and np.may_share_memory(out, array):
            return True
    same = out.ctypes.data == logits.ctypes.data and out.strides == logits.strides
    return not same and np.may_share_memory(out, logits)


def _gradient_in(out: NDArray | None, problem: _Problem, *others: NDArray | None) -> NDArray:
    """`out`, checked, or a new array. `others` are read while it is written."""
    x = problem.logits
    if out is None:
        return new_gradient(x)
    if not isinstance(out, np.ndarray):
        raise TypeError(f"out: expected an array, got {type(out).__name__}")
    array_of("out", out)
    if out.shape != x.shape or out.dtype != x.dtype:
        raise ValueError(f"out: expected {x.shape} {x.dtype}, got {out.shape} {out.dtype}")
    if not (out.flags.writeable and out.flags.aligned and _has_contiguous_rows(out)):
        raise ValueError(
            "out: expected a writeable, aligned array whose rows are contiguous, each after the "
            f"last, got strides {out.strides}"
        )
    if _overlaps_inputs(out, problem, others):
        raise ValueError(
            "out: expected an array of its own or the logits themselves, got one that "
            "shares memory with an input"
        )
    return out


def _has_contiguous_rows(a: NDArray) -> bool:
    """Whether the numbers of a row are adjacent; the rows of (N, V) may be apart."""
    (rows, columns), (down, across) = a.shape, a.strides
    apart = rows <= 1 or (down >= columns * a.itemsize and down % a.itemsize == 0)
    # Of no rows NumPy may say any strides.
    return apart and (columns <= 1 or rows == 0 or across == a.itemsize)


def row_stride(a: NDArray) -> int:
    """From a row to the next, in numbers."""
    return a.strides[0] // a.itemsize


def _stats(problem: _Problem, wanted: bool) -> tuple[NDArray | None, ...]:
    """Room for correct, entropy and argmax."""
    rows = problem.arguments[1]
    check_flag("stats", wanted)
    if not wanted:
        return None, None, None
    return np.empty(rows, bool), np.empty(rows, problem.real), np.empty(rows, np.int64)


def nll_forward(
    logits: ArrayLike,
    target: ArrayLike,
    *,
    weight: ArrayLike | None = None,
    token_weight: ArrayLike | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    stats: bool = False,
    threads: int | None = None,
    backend: str | None = None,
) -> NLL:
    """The losses -log softmax(z)[target] of rows, without gradients. Returns an `NLL`.

    logits: (N, V) float32, float64, float16 or (from ml_dtypes) bfloat16. Its rows may be apart in
        memory. Everything is computed in float32, float64 logits in float64.
    target: (N,) integers in [0, V), or `ignore_index` for a row that does not count; or (N, V)
        probabilities, cast to the logits' dtype.
    weight: (V,) a weight w for each class.
    token_weight: (N,) what each row's loss is multiplied by. A row whose number is 0 is ignored.
    label_smoothing: eps in [0, 1].
    logit_scale, softcap: the scores are z = logit_scale * logits, with a softcap
        z = softcap * tanh(logit_scale * logits / softcap).
    z_loss: adds z_loss * w_t * logsumexp(z)^2 to a row's loss; for probabilities w_t is 1.
    stats: also returns `correct`, `entropy` and `argmax`.
    threads: how many threads to use, no more than the cores or 64; every core if None.
    backend: "cython" or "numba"; the first that can run if None.

    With log p = z - logsumexp(z), the loss of a row whose target is t is
    -(1 - eps) * w[t] * log p[t] - eps / V * sum(w * log p); for probabilities q it is
    -sum(w * ((1 - eps) * q + eps / V) * log p).

    Raises IndexError for a target out of range, ValueError for a wrong shape or value, TypeError
    for a wrong dtype, ImportError if the backend cannot run.
    """
    kernel = load_kernel("nll", backend)
    problem = _problem(
        kernel, logits, target, weight, token_weight, ignore_index, label_smoothing, logit_scale,
        softcap, z_loss,
    )  # fmt: skip
    rows = problem.arguments[1]
    loss, lse, low = (np.empty(rows, problem.real) for _ in range(3))
    of_rows = _stats(problem, stats)
    kernel.forward(
        *problem.arguments, address(loss), address(lse), address(low), *map(address, of_rows),
        thread_count(threads),
    )  # fmt: skip
    return NLL(loss, lse, low, problem.total_weight, *of_rows)


def nll_backward(
    grad: ArrayLike,
    result: NLL,
    logits: ArrayLike,
    target: ArrayLike,
    *,
    weight: ArrayLike | None = None,
    token_weight: ArrayLike | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    grad_lse: ArrayLike | None = None,
    grad_entropy: ArrayLike | None = None,
    out: NDArray | None = None,
    threads: int | None = None,
    backend: str | None = None,
) -> NDArray:
    """The gradient of the logits, (N, V) of their dtype, given those of nll_forward's losses.

    grad: a number, or (N,): the gradient of each row's loss. 1.0 gives the gradient of the sum of
        the losses, 1 / result.total_weight that of their mean.
    result: what nll_forward returned for the same arguments. logits, target and the options are to
        be as they were there.
    grad_lse: a number, or (N,): the gradient of each row's log-sum-exp, if it was used too. It is
        taken as 0 where nll_forward wrote none: in ignored rows, without stats=True.
    grad_entropy: a number, or (N,): the gradient of each row's entropy. ValueError if `result` is
        without stats.
    out: as for nll_forward_backward.

    Raises what nll_forward does, ValueError if `result` does not fit the logits, and TypeError if
    it is no NLL.
    """
    check_kind_of_result(result, NLL, "nll_forward")
    kernel = load_kernel("nll", backend)
    problem = _problem(
        kernel, logits, target, weight, token_weight, ignore_index, label_smoothing, logit_scale,
        softcap, z_loss,
    )  # fmt: skip
    rows = problem.arguments[1]
    _check_result(result, rows, np.dtype(problem.real))
    upstream = _upstream("grad", grad, problem)
    through_lse = None if grad_lse is None else _upstream("grad_lse", grad_lse, problem)
    if through_lse is not None and problem.counted is not None and result.correct is None:
        through_lse = np.where(problem.counted, through_lse, problem.real(0))
    through_entropy = None
    if grad_entropy is not None:
        through_entropy = _upstream("grad_entropy", grad_entropy, problem)
        if result.entropy is None:
            raise ValueError("result.entropy: expected that of nll_forward(stats=True), got None")
    out = _gradient_in(out, problem, result.lse, result.lse_low, result.entropy)
    kernel.backward(
        *problem.arguments, address(result.lse), address(result.lse_low), address(upstream), 1,
        1.0, address(through_lse), address(through_entropy), address(result.entropy),
        address(out), row_stride(out), thread_count(threads),
    )  # fmt: skip
    return out


def _check_result(result: NLL, rows: int, dtype: np.dtype[Any]) -> None:
    """That an NLL is of as many rows and of the type that is computed in."""
    for name, kept in (("lse", result.lse), ("lse_low", result.lse_low)):
        if kept.shape != (rows,) or kept.dtype != dtype:
            raise ValueError(
                f"result.{name}: expected shape {(rows,)} and dtype {dtype}, as nll_forward of "
                f"these logits returns, got shape {kept.shape} and dtype {kept.dtype}"
            )


def _upstream(name: str, value: ArrayLike, problem: _Problem) -> NDArray:
    """A gradient of each row: (N,), or one number for all."""
    rows = problem.arguments[1]
    a = reals_of(name, value, ((), (1,), (rows,)), problem.real)
    return np.ascontiguousarray(np.broadcast_to(a, (rows,)))


def nll_forward_backward(
    logits: ArrayLike,
    target: ArrayLike,
    *,
    weight: ArrayLike | None = None,
    token_weight: ArrayLike | None = None,
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
    """nll_forward and nll_backward in one pass. Returns an `NLL` and the gradient of the logits.

    Each row's gradient is formed while the row is in cache, so the logits are read from memory once
    and not twice. A gradient of more than 64 MB that is not over the logits is written past the
    caches. Its bits are those of the two calls.

    grad_scale: the gradient is that of grad_scale times the losses' sum, so by default that of the
        sum, not of the mean. For a mean pass 1 / (the number of rows that are not ignored).
    out: where the gradient is written, an (N, V) array of the logits' dtype. Its rows are
        contiguous, and may be apart in memory. It may be `logits` itself, which is then
        overwritten. A new array if None.

    The other arguments and errors are those of nll_forward. ValueError if `out` has another shape
    or dtype, or shares memory with an input in another way.
    """
    kernel = load_kernel("nll", backend)
    problem = _problem(
        kernel, logits, target, weight, token_weight, ignore_index, label_smoothing, logit_scale,
        softcap, z_loss,
    )  # fmt: skip
    x = problem.logits
    scale = number_of("grad_scale", grad_scale, problem.real)
    out = _gradient_in(out, problem)
    loss, lse, lse_low = (np.empty(len(x), problem.real) for _ in range(3))
    of_rows = _stats(problem, stats)
    kernel.forward_backward(
        *problem.arguments, address(loss), address(lse), address(lse_low),
        *map(address, of_rows), scale, address(out), row_stride(out), thread_count(threads),
    )  # fmt: skip
    return NLL(loss, lse, lse_low, problem.total_weight, *of_rows), out
