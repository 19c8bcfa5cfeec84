"""The kernels of kl, on NumPy arrays, against the float64 oracle."""

import numpy as np
import pytest

from neglog import kernels, reference
from neglog.kernels import kl_forward, kl_forward_backward
from tests.support.errors import relative_error

BUDGET = {"float32": 1e-5, "float64": 1e-12, "float16": 1e-5}
GRADIENT_BUDGET = {"float32": 1e-5, "float64": 1e-12, "float16": 2e-3}
KINDS = ["scores", "probabilities", "named"]
BETAS = [0.0, 0.3, 1.0]
ROWS = 6


def softmax(x):
    return np.exp(reference.log_softmax(x.astype(np.float64))[0])


def draw(rng, vocab, dtype, kind, teacher_dtype=None, count=5):
    """A student's logits with a row stride of their own, a teacher, and what says which it is."""
    logits = (rng.standard_normal((ROWS, vocab + 3)) * 3).astype(dtype)[:, :vocab]
    teacher = rng.standard_normal((ROWS, vocab)) * (1 if kind == "probabilities" else 3)
    kept = teacher_dtype or dtype
    if kind == "scores":
        return logits, teacher.astype(kept), {}
    if kind == "probabilities":
        return logits, softmax(teacher).astype(kept), {"probabilities": True}
    log_q = reference.log_softmax(teacher)[0]
    ids = np.argsort(-log_q, axis=1)[:, : min(count, vocab)]
    rng.permuted(ids, axis=1, out=ids)
    logs = np.take_along_axis(log_q, ids, 1)
    return logits, (logs - 1e-3).astype(kept), {"ids": ids}


def check(backend, logits, teacher, options, dtype, slack=1):
    grad = np.linspace(-1, 2, len(logits))
    truth = reference.kl(logits, teacher, reduction="none", grad_loss=grad, **options)
    found, gradient = kl_forward_backward(logits, teacher, grad=grad, backend=backend, **options)
    alone = kl_forward(logits, teacher, backend=backend, **options)
    assert gradient.dtype == logits.dtype
    assert found.loss.dtype == ("float64" if dtype == "float64" else "float32")
    assert found.total_weight == pytest.approx(truth.total_weight)
    for name in ("loss", "divergence", "cross_entropy"):
        one, other = getattr(found, name), getattr(truth, name)
        np.testing.assert_array_equal(one, getattr(alone, name))
        assert relative_error(one, other) < slack * BUDGET[dtype], name
    error = np.abs(gradient.astype(np.float64) - truth.grad).max()
    assert error <= slack * GRADIENT_BUDGET[dtype] * max(1e-2, np.abs(truth.grad).max())


ALL = {
    "temperature": 2.5, "soft_weight": 0.7, "hard_weight": 0.4, "logit_scale": 1.3,
    "softcap": 20.0, "target": [0, -100, 0, 0, 0, 0], "token_weight": [1, 1, 0.5, -2, 0, 1.5],
}  # fmt: skip
OPTIONS = {
    "plain": {},
    "temperature": {"temperature": 0.5},
    "mixed": {"hard_weight": 0.4, "target": [0, 0, -100, 0, 0, 0]},
    "all": ALL,
}


