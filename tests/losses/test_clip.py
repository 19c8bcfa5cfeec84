"""neglog.clip_loss and siglip_loss alone; test_contrastive.py has what all losses share."""

import pytest
import torch

import neglog
from tests.support import contrastive_formulas as formulas
from tests.support.contrastive_cases import (
    pair,
)


def test_numbers_for_scale_and_bias(backend):
    image, text = pair(unit=True)
    torch.testing.assert_close(
        neglog.clip_loss(image, text, 20.0, 5.0), formulas.clip_loss(image, text, 20.0)
    )
    torch.testing.assert_close(
        neglog.siglip_loss(image, text, 20, -9), formulas.siglip_loss(image, text, 20, -9)
    )


def test_siglip_without_a_bias(backend):
    """None, as open_clip's SigLipLoss takes it."""
    image, text = pair(unit=True)
    expected = formulas.siglip_loss(image, text, 20, 0)
    torch.testing.assert_close(neglog.siglip_loss(image, text, 20, None), expected)
    torch.testing.assert_close(neglog.nn.SigLIPLoss()(image, text, 20, None), expected)


# Infinite too, whose product with 0 is NaN.
@pytest.mark.parametrize("value", [0.5, torch.inf])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_the_bias_of_clip_has_a_gradient_of_zero(backend, value, shape):
    """Not none, for which DistributedDataParallel would wait."""
    image, text = (x.float() for x in pair(unit=True))
    bias = torch.nn.Parameter(torch.full(shape, value, dtype=torch.float64))
    loss = neglog.clip_loss(image, text, 20.0, bias)
    loss.backward()
    assert torch.equal(bias.grad, torch.zeros_like(bias))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, neglog.clip_loss(image, text, 20.0))
    of_bias = torch.func.grad(lambda bias: neglog.clip_loss(image, text, 20.0, bias.sum()))(bias)
    assert torch.equal(of_bias, torch.zeros_like(bias))
