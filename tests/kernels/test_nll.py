"""The nll kernels, on NumPy arrays, against the float64 oracle."""

import os
import signal
import time

import numpy as np
import pytest

from neglog import reference
from neglog.kernels import nll_backward, nll_forward, nll_forward_backward
from tests.support.errors import relative_error
from tests.support.nll_cases import (
    BUDGET,
    GRADIENT_BUDGET,
    OPTIONS,
    draw,
    drawn_weights,
    extreme_rows,
)


def check(backend, rng, options, vocab, dtype, probabilities=False):
    """Forward, backward, and both in one pass over the logits, against the oracle."""
    logits, target = draw(rng, 5, vocab, dtype, probabilities)
    options = drawn_weights(options, 5, vocab, rng)
    grad, grad_lse, grad_entropy = rng.standard_normal((3, 5))
    given = {"grad_lse": grad_lse, "grad_entropy": grad_entropy, **options}
    truth = reference.nll(logits, target, reduction="none", grad_loss=grad, **given)
    result = nll_forward(logits, target, stats=True, backend=backend, **options)
    gradient = nll_backward(grad, result, logits, target, backend=backend, **given)
    assert gradient.dtype == logits.dtype
    assert result.loss.dtype == ("float64" if dtype == "float64" else "float32")
    assert result.total_weight == pytest.approx(truth.total_weight)
    np.testing.assert_array_equal(result.correct, truth.correct)
    np.testing.assert_array_equal(result.argmax, truth.argmax)
    assert relative_error(result.loss, truth.loss) < BUDGET[dtype]
    assert relative_error(result.lse, truth.lse) < BUDGET[dtype]
    assert relative_error(result.entropy, truth.entropy) < 4 * BUDGET[dtype]
    assert relative_error(gradient, truth.grad) < GRADIENT_BUDGET[dtype]
    check_one_pass(backend, np.ascontiguousarray(logits), target, options, dtype)


def check_one_pass(backend, logits, target, options, dtype):
    truth = reference.nll(logits, target, reduction="none", grad_loss=0.25, **options)
    given = {"grad_scale": 0.25, "backend": backend, **options}
    apart, out = nll_forward_backward(logits, target, **given)
    over, same = nll_forward_backward(logits, target, out=logits, stats=True, **given)
    assert same is logits
    np.testing.assert_array_equal(out, logits)
    np.testing.assert_array_equal(apart.loss, over.loss)
    np.testing.assert_array_equal(over.correct, truth.correct)
    assert relative_error(over.loss, truth.loss) < BUDGET[dtype]
    assert relative_error(logits, truth.grad) < GRADIENT_BUDGET[dtype]


# The compiler makes other code for each build and dtype. The sizes leave a rest after vectors of 2
# to 16 numbers, after 64 partial sums, and after 1 and 24 blocks of 2048. "smoothing" and "all"
# together call every function of block.hpp.
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("vocab", [1, 2, 7, 31, 257, 2048, 2049, 50257])
def test_dtypes_and_sizes(every_build, rng, vocab, dtype):
    for options in ("smoothing", "all"):
        for probabilities in (False, True):
            check(every_build, rng, OPTIONS[options], vocab, dtype, probabilities)


# What an option does is decided in nll.pyx and numba/nll.py, the same for all builds: for float,
# for double, and for what is converted to float. Two blocks.
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("probabilities", [False, True], ids=["index", "probabilities"])
def test_options(kernel_backend, rng, options, dtype, probabilities):
    check(kernel_backend, rng, options, 2100, dtype, probabilities)


# NaN and inf in every build: a flag of the compiler could lose them. Masked columns in front push
# the row's own numbers into the second block; the target is at the maximum, or not, or masked.
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("pad", [0, 2100], ids=["one block", "two blocks"])
def test_extremes(every_build, dtype, pad):
    logits = extreme_rows(dtype)
    logits = np.concatenate([np.full((len(logits), pad), -np.inf, dtype), logits], axis=1)
    for column in (0, 1, 4):
        target = np.full(len(logits), pad + column)
        for smoothing in (0.0, 0.1):
            check_extremes(every_build, logits, target, smoothing, dtype)