# The compiler makes other code for each build and dtype. A register's rest, a block's, several
# blocks; the gradient of named classes in registers, and by blocks.
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("vocab", [1, 2, 7, 31, 257, 2500])
def test_dtypes_and_sizes(every_build, rng, vocab, dtype):
    for kind in KINDS:
        for beta in BETAS:
            logits, teacher, given = draw(rng, vocab, dtype, kind)
            check(every_build, logits, teacher, {"beta": beta, **given}, dtype)
            check(every_build, logits, teacher, {"beta": beta, **ALL, **given}, dtype)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("teacher_dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_of_another_dtype(kernel_backend, rng, kind, teacher_dtype, options):
    of_teacher = {} if kind == "named" else {"teacher_scale": 0.7, "teacher_softcap": 10.0}
    for dtype in ("float32", "float64"):
        logits, teacher, given = draw(rng, 1100, dtype, kind, teacher_dtype)
        check(kernel_backend, logits, teacher, {**options, **of_teacher, **given}, dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_a_real_vocabulary(kernel_backend, rng, kind):
    logits, teacher, given = draw(rng, 50257, "float32", kind, count=64)
    for beta in BETAS:
        check(kernel_backend, logits, teacher, {"beta": beta, **given}, "float32")


# Every class, a single one, and one of probability 0, which is not named.
@pytest.mark.parametrize("count", [1, 39, 40])
def test_how_many_are_named(kernel_backend, rng, count):
    logits, teacher, given = draw(rng, 40, "float64", "named", count=count)
    if count == 40:
        teacher = teacher + 1e-3  # that sum to 1
    if count > 1:
        teacher[2, 0] = -np.inf
        given["ids"][2, 0] = given["ids"][2, 1]  # whatever it says
    for beta in (0.0, 0.3):
        check(kernel_backend, logits, teacher, {"beta": beta, **given}, "float64", slack=100)


def extreme(dtype):
    big, inf = 1e4, np.inf
    logits = np.array([
        [big, -big, 0, 1, 2], [-big, -big, -big, -big, -big], [-inf, 0, -inf, 1, 2],
        [0, 30, 0, 0, 0], [big, big - 8, big, big, big], [1, 2, 3, 4, -inf],
    ], dtype)  # fmt: skip
    teacher = np.array([
        [big, big, 0, 0, 0], [-big, -big + 3, -big, -big, -big], [-inf, 0, 1, 1, -inf],
        [0, 28, 0, 0, 0], [big, big, big, big, big - 5], [1, 2, 3, 4, -inf],
    ], dtype)  # fmt: skip
    return logits, teacher


@pytest.mark.parametrize("pad", [0, 1024])
@pytest.mark.parametrize("beta", BETAS)
def test_extremes(every_build, beta, pad):
    """Masked classes, sure ones, and scores of 1e4; in front, classes that are none to both."""
    logits, teacher = (
        np.concatenate([np.full((ROWS, pad), -np.inf), x], axis=1) for x in extreme("float64")
    )
    truth = reference.kl(logits, teacher, beta=beta, reduction="none")
    found, gradient = kl_forward_backward(logits, teacher, beta=beta, backend=every_build)
    np.testing.assert_allclose(found.divergence, truth.divergence, rtol=1e-9, atol=1e-11)
    finite = np.isfinite(truth.divergence)
    np.testing.assert_allclose(gradient[finite], truth.grad[finite], rtol=1e-8, atol=1e-11)


def test_numbers_that_are_none(kernel_backend):
    """NaN and inf, of student and teacher, make NaN of their row and of no other."""
    for value in (np.nan, np.inf):
        for side in range(2):
            pair = [np.zeros((3, 9)), np.ones((3, 9))]
            pair[side][1, 4] = value
            for beta in BETAS:
                found, gradient = kl_forward_backward(*pair, beta=beta, backend=kernel_backend)
                assert np.isnan(found.loss).tolist() == [False, True, False]
                assert np.isfinite(gradient[[0, 2]]).all()


def test_rows_that_do_not_count_may_hold_anything(kernel_backend, rng):
    for kind in KINDS:
        logits, teacher, given = draw(rng, 300, "float32", kind)
        logits[1] = teacher[1] = logits[4] = teacher[4] = np.nan
        options = {**ALL, **given}
        if kind == "named":
            given["ids"][1] = -7
        found, gradient = kl_forward_backward(logits, teacher, backend=kernel_backend, **options)
        assert not found.loss[[1, 4]].any()
        assert not gradient[[1, 4]].any()
        assert np.isfinite(gradient).all()


def test_threads_and_upstreams(kernel_backend, rng):
    logits, teacher, given = draw(rng, 3000, "float32", "named")
    made = [
        kl_forward_backward(logits, teacher, threads=n, grad=0.25, backend=kernel_backend, **given)
        for n in (1, 2)
    ]
    np.testing.assert_array_equal(made[0][1], made[1][1])
    by_row = kl_forward_backward(
        logits, teacher, grad=np.full(ROWS, 0.25), backend=kernel_backend, **given
    )
    np.testing.assert_array_equal(made[0][1], by_row[1])


@pytest.mark.parametrize("kind", KINDS)
def test_over_the_logits(kernel_backend, rng, kind):
    logits, teacher, given = draw(rng, 1500, "float32", kind)
    expected, gradient = kl_forward_backward(logits, teacher, backend=kernel_backend, **given)
    over, target = np.ascontiguousarray(logits), np.zeros(ROWS, np.int64)
    ids = given.get("ids")
    count = 0 if ids is None else ids.shape[1]
    ids = None if ids is None else np.ascontiguousarray(ids)
    loss = np.empty(ROWS, np.float32)
    kernels.load("kl", kernel_backend).rows(
        0, ROWS, 1500, over.ctypes.data, 1500, 0, teacher.ctypes.data, teacher.shape[1],
        kind == "probabilities", 0 if ids is None else ids.ctypes.data, count, target.ctypes.data,
        0, -100, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0, loss.ctypes.data, 0, 0, 0, 0, 1.0,
        over.ctypes.data, 1500, 1,
    )  # fmt: skip
    np.testing.assert_array_equal(over, gradient)
    np.testing.assert_array_equal(loss, expected.loss)


X = np.zeros((2, 4), np.float32)
IDS, LOGS = np.array([[0, 1], [2, 3]]), np.full((2, 2), -1.0, np.float32)
WRONG = {
    "shape": (ValueError, r"teacher: expected shape \(2, 4\), got \(2, 3\)", X[:, :3], {}),
    "ids": (ValueError, r"ids: expected shape \(N, K\), got \(2,\)", LOGS, {"ids": [0, 1]}),
    "rows of ids": (
        ValueError, r"ids: expected shape \(2, 2\), got \(1, 2\)", LOGS, {"ids": IDS[:1]},
    ),
    "floats": (TypeError, "ids: expected integers, got float64", LOGS, {"ids": IDS * 1.0}),
    "out of range": (IndexError, "is out of range: expected 0 <= id < 4", LOGS, {"ids": IDS + 6}),
    "twice": (ValueError, "ids: expected each class once in a row, got 2 twice at row 1", LOGS,
              {"ids": np.array([[0, 1], [2, 2]])}),
    "no logs": (ValueError, "whose probabilities sum to 14.78", LOGS + 3, {"ids": IDS}),
    "no target": (ValueError, r"target: expected classes \(N,\)", X, {"hard_weight": 1.0}),
    "target": (IndexError, "target 4 at row 1 is out of range", X, {"target": [0, 4]}),
    "beta": (ValueError, "beta: expected 0 to 1, got 2", X, {"beta": 2.0}),
    "temperature": (ValueError, "temperature: expected a number above 0", X, {"temperature": 0}),
    "dtype": (TypeError, "teacher: expected one of float32", X.astype(int), {}),
    "weight": (ValueError, r"token_weight: expected shape \(2,\)", X, {"token_weight": [1.0]}),
    "grad": (ValueError, r"grad: expected a scalar or shape \(2,\)", X, {"grad": [1.0] * 3}),
    "flag": (TypeError, "probabilities: expected a bool", X, {"probabilities": 1}),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_errors(kernel_backend, wrong):
    error, message, teacher, options = wrong
    with pytest.raises(error, match=message):
        kl_forward_backward(X, teacher, backend=kernel_backend, **options)
