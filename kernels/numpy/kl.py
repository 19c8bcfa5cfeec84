"""kl on NumPy arrays: checks the arguments, allocates the results, and passes addresses."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from neglog.kernels.numpy.nll import (
    DTYPE_CODES,
    INT64_MAX,
    RealType,
    address,
    array_of,
    check_flag,
    ignore_index_of,
    load_kernel,
    new_gradient,
    number_of,
    reals_of,
    row_stride,
    rows_of,
    softcap_of,
)
from neglog.kernels.threads import thread_count


class KL(NamedTuple):
    """What kl_forward returns. Arrays are (N,), float32, or float64 for float64 logits.

    loss: token_weight * (soft_weight * divergence + hard_weight * cross_entropy), 0 for a row that
        is ignored, as the next two.
    divergence, cross_entropy: its parts; 0 where their weight is.
    total_weight: the sum of the token_weight of the rows that are not ignored.
    """

    loss: NDArray
    divergence: NDArray
    cross_entropy: NDArray
    total_weight: float


def kl_forward(
    logits: ArrayLike,
    teacher: ArrayLike,
    *,
    ids: ArrayLike | None = None,
    probabilities: bool = False,
    target: ArrayLike | None = None,
    token_weight: ArrayLike | None = None,
    ignore_index: int = -100,
    beta: float = 0.0,
    temperature: float = 1.0,
    soft_weight: float = 1.0,
    hard_weight: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    teacher_scale: float = 1.0,
    teacher_softcap: float | None = None,
    threads: int | None = None,
    backend: str | None = None,
) -> KL:
    """The divergence of each row's softmax from a teacher's. Returns a `KL`.

    Arguments and errors as in `kl_forward_backward`.
    """
    problem = _problem(
        logits, teacher, ids, probabilities, target, token_weight, ignore_index, beta, temperature,
        soft_weight, hard_weight, logit_scale, softcap, teacher_scale, teacher_softcap, backend,
    )  # fmt: skip
    return _run(problem, None, None, threads, backend)


def kl_forward_backward(
    logits: ArrayLike,
    teacher: ArrayLike,
    *,
    ids: ArrayLike | None = None,
    probabilities: bool = False,
    target: ArrayLike | None = None,
    token_weight: ArrayLike | None = None,
    ignore_index: int = -100,
    beta: float = 0.0,
    temperature: float = 1.0,
    soft_weight: float = 1.0,
    hard_weight: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    teacher_scale: float = 1.0,
    teacher_softcap: float | None = None,
    grad: ArrayLike = 1.0,
    threads: int | None = None,
    backend: str | None = None,
) -> tuple[KL, NDArray]:
    """kl_forward and the gradient of the logits in one pass. Returns a `KL` and the gradient.

    logits: (N, V) float32, float64, float16 or (from ml_dtypes) bfloat16.
    teacher: scores (N, V) of any of these dtypes.
    ids: (N, K); the teacher is then the log-probabilities (N, K) of these classes, at the
        temperature of the comparison. What they leave to 1 is one bin with all other classes. One
        of -inf is left to that bin too.
    probabilities: the teacher (N, V) is probabilities; without ids.
    target: (N,) integers in [0, V), or ignore_index; needed for hard_weight.
    token_weight: (N,) what each row's loss is multiplied by; where it is 0 the row is ignored.
    ignore_index: of the target; -100.
    beta: 0 KL(teacher | student), 1 KL(student | teacher), between them the generalised
        Jensen-Shannon divergence beta KL(teacher | m) + (1 - beta) KL(student | m), with
        m = beta teacher + (1 - beta) student.
    temperature: divides the scores of both in the divergence.
    soft_weight, hard_weight: of the divergence and of the cross-entropy with the target.
    logit_scale, softcap; teacher_scale, teacher_softcap: as in nll_forward, of each. The teacher's
        are none with ids.
    grad: a number, or (N,): the gradient of each row's loss; 1.
    threads, backend: as in nll_forward.

    Raises IndexError for a target or id out of range, ValueError for a wrong shape or value,
    TypeError for a wrong dtype, ImportError if the backend cannot run.
    """
    problem = _problem(
        logits, teacher, ids, probabilities, target, token_weight, ignore_index, beta, temperature,
        soft_weight, hard_weight, logit_scale, softcap, teacher_scale, teacher_softcap, backend,
    )  # fmt: skip
    x = problem.logits
    upstream = reals_of("grad", grad, ((), (len(x),)), problem.real)
    out = new_gradient(x)
    return _run(problem, upstream, out, threads, backend), out


class _Problem(NamedTuple):
    """The arguments that both share, and the arrays they point into."""

    arguments: tuple[Any, ...]
    total_weight: float
    real: RealType
    logits: NDArray
    teacher: NDArray
    ids: NDArray | None
    of_rows: tuple[NDArray | None, ...]  # target, token_weight; keeps them alive


def _problem(
    logits: ArrayLike, teacher: ArrayLike, ids: ArrayLike | None, probabilities: bool,
    target: ArrayLike | None, token_weight: ArrayLike | None, ignore_index: int, beta: float,
    temperature: float, soft_weight: float, hard_weight: float, logit_scale: float,
    softcap: float | None, teacher_scale: float, teacher_softcap: float | None,
    backend: str | None,
) -> _Problem:  # fmt: skip
    x, code = rows_of("logits", logits)
    rows, vocab = x.shape
    if vocab == 0:
        raise ValueError(f"logits: expected shape (N, V) of some classes, got {x.shape}")
    real: RealType = np.float64 if code == DTYPE_CODES["float64"] else np.float32
    q, teacher_code = rows_of("teacher", teacher)
    check_flag("probabilities", probabilities)
    columns = _ids_of(ids, rows, vocab)
    expected = x.shape if columns is None else columns.shape
    if q.shape != expected:
        raise ValueError(f"teacher: expected shape {expected}, got {q.shape}")
    if columns is not None and probabilities:
        raise ValueError(
            "probabilities: expected False with ids, whose teacher is log-probabilities, got True"
        )
    ignored = ignore_index_of(ignore_index)
    t = _target_of(target, rows, vocab, hard_weight)
    if target is None:
        ignored = -1  # t is 0, which may be ignore_index
    u = None if token_weight is None else reals_of("token_weight", token_weight, ((rows,),), real)
    beta = number_of("beta", beta, real, 0)
    if beta > 1:
        raise ValueError(f"beta: expected 0 to 1, got {beta}")
    temperature = number_of("temperature", temperature, real)
    if temperature <= 0:
        raise ValueError(f"temperature: expected a number above 0, got {temperature}")
    scale, cap = _scores_of_teacher(teacher_scale, teacher_softcap, real, columns is None)
    total = load_kernel("nll", backend).total_weight(
        rows, vocab, address(t), 0, 0, address(u), ignored, code
    )
    arguments = (
        code, rows, vocab, address(x), row_stride(x), teacher_code, address(q), row_stride(q),
        probabilities, address(columns), 0 if columns is None else columns.shape[1], address(t),
        address(u), ignored, beta, temperature, number_of("soft_weight", soft_weight, real),
        number_of("hard_weight", hard_weight, real), number_of("logit_scale", logit_scale, real),
        softcap_of("softcap", softcap), scale / temperature, cap / temperature,
    )  # fmt: skip
    return _Problem(arguments, total, real, x, q, columns, (t, u))


def _run(
    problem: _Problem,
    upstream: NDArray | None,
    out: NDArray | None,
    threads: int | None,
    backend: str | None,
) -> KL:
    """With `out`, the gradient of the logits is written there."""
    rows, vocab = problem.logits.shape
    loss, soft, hard = (np.empty(rows, problem.real) for _ in range(3))
    _, invalid = load_kernel("kl", backend).rows(
        *problem.arguments, address(loss), address(soft), address(hard), address(upstream),
        0 if upstream is None else upstream.ndim, 1.0, address(out),
        0 if out is None else row_stride(out), thread_count(threads),
    )  # fmt: skip
    if invalid >= 0:
        assert problem.ids is not None
        logs = problem.teacher[invalid].astype(np.float64)
        check_named(problem.ids[invalid], logs, vocab, invalid)
    return KL(loss, soft, hard, problem.total_weight)


def _target_of(
    target: ArrayLike | None, rows: int, vocab: int, hard_weight: float
) -> NDArray[np.int64]:
    if target is not None:
        return _integers("target", target, (rows,), vocab)
    if hard_weight:
        raise ValueError("target: expected classes (N,) for the cross-entropy, got None")
    return np.zeros(rows, np.int64)


def _scores_of_teacher(
    scale: float, softcap: float | None, real: RealType, has_scores: bool
) -> tuple[float, float]:
    if not has_scores and (softcap is not None or scale != 1):
        raise ValueError(
            "teacher_scale, teacher_softcap: expected 1 and None with ids, whose teacher is "
            f"log-probabilities, got {scale} and {softcap}"
        )
    return number_of("teacher_scale", scale, real), softcap_of("teacher_softcap", softcap)


def _integers(name: str, value: ArrayLike, shape: tuple[int, ...], vocab: int) -> NDArray[np.int64]:
    a = array_of(name, value)
    if a.dtype.kind not in "iu":
        raise TypeError(f"{name}: expected integers, got {a.dtype}")
    if a.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {a.shape}")
    if a.dtype == np.uint64 and (a > INT64_MAX).any():  # as int64 it would be negative
        raise IndexError(f"{name}: {a.max()} is out of range: expected 0 to {vocab - 1}")
    return np.ascontiguousarray(a, np.int64)


def _ids_of(ids: ArrayLike | None, rows: int, vocab: int) -> NDArray[np.int64] | None:
    if ids is None:
        return None
    shape = array_of("ids", ids).shape
    if len(shape) != 2:
        raise ValueError(f"ids: expected shape (N, K), got {shape}")
    return _integers("ids", ids, (rows, shape[1]), vocab)


def check_named(ids: NDArray, logs: NDArray, vocab: int, row: int, name: str = "ids") -> None:
    """Raise what is wrong with the classes that a teacher names in a row, in the argument `name`,
    and their log-probabilities: the kernels say only that it is this row."""
    ids = ids[~np.isneginf(logs)]
    for column in ids:
        if not 0 <= column < vocab:
            raise IndexError(
                f"{name}: {column} at row {row} is out of range: expected 0 <= id < {vocab}"
            )
    values, counts = np.unique(ids, return_counts=True)
    if (counts > 1).any():
        raise ValueError(
            f"{name}: expected each class once in a row, got {values[counts.argmax()]} twice at "
            f"row {row}"
        )
    with np.errstate(over="ignore"):
        mass = np.exp(logs).sum()
    raise ValueError(
        f"teacher: expected log-probabilities, got numbers at row {row} whose probabilities sum to "
        f"{mass:.4g}"
    )
