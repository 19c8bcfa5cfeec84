"""fuse(model) on models of transformers: the model's own loss and gradients, without its logits.

All hand-written models are here, as each stands for something that a model does with its logits:
a scale, a cap, a bias, a row selected, an auxiliary loss added. The classes of transformers one and
all are for `python -m tests.support.sweep`, whose result is docs/trainers/models.md.
"""

import pytest
import torch

from tests.support import fused_models, tiny_models
from tests.support.fused_models import fuse, unfuse


@pytest.mark.parametrize("name", tiny_models.NAMES)
def test_loss_and_gradients_without_logits(name):
    model, given = tiny_models.build(name)
    plain = fused_models.step(model, given)
    assert plain.made, "the watch sees a head that makes its logits"
    assert not plain.fused
    assert fuse(model) is model
    fused = fused_models.step(model, given)
    assert fused.fused
    assert fused.made == []
    assert fused_models.difference(plain, fused) <= fused_models.TOLERANCE


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "bert", "t5", "bart", "llava"])
def test_logits_in_evaluation_and_unfused_again(name):
    """A model for each way to the head: plain, capped, biased, scaled, a bias after, nested."""
    model, given = tiny_models.build(name)
    plain = fused_models.step(model, given)
    with torch.no_grad():
        logits = model(**given).logits
        fuse(model)
        assert torch.equal(model(**given).logits, logits)
    torch.testing.assert_close(+model(**given).logits, logits)
    unfuse(model)
    again = fused_models.step(model, given)
    assert again.made
    assert not again.fused
    assert torch.equal(again.loss, plain.loss)
