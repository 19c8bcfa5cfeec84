"""nll of logits (B, V, P) where they lie in memory, and of few classes, against the float64 oracle.

The arithmetic is in positions.hpp: a group of 64 rows at a time (32 doubles), 256 classes in the
stage (128 beside probabilities), squares of 4, 8 and 16 for what is transposed.
"""

import numpy as np
import pytest

from neglog import reference
from neglog.kernels import nll_backward, nll_forward, nll_forward_backward
from tests.support.errors import relative_error
from tests.support.nll_cases import (
    BUDGET,
    GRADIENT_BUDGET,
    OPTIONS,
    drawn_weights,
    extreme_rows,
)
from tests.support.positions import Call, as_rows, places

LAYOUTS = ["BVP", "BPV", "VBP", "BVP apart"]


def draw(rng, shape, dtype, layout, probabilities=False):
    batches, vocab, positions = shape
    logits = places(layout, shape, dtype)
    logits[...] = rng.standard_normal(shape) * 3
    if probabilities:
        target = places(layout, shape, dtype)
        target[...] = rng.dirichlet(np.ones(vocab), (batches, positions)).transpose(0, 2, 1)
        return logits, target
    target = rng.integers(0, vocab, batches * positions)
    target[::5] = -100
    return logits, target


def check(backend, rng, shape, dtype, layout, options, probabilities=False):
    """Forward, backward, and both in one pass over the logits, against the oracle."""
    logits, target = draw(rng, shape, dtype, layout, probabilities)
    options = drawn_weights(options, shape[0] * shape[2], shape[1], rng)
    rows = shape[0] * shape[2]
    grad, *others = rng.standard_normal((3, rows))
    upstream = dict(zip(("grad_lse", "grad_entropy"), others, strict=True))
    by_rows = as_rows(target) if probabilities else target
    truth = reference.nll(
        as_rows(logits), by_rows, reduction="none", grad_loss=grad, **upstream, **options
    )
    call = Call(backend, logits, target, **options)
    result = call.forward()
    np.testing.assert_array_equal(result.correct, truth.correct)
    np.testing.assert_array_equal(result.argmax, truth.argmax)
    assert relative_error(result.loss, truth.loss) < BUDGET[dtype]
    assert relative_error(result.lse, truth.lse) < BUDGET[dtype]
    assert relative_error(result.entropy, truth.entropy) < 4 * BUDGET[dtype]
    out = places(layout, shape, dtype)
    call.backward(grad, upstream["grad_lse"], result, out, upstream["grad_entropy"])
    assert relative_error(as_rows(out), truth.grad) < GRADIENT_BUDGET[dtype]
    call.backward(np.array(0.25), None, result, out)
    assert call.kernel.__name__.split(".")[2] == backend
    together = places("BPV", shape, dtype)
    again = call.forward_backward(0.25, together)
    np.testing.assert_array_equal(together, out)  # to the same bits
    for one, other in zip(result, again, strict=True):
        np.testing.assert_array_equal(one, other)
    if layout == "BVP apart":  # what lies between is as it was
        assert (out.base[1::2, 1::2, 1::2] == 7).all()
    call.forward_backward(0.25, logits)
    np.testing.assert_array_equal(logits, out)


# Of each build, dtype and way through memory: one group and a rest, rows of several batches in one
# group, several stages, classes that are no multiple of a square.
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1), (2, 2, 7), (3, 5, 64), (2, 19, 100), (9, 21, 10), (2, 77, 33), (1, 300, 67)],
)
def test_shapes_and_layouts(every_build, rng, shape, dtype):
    for layout in LAYOUTS:
        for name in ("plain", "all"):
            check(every_build, rng, shape, dtype, layout, OPTIONS[name])


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("probabilities", [False, True], ids=["index", "probabilities"])
@pytest.mark.parametrize("classes", [19, 300])
def test_options(kernel_backend, rng, options, dtype, probabilities, classes):
    check(kernel_backend, rng, (2, classes, 40), dtype, "BVP", options, probabilities)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_extremes(every_build, dtype, smoothing):
    rows = extreme_rows(dtype)
    logits = np.ascontiguousarray(rows.T)[None]
    for column in (0, 1, 4):
        target = np.full(len(rows), column)
        truth = reference.nll(rows, target, reduction="none", label_smoothing=smoothing)
        call = Call(every_build, logits, target, label_smoothing=smoothing)
        out = np.empty_like(logits)
        result = call.forward_backward(1.0, out)
        assert relative_error(result.loss, truth.loss) < BUDGET[dtype]
        assert relative_error(result.lse, truth.lse) < BUDGET[dtype]
        np.testing.assert_array_equal(result.correct, truth.correct)
        assert relative_error(as_rows(out), truth.grad) < GRADIENT_BUDGET[dtype]
        np.testing.assert_array_equal(result.argmax, truth.argmax)
        upstream = {"grad_loss": np.ones(len(rows)), "grad_entropy": np.full(len(rows), -2.0)}
        truth = reference.nll(rows, target, reduction="none", label_smoothing=smoothing, **upstream)
        call.backward(upstream["grad_loss"], None, result, out, upstream["grad_entropy"])
        assert relative_error(as_rows(out), truth.grad) < GRADIENT_BUDGET[dtype]