def check_extremes(backend, logits, target, smoothing, dtype):
    given = {"label_smoothing": smoothing, "backend": backend, "threads": 1}
    truth = reference.nll(logits, target, reduction="none", label_smoothing=smoothing)
    result = nll_forward(logits, target, stats=True, **given)
    gradient = nll_backward(1.0, result, logits, target, **given)
    assert relative_error(result.loss, truth.loss) < BUDGET[dtype]
    assert relative_error(result.lse, truth.lse) < BUDGET[dtype]
    np.testing.assert_array_equal(result.correct, truth.correct)
    np.testing.assert_array_equal(result.argmax, truth.argmax)
    assert relative_error(gradient, truth.grad) < GRADIENT_BUDGET[dtype]
    upstream = {"grad_lse": 0.3, "grad_entropy": -2.0}
    named = {"reduction": "none", "label_smoothing": smoothing, **upstream}
    through_all = nll_backward(1.0, result, logits, target, **upstream, **given)
    truth_of_all = reference.nll(logits, target, **named)
    assert relative_error(through_all, truth_of_all.grad) < GRADIENT_BUDGET[dtype]
    if smoothing == 0:
        # What is masked has a probability of exactly 0, not merely a small one.
        healthy = np.isfinite(truth.lse)
        masked = np.isneginf(logits) & healthy[:, None]
        masked[np.arange(len(target)), target] = False
        assert masked.any()
        assert (gradient[masked] == 0).all()


def test_ignored_rows_are_zero_even_of_nan(kernel_backend):
    logits = np.full((3, 40), np.nan, np.float32)
    logits[1] = 0
    target = np.array([-100, 3, -100])
    result = nll_forward(logits, target, backend=kernel_backend)
    gradient = nll_backward(1.0, result, logits, target, backend=kernel_backend)
    assert result.loss[[0, 2]].tolist() == [0, 0]
    assert (gradient[[0, 2]] == 0).all()
    assert result.loss[1] == pytest.approx(np.log(40))
    over, _ = nll_forward_backward(logits, target, out=logits, backend=kernel_backend)
    assert (logits[[0, 2]] == 0).all()
    assert over.total_weight == 1


def test_an_lse_that_is_no_number_has_no_gradient_in_an_ignored_row(kernel_backend):
    logits = extreme_rows("float32")
    target, grad_lse = np.full(len(logits), -100), np.ones(len(logits))
    result = nll_forward(logits, target, stats=True, backend=kernel_backend)
    given = {"grad_lse": grad_lse, "backend": kernel_backend}
    gradient = nll_backward(1.0, result, logits, target, **given)
    truth = reference.nll(logits, target, reduction="none", grad_lse=grad_lse)
    assert relative_error(gradient, truth.grad) < GRADIENT_BUDGET["float32"]
    finite = np.isfinite(result.lse)
    assert not gradient[~finite].any()
    assert gradient[finite].any(axis=1).all()


# tanh(10) is 1 in float32 and its derivative is 8e-9; at 0.6 another form of tanh is taken.
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_gradient_of_a_saturated_softcap(every_build, dtype):
    logits = np.array([[0.6, 0.7, 3.0, 10.0, 30.0, 0.0, -0.6, -3.0, -10.0, -30.0]], dtype)
    target = np.array([5])
    truth = reference.nll(logits, target, reduction="none", softcap=1.0)
    given = {"softcap": 1.0, "backend": every_build}
    _, gradient = nll_forward_backward(logits, target, **given)
    rtol = 2e-6 if dtype == "float32" else 1e-14
    np.testing.assert_allclose(gradient, truth.grad, rtol=rtol)


# float32 ends at 3e38 and 1e-38: beyond the first there is no cap; below the second all scores are
# equal, and only a logit of 0 has a slope. float64 takes the caps as they are.
@pytest.mark.parametrize("softcap", [1e300, 1e39, 3e38, 1e-40, 1e-300])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_softcaps_beyond_the_range(kernel_backend, rng, dtype, softcap):
    logits, target = draw(rng, 5, 31, dtype)
    logits[0, :2] = 0
    truth = reference.nll(logits, target, reduction="none", softcap=softcap)
    given = {"softcap": softcap, "backend": kernel_backend}
    result = nll_forward(logits, target, **given)
    gradient = nll_backward(1.0, result, logits, target, **given)
    assert relative_error(result.loss, truth.loss) < BUDGET[dtype]
    assert relative_error(gradient, truth.grad) < GRADIENT_BUDGET[dtype]


