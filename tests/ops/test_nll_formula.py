"""nll in torch's own functions, against the oracle where it is hard: special values, saturation."""

import numpy as np
import pytest
import torch

from neglog import reference
from neglog.ops.nll import formula
from neglog.ops.nll.schema import MEAN, NONE, Options
from tests.support.errors import relative_error
from tests.support.nll_cases import BUDGET, GRADIENT_BUDGET, extreme_rows

PLAIN = Options(NONE, -100, 0.0, 1.0, 0.0, 0.0)


def run(logits, target, options=PLAIN, grad=1.0, grad_lse=0.0, grad_entropy=0.0):
    """Loss, lse, correct, entropy, argmax and gradient by the formula, and the oracle's."""
    x = torch.from_numpy(logits).requires_grad_()
    loss, lse, _, correct, entropy, argmax = formula.nll(
        x, torch.from_numpy(target), None, None, None, options, True
    )
    total = loss * grad + lse * torch.as_tensor(grad_lse)
    if np.any(grad_entropy):  # 0 * NaN otherwise
        total = total + entropy * torch.as_tensor(grad_entropy)
    (made,) = torch.autograd.grad(total.sum(), x)
    names = ("label_smoothing", "logit_scale", "softcap", "z_loss")
    truth = reference.nll(
        logits, target, reduction="none", grad_loss=grad, grad_lse=grad_lse,
        grad_entropy=grad_entropy,
        **{name: getattr(options, name) for name in names},
    )  # fmt: skip
    found = [t.detach().numpy() for t in (loss, lse, correct, entropy, argmax, made)]
    return found, (
        truth.loss, truth.lse, truth.correct, truth.entropy, truth.argmax, truth.grad
    )  # fmt: skip


# Rows of inf, -inf, NaN and 1e4; a scale below 0 makes inf of -inf. The target is at the maximum,
# or not, or masked. Without and with a gradient of the log-sum-exp, and of the entropy.
@pytest.mark.parametrize("others", [(0.0, 0.0), (0.5, 0.0), (0.0, 0.5)])
@pytest.mark.parametrize("scale", [1.0, -1.0])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_extremes(dtype, scale, others):
    logits = extreme_rows(dtype)
    for column in (0, 1, 4, -100):
        target = np.full(len(logits), column)
        found, truth = run(logits, target, PLAIN._replace(logit_scale=scale), 1.0, *others)
        *values, gradient = zip(found, truth, strict=True)
        for ours, theirs in values:
            assert relative_error(ours, theirs) < BUDGET[dtype]
        assert relative_error(*gradient) < GRADIENT_BUDGET[dtype]


def test_ignored_rows_of_nan_have_no_gradient_under_a_softcap_and_twice():
    """0 * NaN comes back through each function between logits and loss, and in each derivative."""
    logits = torch.tensor([[1.0, 2.0], [torch.nan, 0.0], [torch.inf, 0.0]], dtype=torch.float64)
    logits.requires_grad_()
    target = torch.tensor([0, -100, -100])
    options = Options(NONE, -100, 0.1, 1.5, 3.0, 0.1)
    loss, lse, *_ = formula.nll(logits, target, None, None, None, options, False)
    upstream = loss.sum() + lse[0]
    (grad,) = torch.autograd.grad(upstream, logits, create_graph=True)
    (second,) = torch.autograd.grad((grad**2).sum(), logits)
    for made in (grad, second):
        assert made[0].isfinite().all()
        assert made[0].any()
        assert not made[1:].any()


def test_gradient_of_a_large_log_sum_exp():
    """Near 1e5 a float32 log-sum-exp is off by 4e-3, and must not be what exp is taken with."""
    logits = np.float32(np.random.default_rng(0).standard_normal((4, 50)) - 1e5)
    found, truth = run(logits, np.zeros(4, np.int64), grad=0.0, grad_lse=1.0)
    np.testing.assert_allclose(found[-1], truth[-1], rtol=1e-6)


# tanh(10) is 1 in float32, and its derivative is 8e-9.
@pytest.mark.parametrize("magnitude", [0.6, 0.7, 3.0, 10.0, 30.0])
def test_gradient_of_a_saturated_softcap(magnitude):
    logits = np.float32([[magnitude, 0.0, -magnitude]])
    found, truth = run(logits, np.array([1]), PLAIN._replace(softcap=1.0))
    np.testing.assert_allclose(found[-1], truth[-1], rtol=2e-6)


def test_derivatives_under_a_softcap():
    """Of both forms of tanh, and on both sides of 0."""
    logits = torch.tensor([[0.0, 0.3, -0.5, 1.0, -4.0]], dtype=torch.float64, requires_grad=True)
    target = torch.tensor([2])
    options = Options(NONE, -100, 0.1, 1.5, 3.0, 0.1)

    def loss_and_lse(x):
        return formula.nll(x, target, None, None, None, options, False)[:2]

    assert torch.autograd.gradcheck(loss_and_lse, logits, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(loss_and_lse, logits)


# As torch and the kernels have it: the mean over nothing is NaN.
@pytest.mark.parametrize("probabilities", [False, True], ids=["index", "probabilities"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_no_classes(label_smoothing, probabilities):
    logits = torch.zeros(3, 0, requires_grad=True)
    target = torch.zeros(3, 0) if probabilities else torch.full((3,), -100)
    options = PLAIN._replace(label_smoothing=label_smoothing)
    loss, lse, _, correct, entropy, _ = formula.nll(logits, target, None, None, None, options, True)
    assert (loss.tolist(), entropy.tolist(), correct.tolist()) == ([0] * 3, [0] * 3, [False] * 3)
    assert lse.tolist() == [-torch.inf] * 3
    assert torch.autograd.grad(loss.sum() + lse.sum(), logits)[0].shape == (3, 0)
    mean = formula.nll(logits, target, None, None, None, options._replace(reduction=MEAN), False)[0]
    assert mean.isnan()
