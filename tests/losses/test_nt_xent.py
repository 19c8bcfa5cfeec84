"""neglog.nt_xent and dcl alone; test_contrastive.py has what all losses share."""

import torch
from pytorch_metric_learning import losses as metric_learning

import neglog
from tests.support.contrastive_cases import (
    gradients,
    pair,
)
from tests.support.contrastive_formulas import INF


def test_pytorch_metric_learning(backend):
    z_i, z_j = pair(60, dtype=torch.float32)
    theirs = metric_learning.SelfSupervisedLoss(metric_learning.NTXentLoss(0.2))(z_i, z_j)
    ours = neglog.nt_xent(z_i, z_j, 0.2)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    grads = (gradients(loss, (z_i, z_j)) for loss in (ours, theirs))
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5)


def test_decoupled_from_nothing(backend):
    z_i, z_j = pair(1, 3)
    assert neglog.dcl(z_i, z_j) == -INF
    assert torch.autograd.grad(neglog.dcl(z_i, z_j), z_i)[0].isfinite().all()


def test_decoupled_from_rows_of_one_id_alone(backend):
    z_i, z_j = pair(4, 3)
    ids = torch.zeros(4, dtype=torch.long)
    loss = neglog.dcl(z_i, z_j, reduction="none", exclude=ids)
    assert loss.tolist() == [-INF] * 8
    assert torch.autograd.grad(loss.sum(), z_i)[0].isfinite().all()
