"""The kernels of kl, on NumPy arrays, against the float64 oracle."""

import numpy as np
import pytest

from neglog import kernels, reference
from neglog.kernels import kl_forward, kl_forward_backward
from tests.support.errors import relative_error
from tests.support.nll_cases import extreme_rows

BUDGET = {"float32": 1e-5, "float64": 1e-12, "float16": 1e-5}
GRADIENT_BUDGET = {"float32": 1e-5, "float64": 1e-12, "float16": 2e-3}
KINDS = ["scores", "probabilities", "named"]
BETAS = [0.0, 0.3, 1.0]
ROWS = 6


def softmax(x):
    return np.exp(reference.log_softmax(x.astype(np.float64))[0])


def draw(rng, vocab, dtype, kind, teacher_dtype=None, count=5, rows=ROWS):
    """A student's logits with a row stride of their own, a teacher, and what says which it is."""
    logits = (rng.standard_normal((rows, vocab + 3)) * 3).astype(dtype)[:, :vocab]
    teacher = rng.standard_normal((rows, vocab)) * (1 if kind == "probabilities" else 3)
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
    grad = np.linspace(-1.1, 2, len(logits))  # none is 0
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
    assert relative_error(gradient, truth.grad) < slack * GRADIENT_BUDGET[dtype]


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


def extremes_with(teachers, dtype):
    """Each extreme student with each of the teachers, and how exact the rows can be: where scores
    are 1e4 apart, so is the gradient's log p - log q from the divergence, its difference of 1."""
    students = extreme_rows("float32")
    logits = np.repeat(students, len(teachers), axis=0).astype(dtype)
    teacher = np.tile(np.array(teachers, dtype), (len(students), 1))
    is_large = (np.abs(logits) == 1e4).any(1) | (np.abs(teacher) == 1e4).any(1)
    return [(logits[rows], teacher[rows], slack)
            for rows, slack in ((~is_large, 1), (is_large, 100))]  # fmt: skip


INF, NAN = np.inf, np.nan
PROBABILITIES = [
    [1, 0, 0, 0, 0], [0.5, 0.5, 0, 0, 0], [0, 0, 0, 0, 0], [0.2, 0.2, 0.2, 0.2, 0.2],
    [NAN, 0.5, 0.5, 0, 0], [INF, 0, 0, 0, 0], [-0.1, 0.6, 0.5, 0, 0], [3, 1, 0, 0, 0],
]  # fmt: skip
LOGS_OF_THREE = [
    [-0.1, -5, -7], [-INF, -1, -1.5], [-INF, -INF, -INF], [0, -INF, -INF], [NAN, -1, -2],
    [-0.7, -0.8, -30], [-1e-4, -6e4, -12],
]  # fmt: skip


# NaN and inf in every build: a flag of the compiler could lose them. Classes in front that both
# call impossible push a row's own into the second or third block.
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("pad", [0, 2100], ids=["one block", "more blocks"])
def test_extremes(every_build, dtype, pad):
    for *rows, slack in extremes_with(extreme_rows("float32"), dtype):
        logits, teacher = (
            np.concatenate([np.full((len(x), pad), -np.inf, dtype), x], axis=1) for x in rows
        )
        target = np.full(len(logits), pad + 1)
        for beta in BETAS:
            check(every_build, logits, teacher, {"beta": beta}, dtype, slack)
            mixed = {"beta": beta, "temperature": 2.0, "hard_weight": 0.5, "target": target}
            check(every_build, logits, teacher, mixed, dtype, slack)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("beta", BETAS)
def test_extreme_probabilities(kernel_backend, beta, dtype):
    for logits, teacher, slack in extremes_with(PROBABILITIES, dtype):
        options = {"beta": beta, "probabilities": True}
        check(kernel_backend, logits, teacher, options, dtype, slack)


