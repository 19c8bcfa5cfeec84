"""neglog.clip_loss and siglip_loss alone; test_contrastive.py has what all losses share."""

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
