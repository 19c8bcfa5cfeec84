"""neglog.sup_con alone; test_contrastive.py has what all losses share."""

from math import nan

import numpy as np
import pytest
import torch
from pytorch_metric_learning import losses as metric_learning

import neglog
from tests.support import contrastive_formulas as formulas
from tests.support.contrastive_cases import (
    gradients,
    labels_of,
    normal,
    pair,
)


# Rows without a mate count in no mean: some, most, all.
@pytest.mark.parametrize("labels", ["some alone", "most alone", "all alone"])
def test_sup_con_of_pytorch_metric_learning(backend, labels):
    (z, _), rows = pair(dtype=torch.float32), torch.arange(300)
    labels = {
        "some alone": labels_of(300) - 40,
        "most alone": rows.clamp(min=5),
        "all alone": rows,
    }[labels]
    theirs = metric_learning.SupConLoss(0.2)(z, labels)
    ours = neglog.sup_con(z, labels, 0.2)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    grads = (gradients(loss, (z,)) for loss in (ours, theirs))
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5)


# Narrower, signed, and as wide as the kernels read.
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64], ids=str)
def test_labels_of_any_integers(backend, dtype):
    (z, _), labels = pair(60), labels_of(60)
    expected = formulas.sup_con(z, labels)
    torch.testing.assert_close(neglog.sup_con(z, labels.to(dtype)), expected)


# Losses of e^-20 and of e^-100, in all dtypes that training has.
@pytest.mark.parametrize("temperature", [0.05, 0.01])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sup_con_of_sure_pairs(backend, dtype, temperature):
    """Only mates that are almost the same: losses near 0, of which rounding would be all."""
    generator = torch.Generator().manual_seed(1)
    centres = torch.linalg.qr(torch.randn(96, 96, generator=generator))[0][:48]
    labels = torch.arange(48).repeat(2)
    z = (centres[labels] + 0.01 * torch.randn(96, 96, generator=generator)).to(dtype)
    rows = neglog.sup_con(z, labels, temperature, "none")
    exact = neglog.sup_con(z.double(), labels, temperature, "none", backend="torch")
    assert bool((rows >= 0).all())
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2e-3, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(rows.double(), exact, rtol=0.2, atol=tolerance)
    mean = neglog.sup_con(z, labels, temperature)
    torch.testing.assert_close(mean, rows.mean(), rtol=2e-2, atol=1e-6)


def test_sup_con_of_one_long_row(backend):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(40, 6, generator=generator)
    z[3] *= 1e4
    labels = torch.arange(40) // 4
    ours = neglog.sup_con(z, labels, 1e4, "none", normalize=False)
    exact = neglog.sup_con(z.double(), labels, 1e4, "none", normalize=False)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)


# As the authors' SupContrast takes them: with labels, and without; one view and several.
@pytest.mark.parametrize("views", [1, 2, 3])
@pytest.mark.parametrize("labelled", [True, False])
def test_views(backend, views, labelled):
    """Rows (N, V, D) are N * V rows, each with its sample's label, or with its sample for one."""
    z = normal(7, views, 5).requires_grad_()
    labels = labels_of(7) if labelled else None
    of_rows = (torch.arange(7) if labels is None else labels).repeat_interleave(views)
    for reduction in ("mean", "sum", "none"):
        found = neglog.sup_con(z, labels, 0.2, reduction)
        expected = formulas.sup_con(z.flatten(0, 1), of_rows, 0.2, reduction)
        assert reduction != "none" or found.shape == (7, views)
        torch.testing.assert_close(found.flatten(), expected.flatten())
        torch.testing.assert_close(*(gradients(x.flatten(), (z,)) for x in (found, expected)))


def test_two_views_without_labels_are_nt_xent(backend):
    z_i, z_j = pair(31, 5)
    found = neglog.sup_con(torch.stack([z_i, z_j], 1), temperature=0.5)
    torch.testing.assert_close(found, neglog.nt_xent(z_i, z_j))


# What datasets hold: names, pairs, arrays of either, a tensor for each sample.
@pytest.mark.parametrize(
    "labels",
    [
        ["cat", "dog", "cat", "owl", "dog", "cat"],
        ("cat", "dog", "cat", "owl", "dog", "cat"),
        [("a", 1), ("a", 2), ("a", 1), ("b", 1), ("a", 2), ("a", 1)],
        np.array(["cat", "dog", "cat", "owl", "dog", "cat"]),
        np.array([7, -1, 7, 2**60, -1, 7]),
        np.array([0.5, 1.5, 0.5, 2.5, 1.5, 0.5]),
        list(torch.tensor([7, -1, 7, 5, -1, 7])),
        tuple(torch.tensor([7, -1, 7, 5, -1, 7], dtype=torch.uint8)),
    ],
    ids=[
        "list",
        "tuple",
        "pairs",
        "array of str",
        "array of int",
        "array of float",
        "list of tensors",
        "tuple of tensors",
    ],
)
def test_labels_that_are_no_tensor(backend, labels):
    z = normal(6, 5)
    expected = neglog.sup_con(z, torch.tensor([0, 1, 0, 2, 1, 0]))
    torch.testing.assert_close(neglog.sup_con(z, labels), expected)
    views = torch.stack([z, normal(6, 5, seed=1)], 1)
    expected = neglog.sup_con(views, torch.tensor([0, 1, 0, 2, 1, 0]))
    torch.testing.assert_close(neglog.sup_con(views, labels), expected)


# One object, several, an array's, and in a pair.
@pytest.mark.parametrize(
    "labels",
    [[nan, nan, "a", "a"], [nan, float("nan"), 1, 1], np.array([nan, nan, 1, 1]),
     [("x", nan), ("x", nan), 1, 1]],
)  # fmt: skip
def test_a_nan_is_a_label_of_its_own(labels):
    z = normal(4, 5)
    expected = neglog.sup_con(z, torch.tensor([0, 1, 2, 2]))
    torch.testing.assert_close(neglog.sup_con(z, labels), expected)