# A confident target's 1 - p is the sum of the others' small exps, to all their digits. Up to 64
# classes Numba's rows have it too.
@pytest.mark.parametrize("vocab", [2, 3, 21, 60])
def test_confident_targets_keep_their_digits(every_build, vocab):
    logits = np.full((7, vocab), -16.0, np.float32)
    logits[:, 1] = np.linspace(0, 4, 7)
    target = np.ones(7, int)
    truth = reference.nll(logits, target, reduction="none")
    result, gradient = nll_forward_backward(logits, target, backend=every_build)
    # Half an ulp of 16, a score below the maximum, is 1e-6 of its exp.
    np.testing.assert_allclose(result.loss, truth.loss, rtol=2e-6)
    np.testing.assert_allclose(gradient, truth.grad, rtol=2e-6)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("vocab", [2, 3, 21, 100])
def test_a_row_is_the_same_alone(every_build, rng, vocab, dtype):
    """Whatever its place in a group, its neighbours and the threads."""
    rows = 151
    logits = (rng.standard_normal((rows, vocab)) * 3).astype(dtype)
    target = rng.integers(0, vocab, rows)
    target[3] = -100
    given = {"label_smoothing": 0.1, "backend": every_build}
    whole, gradient = nll_forward_backward(logits, target, threads=3, **given)
    for row in (0, 1, 3, 64, 77, rows - 1):
        one = slice(row, row + 1)
        alone, of_alone = nll_forward_backward(logits[one], target[one], threads=1, **given)
        for name in ("loss", "lse", "lse_low"):
            np.testing.assert_array_equal(getattr(whole, name)[one], getattr(alone, name))
        np.testing.assert_array_equal(gradient[one], of_alone)
    result = nll_forward(logits, target, threads=1, **given)
    np.testing.assert_array_equal(result.loss, whole.loss)
    backward = nll_backward(1.0, result, logits, target, threads=2, **given)
    np.testing.assert_array_equal(backward, gradient)


def test_ignored_rows_are_zero_even_of_nan(kernel_backend, rng):
    logits = places("BVP", (2, 5, 90), "float32")
    logits[...] = rng.standard_normal(logits.shape)
    target = rng.integers(0, 5, 180)
    target[3:170:2] = -100
    logits[:, :, 11] = np.nan
    ignored = target == -100
    target[[11, 101]] = -100
    out = places("BVP", logits.shape, "float32")
    result = Call(kernel_backend, logits, target).forward_backward(1.0, out, stats=False)
    ignored = target == -100
    assert not result.loss[ignored].any()
    assert not result.lse[ignored].any()
    assert (as_rows(out)[ignored] == 0).all()
    assert np.isfinite(as_rows(out)).all()
    target[:] = -100
    result = Call(kernel_backend, logits, target).forward_backward(1.0, out, stats=False)
    assert not result.loss.any()
    assert not out.any()


def test_an_lse_of_an_ignored_row_has_its_gradient(kernel_backend, rng):
    rows = extreme_rows("float32")
    logits, target = np.ascontiguousarray(rows.T)[None], np.full(len(rows), -100)
    call, out = Call(kernel_backend, logits, target), np.empty((1, 5, len(rows)), np.float32)
    call.backward(np.zeros(len(rows)), np.ones(len(rows)), call.forward(), out)
    truth = reference.nll(rows, target, reduction="none", grad_lse=np.ones(len(rows)))
    assert relative_error(as_rows(out), truth.grad) < GRADIENT_BUDGET["float32"]


@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 3, 0), (2, 0, 3)])
def test_nothing(kernel_backend, shape):
    logits = np.empty(shape, np.float32)
    rows = shape[0] * shape[2]
    call = Call(kernel_backend, logits, np.full(rows, -100))
    assert not call.forward(stats=False).loss.any()
    call.forward_backward(1.0, np.empty_like(logits))
