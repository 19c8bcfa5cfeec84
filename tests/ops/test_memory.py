"""Memory of the ops: gradients that can be resized, and tensors that begin within a number."""

import pytest
import torch
from torch.nn import Parameter

import neglog
from neglog import kernels
from neglog.kernels.memory import LARGE
from neglog.losses.cross_entropy import cross_entropy
from neglog.ops.nll import cpu as nll_cpu
from neglog.ops.pairs import cpu as pairs_cpu

ROWS = 1100  # times 1000 floats: more than 4 MB


def leaves_of(name):
    """A loss, and parameters whose gradients are large."""
    table = Parameter(torch.randn(ROWS, 1000))
    target = torch.arange(ROWS) % 1000
    if name == "logits":
        return cross_entropy(table, target), [table]
    if name == "linear":
        bias, x = Parameter(torch.zeros(ROWS)), Parameter(torch.randn(8, 1000))
        loss = neglog.linear_cross_entropy(x, table, torch.arange(8), linear_bias=bias)
        return loss, [table, bias, x]
    other = Parameter(torch.randn(ROWS, 1000))
    scale = [10.0] if name == "clip_loss" else [10.0, -10.0]
    return getattr(neglog, name)(table, other, *scale), [table, other]


# FSDP frees the gradients of parameters by resizing their storages to nothing.
@pytest.mark.parametrize("name", ["logits", "linear", "clip_loss", "siglip_loss"])
def test_storages_of_parameters_gradients_can_be_resized(name):
    loss, parameters = leaves_of(name)
    loss.backward()
    assert any(p.grad.nbytes >= LARGE for p in parameters)
    for parameter in parameters:
        parameter.grad.untyped_storage().resize_(0)
        assert parameter.grad.untyped_storage().nbytes() == 0


def shifted(tensor):
    """The same numbers, one byte past where they should begin."""
    memory = bytearray(tensor.nbytes + 1)
    made = torch.frombuffer(memory, dtype=tensor.dtype, offset=1).view(tensor.shape)
    made.copy_(tensor)
    assert made.data_ptr() % made.itemsize
    return made


class Aligned:
    """Kernels that refuse an address at which no float or int64 can begin."""

    def __init__(self, kernels):
        self._kernels = kernels

    def __getattr__(self, name):
        function = getattr(self._kernels, name)

        def checked(*arguments):
            for x in torch.utils._pytree.tree_leaves(arguments):
                if isinstance(x, int) and x > 2**32:  # the heap's addresses
                    assert x % 2 == 0
            return function(*arguments)

        return checked


@pytest.fixture
def aligned_kernels(monkeypatch):
    load = kernels.load
    monkeypatch.setattr(kernels, "load", lambda *given: Aligned(load(*given)))
    assert nll_cpu.kernels is pairs_cpu.kernels is kernels


@pytest.mark.parametrize("place", ["few", "many", "in place"])
@pytest.mark.parametrize("probabilities", [False, True])
def test_misaligned_rows(aligned_kernels, probabilities, place):
    rows = 4000 if place == "many" else 6
    logits, weight = torch.randn(rows, 40), torch.rand(40)
    target = torch.rand(rows, 40) if probabilities else torch.arange(rows) % 40
    grad = torch.rand(rows)

    def run(*tensors):
        x, t, w, g = tensors
        x.requires_grad_()
        given = x * 1 if place == "in place" else x
        loss = cross_entropy(
            given, t, w, reduction="none", label_smoothing=0.1,
            inplace_backward=place == "in place",
        )  # fmt: skip
        return loss.detach(), *torch.autograd.grad(loss, x, g)

    made = run(*map(shifted, (logits, target, weight, grad)))
    torch.testing.assert_close(made, run(logits, target, weight, grad), rtol=0, atol=0)


def test_misaligned_logits_in_place(aligned_kernels):
    logits, target = torch.randn(6, 40), torch.arange(6)
    expected = logits.clone()
    torch.ops.neglog.nll_(expected, target, None, None, 1, -100, 0.0, 1.0, 0.0, 0.0, False, "")
    made = shifted(logits)
    torch.ops.neglog.nll_(made, target, None, None, 1, -100, 0.0, 1.0, 0.0, 0.0, False, "")
    torch.testing.assert_close(made, expected, rtol=0, atol=0)


def test_misaligned_heads_and_embeddings(aligned_kernels):
    x, table = torch.randn(6, 16), torch.randn(40, 16)
    target, weight, grad = torch.arange(6), torch.rand(40), torch.rand(6)

    def run(x, table, target, weight, grad):
        loss = neglog.linear_cross_entropy(x, table, target, weight=weight, reduction="none")
        rows = neglog.info_nce(x, table[:6], reduction="none")
        x.requires_grad_()
        of_linear = neglog.linear_cross_entropy(x, table, target, weight=weight, reduction="none")
        of_pairs = neglog.info_nce(x, table[:6], reduction="none")
        gradients = [torch.autograd.grad(made, x, grad)[0] for made in (of_linear, of_pairs)]
        return loss, rows, *gradients

    given = (x, table, target, weight, grad)
    torch.testing.assert_close(run(*map(shifted, given)), run(*given))