# It is the others that are moved: named scores near 1e4 are multiples of 2^-10, which any shift
# rounds alike, so that their differences lose nothing.
@pytest.mark.parametrize("distance", [1e4, -1e4])
@pytest.mark.parametrize("beta", BETAS)
def test_named_scores_far_from_the_others(every_build, rng, beta, distance):
    """The scores of the bins keep their digits, on whichever side of the others they lie."""
    logits, teacher, given = draw(rng, 300, "float32", "named")
    named = np.take_along_axis(logits, given["ids"], 1)
    logits -= np.float32(distance)
    np.put_along_axis(logits, given["ids"], named, 1)
    check(every_build, logits, teacher, {"beta": beta, **given}, "float32")


# In the middle of the row, at its ends, and in another order.
@pytest.mark.parametrize("columns", [(0, 1, 2), (4, 1, 0), (3, 2, 1)])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_extremes_of_named_classes(kernel_backend, dtype, columns):
    for logits, teacher, slack in extremes_with(LOGS_OF_THREE, dtype):
        ids = np.tile(columns, (len(logits), 1))
        for beta in BETAS:
            truth = reference.kl(logits, teacher, ids=ids, beta=beta, reduction="none")
            is_nan = np.isnan(truth.loss)
            options = {"beta": beta, "ids": ids[~is_nan]}
            check(kernel_backend, logits[~is_nan], teacher[~is_nan], options, dtype, slack)
            found, gradient = kl_forward_backward(
                logits, teacher, ids=ids, beta=beta, backend=kernel_backend
            )
            np.testing.assert_array_equal(np.isnan(found.loss), is_nan)
            assert np.isnan(gradient[np.isnan(truth.grad)]).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("beta", [*BETAS, 0.5])
def test_a_student_that_is_its_teacher(every_build, rng, beta, dtype):
    """No loss and no gradient, and never a loss below 0, even of one that is merely near it."""
    logits = rng.standard_normal((8, 700))
    logits[1, 3] += 18  # p > 0.999
    logits[2] *= 300
    logits[3] += 1e4
    logits[4] -= 1e4
    logits[5, 100:] = -np.inf
    logits = logits.astype(dtype)
    eps = np.finfo(dtype).eps
    given = {"beta": beta, "backend": every_build}
    found, gradient = kl_forward_backward(logits, logits, **given)
    assert np.abs(found.loss).max() <= eps
    assert np.abs(gradient).max() <= eps
    ids = np.argsort(-logits, axis=1)[:, :20]
    log_p = np.take_along_axis(reference.log_softmax(logits.astype(np.float64))[0], ids, 1)
    unsure = log_p[:, 0] < -1  # else what is left to 1 is rounding
    found, gradient = kl_forward_backward(logits[unsure], log_p[unsure], ids=ids[unsure], **given)
    assert np.abs(found.loss).max() <= 4 * eps
    assert np.abs(gradient).max() <= 4 * eps
    for distance in (1e-2, 1e-4, 1e-6):
        near = logits + (distance * rng.standard_normal(logits.shape)).astype(dtype)
        assert kl_forward(logits, near, **given).loss.min() >= -4 * eps


def hard_rows(rng):
    """A student that is sure, far apart scores, scores near 1e4 of either sign, and a teacher near
    it, in float32."""
    logits, teacher = rng.standard_normal((2, 7, 600))
    logits[0, 3] += 18
    teacher[0, 3] += 16
    logits[1, 5] += 60
    logits[2] *= 300
    logits[3, 10:] = -1e4
    logits[4] += 1e4
    teacher[5] -= 1e4
    teacher[6] = logits[6] + 1e-3 * teacher[6]
    return logits.astype(np.float32), teacher.astype(np.float32)