def test_all_ignored(kernel_backend):
    result = nll_forward(np.zeros((4, 5), np.float32), np.full(4, -100), backend=kernel_backend)
    assert result.total_weight == 0
    assert result.loss.tolist() == [0, 0, 0, 0]


def test_confident_target_keeps_its_digits(kernel_backend):
    # p = 0.9998: formed in 16 bits, 1 - p has no digit left. The gradient is float16 here too,
    # and must be right to float16's own rounding.
    logits = np.array([[9.0, 0.0, 0.0]], np.float16)
    truth = reference.nll(logits, [0], reduction="none")
    result = nll_forward(logits, np.array([0]), backend=kernel_backend)
    gradient = nll_backward(1.0, result, logits, np.array([0]), backend=kernel_backend)
    np.testing.assert_allclose(gradient.astype(np.float64), truth.grad, rtol=1e-3)


# One block or three; chunks of one row or of several.
@pytest.mark.parametrize("vocab", [3, 5000])
@pytest.mark.parametrize("probabilities", [False, True], ids=["index", "probabilities"])
def test_bits_do_not_depend_on_threads(kernel_backend, rng, probabilities, vocab):
    logits, target = draw(rng, 97, vocab, "float32", probabilities)
    outcomes = set()
    for threads in (1, 2, 3):
        given = {"label_smoothing": 0.1, "threads": threads, "backend": kernel_backend}
        result = nll_forward(logits, target, stats=True, **given)
        gradient = nll_backward(0.3, result, logits, target, **given)
        one_pass, same = nll_forward_backward(logits, target, grad_scale=0.3, **given)
        arrays = (result.loss, result.lse, result.entropy, gradient, one_pass.loss, same)
        outcomes.add(b"".join(a.tobytes() for a in arrays))
    assert len(outcomes) == 1


