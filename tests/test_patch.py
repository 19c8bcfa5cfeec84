"""patch_torch: neglog's cross_entropy in the place of torch's, and back."""

import pytest
import torch
import torch.nn.functional as F

import neglog
from neglog import dispatch
from tests.support.backends import BEST


def test_patch_torch_and_back():
    own = F.cross_entropy
    logits, target = torch.randn(30, 40), torch.arange(30)
    expected = own(logits, target)
    with dispatch.record() as ran:
        with neglog.patch_torch():
            torch.testing.assert_close(torch.nn.CrossEntropyLoss()(logits, target), expected)
        assert F.cross_entropy is own
        assert ran == [f"nll:{BEST}"]
        patch = neglog.patch_torch()
        assert F.cross_entropy is neglog.cross_entropy
        F.cross_entropy(logits, target)
        patch.undo()
        patch.undo()
    assert F.cross_entropy is own
    assert len(ran) == 2


def test_patches_end_in_any_order():
    own = F.cross_entropy
    first, second = neglog.patch_torch(), neglog.patch_torch()
    first.undo()
    first.undo()
    assert F.cross_entropy is neglog.cross_entropy
    with neglog.patch_torch():
        second.undo()
        assert F.cross_entropy is neglog.cross_entropy
    assert F.cross_entropy is own


def test_a_patch_can_be_entered_again():
    patch = neglog.patch_torch()
    patch.undo()
    for _ in range(2):
        with patch:
            assert F.cross_entropy is neglog.cross_entropy
        assert F.cross_entropy is not neglog.cross_entropy


def test_patch_torch_refuses_a_stranger(monkeypatch):
    monkeypatch.setattr(F, "cross_entropy", F.nll_loss)
    with pytest.raises(RuntimeError, match=r"patch_torch: .* got torch.nn.functional.nll_loss"):
        neglog.patch_torch()
    assert F.cross_entropy is F.nll_loss


def test_undo_leaves_what_somebody_else_put_there(monkeypatch):
    own = F.cross_entropy
    patch = neglog.patch_torch()
    monkeypatch.setattr(F, "cross_entropy", lambda *given: 0.0)
    patch.undo()
    assert F.cross_entropy(1, 2) == 0.0
    monkeypatch.undo()
    F.cross_entropy = own