def in_bins(logits, logs, ids):
    """Log-probabilities of the named classes, and of all others as one, in the logits' dtype."""
    log_p, _ = reference.log_softmax(logits)
    others = np.array(log_p)
    np.put_along_axis(others, ids, -np.inf, 1)
    rest = np.log1p(-np.exp(logs).sum(1, keepdims=True))
    return (
        np.hstack([np.take_along_axis(log_p, ids, 1), reference.log_softmax(others)[1][:, None]]),
        np.hstack([logs, rest]),
    )


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("kind", ["scores", "named"])
def test_no_further_from_the_truth_than_a_plain_formula(every_build, rng, kind, beta):
    """The oracle's formula in float32, twice its error, and four roundings."""
    logits, teacher = hard_rows(rng)
    options = {"beta": beta}
    if kind == "named":
        options["ids"] = np.argsort(-teacher, axis=1)[:, :9]
        log_q = reference.log_softmax(teacher.astype(np.float64))[0]
        teacher = np.take_along_axis(log_q, options["ids"], 1).astype(np.float32) - np.float32(0.01)
    with np.errstate(all="ignore"):
        if kind == "named":
            plain = in_bins(logits, teacher, options["ids"])
        else:
            plain = (reference.log_softmax(x)[0] for x in (logits, teacher))
        theirs, their_gradient = reference.divergence(*plain, np.float32(beta))
    assert theirs.dtype == their_gradient.dtype == np.float32
    if kind == "named":  # of the bins; that of the last one goes on to its classes
        their_gradient = their_gradient[:, :-1]
    truth = reference.kl(logits, teacher, reduction="none", **options)
    found, ours = kl_forward_backward(logits, teacher, backend=every_build, **options)
    of_truth = truth.grad
    if kind == "named":
        ours, of_truth = (np.take_along_axis(x, options["ids"], 1) for x in (ours, of_truth))
    finite = np.isfinite(truth.loss) & np.isfinite(theirs)
    assert finite.sum() >= 5
    for one, other, exact in ((found.loss, theirs, truth.loss), (ours, their_gradient, of_truth)):
        mine, plainly = (relative_error(x[finite], exact[finite]) for x in (one, other))
        assert mine <= 2 * plainly + 4 * np.finfo(np.float32).eps


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_sure_target_keeps_its_digits(every_build, dtype):
    logits = np.array([[12.0, 0.0, 0.0], [0.0, 16.0, -3.0]], dtype)
    options = {"target": [0, 1], "soft_weight": 0.0, "hard_weight": 1.0}
    truth = reference.kl(logits, logits, reduction="none", **options)
    _, gradient = kl_forward_backward(logits, logits, backend=every_build, **options)
    np.testing.assert_allclose(gradient, truth.grad, rtol=2e-6 if dtype == "float32" else 1e-9)


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


# Chunks of one row or of several; one block or more.
@pytest.mark.parametrize("vocab", [3, 3000])
@pytest.mark.parametrize("kind", KINDS)
def test_bits_do_not_depend_on_threads(kernel_backend, rng, kind, vocab):
    logits, teacher, given = draw(rng, vocab, "float32", kind, rows=97)
    outcomes = set()
    for threads in (1, 2, 3):
        for beta in BETAS:
            found, gradient = kl_forward_backward(
                logits, teacher, beta=beta, threads=threads, backend=kernel_backend, **given
            )
            outcomes.add((beta, found.loss.tobytes(), gradient.tobytes()))
    assert len(outcomes) == len(BETAS)


def test_one_upstream_is_that_of_each_row(kernel_backend, rng):
    logits, teacher, given = draw(rng, 300, "float32", "named")
    one, each = (
        kl_forward_backward(logits, teacher, grad=grad, backend=kernel_backend, **given)[1]
        for grad in (0.25, np.full(ROWS, 0.25))
    )
    np.testing.assert_array_equal(one, each)


def run_rows(backend, dtype, logits, teacher, out, beta=0.0, hard_weight=0.0, softcap=0.0, **given):
    """The kernel itself, of arrays whose dtype NumPy may not have. Returns the losses, and what it
    says is no distribution."""
    rows, vocab = logits.shape
    ids = given.get("ids", np.empty((rows, 0), np.int64))
    ids, target = np.ascontiguousarray(ids), np.zeros(rows, np.int64)
    loss = np.empty(rows, np.float32)
    total, invalid = kernels.load("kl", backend).rows(
        dtype, rows, vocab, logits.ctypes.data, vocab, dtype, teacher.ctypes.data, teacher.shape[1],
        given.get("probabilities", False), ids.ctypes.data if "ids" in given else 0, ids.shape[1],
        target.ctypes.data, 0, -100, beta, 1.0, 1.0, hard_weight, 1.0, softcap, 1.0, 0.0,
        loss.ctypes.data, 0, 0, 0, 0, 1.0, out.ctypes.data, vocab, 1,
    )  # fmt: skip
    assert total == pytest.approx(float(loss.sum()), rel=1e-6)
    return loss, invalid