def test_large_gradient_is_the_same(kernel_backend, rng):
    """Above 64 MB the zeros of ignored rows go past the caches, at any alignment."""
    rows, vocab = 270, 64_001
    logits, target = draw(rng, rows, vocab, "float32")
    assert rows * vocab * 4 > 64 << 20
    target[1:-1:3] = -100
    result = nll_forward(logits, target, backend=kernel_backend)
    gradient = nll_backward(1.0, result, logits, target, backend=kernel_backend)
    assert not gradient[1:-1:3].any()
    for row in (0, 1, 2, 3, 7, rows // 2, rows - 1):
        one = slice(row, row + 1)
        part = nll_forward(logits[one], target[one], backend=kernel_backend)
        small = nll_backward(1.0, part, logits[one], target[one], backend=kernel_backend)
        np.testing.assert_array_equal(gradient[one], small)


def test_gradients_never_share_memory(kernel_backend, rng):
    """At 4 MB they lie in memory that is used again, but not before its last view is gone."""
    logits, target = draw(rng, 1024, 2048, "float32")
    result = nll_forward(logits, target, backend=kernel_backend)
    kept = []
    for scale in (1.0, 2.0, 3.0):
        gradient = nll_backward(scale, result, logits, target, backend=kernel_backend)
        kept += [
            gradient.reshape(-1)[::7],
            nll_forward_backward(logits, target, backend=kernel_backend)[1].T[5:],
        ]
        del gradient
    np.testing.assert_allclose(kept[2], 2 * kept[0], rtol=1e-6)
    np.testing.assert_allclose(kept[4], 3 * kept[0], rtol=1e-6)
    np.testing.assert_array_equal(kept[1], kept[5])
    assert not any(np.shares_memory(kept[0], other) for other in kept[1:])


def test_a_forked_child_does_not_hang(rng):
    logits, target = draw(rng, 64, 2048, "float32")
    expected = nll_forward(logits, target, threads=2).loss
    child = os.fork()
    if child == 0:
        same = np.array_equal(nll_forward(logits, target, threads=2).loss, expected)
        os._exit(0 if same else 1)
    deadline = time.monotonic() + 20
    while (status := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.05)
    if status == (0, 0):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert status == (child, 0)


def test_bytes_in_another_order(kernel_backend, rng):
    logits, target = draw(rng, 5, 31, "float32")
    swapped = logits.astype(logits.dtype.newbyteorder())
    result, other = (nll_forward(x, target, backend=kernel_backend) for x in (logits, swapped))
    np.testing.assert_array_equal(result.loss, other.loss)
    gradient = nll_backward(1.0, other, swapped, target, backend=kernel_backend)
    np.testing.assert_array_equal(
        gradient, nll_backward(1.0, result, logits, target, backend=kernel_backend)
    )


def test_float16_conversions_are_exact(every_build):
    """All 65536 halves go in and come out: widened, they are the lse of a one-class row."""
    halves = np.arange(65536, dtype=np.uint16).view(np.float16)[:, None]
    target = np.zeros(65536, np.int64)
    result = nll_forward(halves, target, stats=True, backend=every_build)
    expected = np.where(np.isposinf(halves[:, 0]), np.nan, halves[:, 0].astype(np.float32))
    np.testing.assert_array_equal(result.lse, expected)


def test_float16_gradients_round_to_nearest_even(every_build, rng):
    """grad_lse times p = 1 writes any float32 as a half: each must round as NumPy rounds."""
    values = np.concatenate(
        [
            rng.standard_normal(4000) * 10.0 ** rng.integers(-9, 6, 4000),
            [65504, 65519.99, 65520, 1e6, -65520, 2.0**-24, 2.0**-25, 1.5 * 2.0**-24, 2049, 2051],
        ]
    ).astype(np.float32)
    logits = np.zeros((len(values), 1), np.float16)
    target = np.full(len(values), -100)
    result = nll_forward(logits, target, stats=True, backend=every_build)
    gradient = nll_backward(0.0, result, logits, target, grad_lse=values, backend=every_build)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(gradient[:, 0], values.astype(np.float16))


def test_empty(kernel_backend):
    for shape in ((0, 5), (0, 0), (3, 0)):
        logits, target = np.zeros(shape, np.float32), np.full(shape[0], -100)
        result = nll_forward(logits, target, stats=True, backend=kernel_backend)
        assert result.loss.tolist() == [0] * shape[0]
        assert nll_backward(1.0, result, logits, target, backend=kernel_backend).shape == shape


def test_target_out_of_range(kernel_backend):
    for target, row in (([0, 9], 1), ([-1, 0], 0)):
        message = f"target {target[row]} at row {row} is out of range: expected 0 <= target < 4"
        with pytest.raises(IndexError, match=message):
            nll_forward(np.zeros((2, 4), np.float32), target, backend=kernel_backend)


# Arguments are checked in Python, the same for all builds.
BAD = {
    "target shape": (
        ValueError,
        r"target: expected the logits' shape \(2, 4\), got \(2, 3\)",
        {"target": np.ones((2, 3))},
    ),
    "target length": (ValueError, r"target: expected shape \(2,\)", {"target": [0]}),
    "target dtype": (TypeError, r"target: expected integers", {"target": [0.0, 1.0]}),
    "logits shape": (ValueError, r"logits: expected shape \(N, V\)", {"logits": np.zeros(4)}),
    "logits dtype": (TypeError, r"logits: expected one of", {"logits": np.zeros((2, 4), int)}),
    "weight": (ValueError, r"weight: expected shape \(4,\), got \(3,\)", {"weight": np.ones(3)}),
    "smoothing": (ValueError, r"label_smoothing: expected", {"label_smoothing": 1.5}),
    "softcap": (ValueError, r"softcap: expected", {"softcap": -1.0}),
    "softcap inf": (ValueError, r"softcap: .* above 0 or None, got inf", {"softcap": np.inf}),
    "threads": (ValueError, r"threads: expected", {"threads": 0}),
    "half a thread": (TypeError, r"threads: expected a whole number", {"threads": 1.5}),
    "ignore_index": (TypeError, r"ignore_index: expected an integer", {"ignore_index": 1.5}),
    "uint64": (
        IndexError,
        r"target 18446744073709551516 is out of range",
        {"target": np.array([1, 2**64 - 100], np.uint64)},
    ),
    "backend": (ValueError, r"backend: expected one of cython, numba", {"backend": "gpu"}),
    "scale NaN": (ValueError, r"logit_scale: expected a finite number", {"logit_scale": np.nan}),
    "scale": (ValueError, r"logit_scale: .* of float32, got 1e\+39", {"logit_scale": 1e39}),
    "scale of text": (TypeError, r"logit_scale: expected a number, got 'a'", {"logit_scale": "a"}),
    "z_loss inf": (ValueError, r"z_loss: expected a finite number", {"z_loss": np.inf}),
    "z_loss below 0": (ValueError, r"z_loss: expected a number from 0, got -1", {"z_loss": -1}),
    "smoothing NaN": (ValueError, r"label_smoothing: expected", {"label_smoothing": np.nan}),
    "masked logits": (
        TypeError,
        r"logits: expected an array without a mask",
        {"logits": np.ma.masked_array(np.zeros((2, 4), np.float32))},
    ),
    "masked target": (
        TypeError,
        r"target: expected an array without a mask",
        {"target": np.ma.masked_array([0, 1], [True, False])},
    ),
    "masked weight": (
        TypeError,
        r"weight: expected an array without a mask",
        {"weight": np.ma.masked_array(np.ones(4))},
    ),
    "complex weight": (
        TypeError,
        r"weight: expected real numbers, got complex128",
        {"weight": np.ones(4) * 1j},
    ),
    "weight of text": (TypeError, r"weight: expected real numbers, got <U1", {"weight": "a"}),
    "complex probabilities": (
        TypeError,
        r"target: expected real numbers, got complex64",
        {"target": np.ones((2, 4), np.complex64)},
    ),
    "ragged logits": (ValueError, r"logits: expected an array;", {"logits": [[1.0], [1.0, 2.0]]}),
    "ragged target": (ValueError, r"target: expected an array;", {"target": [[1.0], [1.0, 2.0]]}),
    "ignore_index beyond int64": (
        ValueError,
        r"ignore_index: expected an integer of int64, got one of 64 bits",
        {"ignore_index": 2**63},
    ),
    "scale beyond float64": (
        ValueError,
        r"logit_scale: expected a finite number of float32",
        {"logit_scale": 10**400},
    ),
    "stats": (TypeError, r"stats: expected a bool, got str", {"stats": "no"}),
    "list of backends": (
        TypeError,
        r"backend: expected a str or None, got list",
        {"backend": ["cython"]},
    ),
}


def test_result_of_other_logits():
    logits, target = np.zeros((5, 4), np.float32), np.zeros(5, int)
    result = nll_forward(logits[:3], target[:3])
    with pytest.raises(ValueError, match=r"result.lse: expected shape \(5,\)"):
        nll_backward(1.0, result, logits, target)
    result = nll_forward(logits.astype(np.float64), target)
    with pytest.raises(ValueError, match=r"result\.lse: expected .* float32, .* got .* float64"):
        nll_backward(1.0, result, logits, target)

    with pytest.raises(TypeError, match="result: expected the NLL of nll_forward, got NoneType"):
        nll_backward(1.0, None, logits, target)


def test_bad_upstreams():
    logits, target = np.zeros((5, 4), np.float32), np.zeros(5, int)
    result = nll_forward(logits, target)
    with pytest.raises(ValueError, match=r"grad_lse: .* shape \(5,\), got \(4,\)"):
        nll_backward(1.0, result, logits, target, grad_lse=np.ones(4))
    with pytest.raises(ValueError, match=r"grad: expected .* shape \(5,\), got \(4,\)"):
        nll_backward(np.ones(4), result, logits, target)
    with pytest.raises(TypeError, match="grad: expected real numbers, got <U1"):
        nll_backward("a", result, logits, target)
    with pytest.raises(TypeError, match="grad: expected an array without a mask"):
        nll_backward(np.ma.masked_array(np.ones(5)), result, logits, target)
    with pytest.raises(TypeError, match="grad_scale: expected a number, got 'a'"):
        nll_forward_backward(logits, target, grad_scale="a")
    with pytest.raises(ValueError, match="grad_scale: expected a finite number of float32, got 1e"):
        nll_forward_backward(logits, target, grad_scale=1e300)


def test_bad_out():
    logits, target = np.zeros((5, 4), np.float32), np.zeros(5, int)
    for out in (np.zeros((5, 3), np.float32), np.zeros((5, 4))):
        with pytest.raises(ValueError, match=r"out: expected \(5, 4\) float32, got"):
            nll_forward_backward(logits, target, out=out)
    memory = np.zeros((9, 8), np.float32)
    overlapping = np.lib.stride_tricks.as_strided(memory, (5, 4), (8, 4))
    for out in (memory[:4, :5].T, memory[:5, ::2], memory[4::-1, :4], overlapping):
        with pytest.raises(ValueError, match="out: expected a writeable, aligned array whose rows"):
            nll_forward_backward(logits, target, out=out)
    with pytest.raises(
        TypeError, match="out: expected an array without a mask, got a MaskedArr"
    ) as e:
        nll_forward_backward(logits, target, out=np.ma.zeros((5, 4), np.float32))
    assert "ignore_index" not in str(e.value)


def test_out_whose_rows_are_apart(kernel_backend, rng):
    """The numbers between its rows stay as they are; so do they where it is the logits."""
    memory = np.full((5, 90), 7, np.float32)
    logits, target = draw(rng, 5, 70, "float32")
    given = {"label_smoothing": 0.1, "backend": kernel_backend}
    result, expected = nll_forward_backward(logits, target, **given)
    out = memory[:, :70]
    assert nll_forward_backward(logits, target, out=out, **given)[1] is out
    np.testing.assert_array_equal(out, expected)
    out[:] = 0
    expected = nll_backward(1.0, result, logits, target, **given)
    assert nll_backward(1.0, result, logits, target, out=out, **given) is out
    np.testing.assert_array_equal(out, expected)
    out[:] = logits
    nll_forward_backward(out, target, out=out, **given)
    np.testing.assert_array_equal(out, nll_forward_backward(logits, target, **given)[1])
    assert (memory[:, 70:] == 7).all()


def test_more_threads_than_any_machine_has(kernel_backend, rng):
    """As many as there are cores, or 64: OpenMP would end the process."""
    logits, target = draw(rng, 300, 70, "float32")
    many, one = (
        nll_forward(logits, target, threads=n, backend=kernel_backend) for n in (10**10, 1)
    )
    np.testing.assert_array_equal(many.loss, one.loss)


def test_backward_into_out(kernel_backend, rng):
    """Memory of its own, and that of the logits."""
    logits, target = draw(rng, 5, 2100, "float32")
    logits = np.ascontiguousarray(logits)
    given = {"label_smoothing": 0.1, "softcap": 3.0, "backend": kernel_backend}
    result = nll_forward(logits, target, **given)
    expected = nll_backward(0.5, result, logits, target, **given)
    for out in (np.empty_like(logits), logits):
        assert nll_backward(0.5, result, logits, target, out=out, **given) is out
        np.testing.assert_array_equal(out, expected)
    result = nll_forward(logits[:, :1], np.zeros(5, int))
    with pytest.raises(ValueError, match="out: expected an array of its own"):
        nll_backward(1.0, result, logits[:, :1], np.zeros(5, int), out=result.lse[:, None])


def test_an_lse_that_was_not_written_has_no_gradient(kernel_backend, rng):
    """That of an ignored row without statistics, whose logits are not read."""
    logits, target = draw(rng, 5, 31, "float32")
    ignored = target == -100
    plain, stats = (
        nll_forward(logits, target, stats=stats, backend=kernel_backend) for stats in (False, True)
    )
    assert not plain.lse[ignored].any()
    given = {"grad_lse": 1.0, "backend": kernel_backend}
    without = nll_backward(1.0, plain, logits, target, **given)
    with_stats = nll_backward(1.0, stats, logits, target, **given)
    assert not without[ignored].any()
    np.testing.assert_array_equal(without[~ignored], with_stats[~ignored])
    np.testing.assert_allclose(with_stats[ignored].sum(1), 1, rtol=1e-6)


def test_out_that_shares_memory():
    memory, target = np.zeros((6, 4), np.float32), np.zeros(5, int)
    probabilities = np.full((5, 4), 0.25, np.float32)
    for logits, target_, out in (
        (memory[:-1], target, memory[1:]),
        (memory[:5][::-1], target, memory[:5]),
        (memory[:5], probabilities, probabilities),
    ):
        with pytest.raises(ValueError, match="out: expected an array of its own"):
            nll_forward_backward(logits, target_, out=out)
    with pytest.raises(TypeError, match="out: expected an array, got list"):
        nll_forward_backward(memory[:5], target, out=[])


@pytest.mark.parametrize(("error", "message", "change"), BAD.values(), ids=BAD.keys())
def test_bad_input(error, message, change):
    arguments = {"logits": np.zeros((2, 4), np.float32), "target": [0, 1], **change}
    with pytest.raises(error, match=message):
        nll_forward(**arguments)


def test_out_of_an_empty_batch(kernel_backend):
    logits = np.zeros((0, 33), np.float32)
    _, gradient = nll_forward_backward(logits, np.zeros(0, int), out=logits, backend=kernel_backend)
    assert gradient is logits