@pytest.mark.parametrize("options", [{}, {"beta": 0.3, "hard_weight": 0.5, "softcap": 9.0}])
@pytest.mark.parametrize("kind", KINDS)
def test_over_the_logits(kernel_backend, rng, kind, options):
    logits, teacher, given = draw(rng, 2500, "float32", kind)
    over = np.ascontiguousarray(logits)
    loss, _ = run_rows(kernel_backend, 0, over, teacher, over, **options, **given)
    if "hard_weight" in options:
        given["target"] = np.zeros(ROWS, int)
    apart = kl_forward_backward(logits, teacher, backend=kernel_backend, **options, **given)
    np.testing.assert_array_equal(over, apart[1])
    np.testing.assert_array_equal(loss, apart[0].loss)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16(kernel_backend, rng, kind):
    """As float32 of the same numbers; NumPy knows them by their bits."""
    logits, teacher, given = draw(rng, 2500, "float32", kind)
    if kind == "named":
        teacher -= 0.02  # so that they are still no more than 1 when they are rounded
    halves = [np.ascontiguousarray(x.view(np.uint32) >> 16, np.uint16) for x in
              (np.ascontiguousarray(logits), teacher)]  # fmt: skip
    singles = [(x.astype(np.uint32) << 16).view(np.float32) for x in halves]
    of_halves, of_singles = np.empty_like(halves[0]), np.empty_like(singles[0])
    loss, invalid = run_rows(kernel_backend, 2, *halves, of_halves, **given)
    assert invalid == -1
    expected, _ = run_rows(kernel_backend, 0, *singles, of_singles, **given)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    of_halves = (of_halves.astype(np.uint32) << 16).view(np.float32)
    assert np.abs(of_halves - of_singles).max() <= 2.0**-8 * np.abs(of_singles).max()


# Twice, out of range, and more than 1.
@pytest.mark.parametrize("change", [("ids", 2), ("ids", 300), ("ids", -1), ("logs", 1.0)])
def test_other_rows_than_an_invalid_one_are_as_they_would_be(kernel_backend, rng, change):
    logits, teacher, given = draw(rng, 300, "float32", "named")
    logits, ids = np.ascontiguousarray(logits), given["ids"]
    ids[3, :2] = 2, 5
    expected, wrong = np.empty_like(logits), np.empty_like(logits)
    loss, invalid = run_rows(kernel_backend, 0, logits, teacher, expected, ids=ids)
    assert invalid == -1
    (ids if change[0] == "ids" else teacher)[3, 1] = change[1]
    found, invalid = run_rows(kernel_backend, 0, logits, teacher, wrong, ids=ids)
    assert invalid == 3
    loss[3], expected[3] = 0, 0
    np.testing.assert_array_equal(found, loss)
    np.testing.assert_array_equal(wrong, expected)


@pytest.mark.parametrize("kind", ["scores", "named"])
def test_large_gradient_is_the_same(kernel_backend, rng, kind):
    """Above 64 MB it goes past the caches, at any alignment."""
    rows, vocab = 270, 64_001
    logits = rng.standard_normal((rows, vocab), dtype=np.float32)
    assert logits.nbytes > 64 << 20
    teacher, given = logits[::-1], {}
    if kind == "named":
        given["ids"] = np.argsort(rng.random((rows, 500)), axis=1)[:, :40] * 128 + 1
        teacher = np.full((rows, 40), -4.0, np.float32)
    _, gradient = kl_forward_backward(logits, teacher, backend=kernel_backend, **given)
    for row in (0, 1, 2, 3, 7, rows // 2, rows - 1):
        one = {name: x[row : row + 1] for name, x in given.items()}
        both = (x[row : row + 1] for x in (logits, teacher))
        _, alone = kl_forward_backward(*both, backend=kernel_backend, **one)
        np.testing.assert_array_equal(gradient[row], alone[0])


def test_no_rows_and_no_named_class(kernel_backend, rng):
    none = np.zeros((0, 5), np.float32)
    found, gradient = kl_forward_backward(none, none, backend=kernel_backend)
    assert found.loss.shape == (0,)
    assert gradient.shape == (0, 5)
    logits, _, _ = draw(rng, 40, "float32", "scores")
    ids, logs = np.zeros((ROWS, 0), int), np.zeros((ROWS, 0), np.float32)
    found, gradient = kl_forward_backward(logits, logs, ids=ids, backend=kernel_backend)
    assert not found.loss.any()
    assert not gradient.any()


def test_without_a_target_no_row_is_ignored(kernel_backend, rng):
    logits, teacher, _ = draw(rng, 40, "float32", "scores")
    plain, other = (
        kl_forward(logits, teacher, ignore_index=i, backend=kernel_backend) for i in (-100, 0)
    )
    assert plain.loss.all()
    np.testing.assert_array_equal(plain.loss, other.loss)


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
    "ids of uint64": (
        IndexError, "ids: 18446744073709551516 is out of range: expected 0 to 3", LOGS,
        {"ids": np.full((2, 2), 2**64 - 100, np.uint64)},
    ),
    "target of uint64": (
        IndexError, "target: 18446744073709551516 is out of range: expected 0 to 3", X,
        {"target": np.full(2, 2**64 - 100, np.uint64)},
    ),
    "target shape": (
        ValueError, r"target: expected shape \(2,\), got \(2, 1\)", X, {"target": [[0], [1]]},
    ),
    "probabilities with ids": (
        ValueError, "probabilities: expected False with ids", LOGS,
        {"ids": IDS, "probabilities": True},
    ),
    "scale with ids": (
        ValueError, "teacher_scale, teacher_softcap: expected 1 and None with ids, .* got 2.0",
        LOGS, {"ids": IDS, "teacher_scale": 2.0},
    ),
    "softcap": (ValueError, "softcap: expected a finite number above 0", X, {"softcap": -1.0}),
    "teacher_softcap": (
        ValueError, "teacher_softcap: expected a finite .* or None, got nan", X,
        {"teacher_softcap": np.nan},
    ),
    "ignore_index": (TypeError, "ignore_index: expected an integer", X, {"ignore_index": 1.5}),
    "soft_weight": (ValueError, "soft_weight: expected a finite", X, {"soft_weight": np.inf}),
    "beta NaN": (ValueError, "beta: expected a finite number", X, {"beta": np.nan}),
    "beta below 0": (ValueError, "beta: expected a number from 0, got -0.5", X, {"beta": -0.5}),
    "option": (TypeError, "unexpected keyword argument 'betas'", X, {"betas": 1.0}),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_errors(kernel_backend, wrong):
    error, message, teacher, options = wrong
    with pytest.raises(error, match=message):
        kl_forward_backward(X, teacher, backend=kernel_backend, **options)


# e^1000 is beyond float64, and an exp for numbers below 0 makes anything of it.
@pytest.mark.parametrize("log", [0.1, 1.0, 89.0, 711.0, 1000.0, 1e4, 1e30, np.inf])
def test_no_number_above_0_is_a_log_probability(every_build, log):
    for dtype in ("float32", "float64"):
        logs = np.array([[-1.0, -2.0], [log, -3.0]], dtype)
        with pytest.raises(ValueError, match=r"teacher: expected log-probabilities, .* at row 1 "):
            kl_forward(X.astype(dtype), logs, ids=IDS, backend=every_build)


def test_logits_of_no_class():
    with pytest.raises(ValueError, match=r"logits: expected shape \(N, V\) of some classes"):
        kl_forward(X[:, :0], X[:, :0])
    with pytest.raises(TypeError, match="logits: expected one of float32"):
        kl_forward(X.astype(int), X)
    with pytest.raises(TypeError, match="unexpected keyword argument 'grad'"):
        kl_forward(X, X, grad=1.0)
