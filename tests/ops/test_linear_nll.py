"""The tiles of linear_cross_entropy: what they may leave out, their bits, their memory."""

import subprocess
import sys

import pytest
import torch

import neglog
from tests.support.backends import KERNELS


def trained(rows=2048, features=32, vocab=4096, dtype=torch.float64):
    """A head that is sure of a few classes for each row, as a trained one is."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(vocab, features, generator=generator, dtype=torch.float64)
    target = torch.randint(vocab // 4, (rows,), generator=generator)  # most classes never occur
    input = weight[target] + 0.1 * torch.randn(rows, features, generator=generator).double()
    bias = torch.zeros(vocab, dtype=torch.float64)
    head = tuple(part.to(dtype).requires_grad_() for part in (input, weight, bias))
    return *head, target


def gradients(x, w, b, target, upstream=None, **options):
    loss = neglog.linear_cross_entropy(x, w, target, linear_bias=b, **options)
    return loss, *torch.autograd.grad(loss, (x, w, b), upstream)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("filter_eps", [1e-6, 1e-3, 0.5])
@pytest.mark.parametrize("backend", KERNELS)
def test_what_the_filter_leaves_out_is_within_the_bound(backend, filter_eps, reduction):
    x, w, b, target = trained()
    target[::5] = -100
    counted = target != -100
    upstream = torch.linspace(-2, 1, len(target)).double() if reduction == "none" else None
    largest = {"none": 2.0, "mean": 1 / float(counted.sum()), "sum": 1.0}[reduction]
    common = {"reduction": reduction, "upstream": upstream, "backend": backend}
    tiles = {"workspace_mb": 4}
    exact = gradients(x, w, b, target, **common, options=tiles)
    rough = gradients(x, w, b, target, **common, options={**tiles, "filter_eps": filter_eps})
    assert torch.equal(exact[0], rough[0])
    assert torch.equal(exact[3], rough[3])
    most = filter_eps * largest
    for index, other in ((1, w), (2, x[counted])):
        error = (exact[index] - rough[index]).norm(dim=1).max()
        assert 0 < error <= most * other.detach().norm(dim=1).sum()


@pytest.mark.parametrize("backend", KERNELS)
def test_the_filter_keeps_what_counts(backend):
    """The head of an untrained model: no probability is small, so nothing may change."""
    generator = torch.Generator().manual_seed(0)
    x, w, b = (
        (torch.randn(*shape, generator=generator) / 100).requires_grad_()
        for shape in ((600, 32), (500, 32), (500,))
    )
    target = torch.randint(500, (600,), generator=generator)
    common = {"backend": backend, "reduction": "sum"}
    exact = gradients(x, w, b, target, **common)
    rough = gradients(x, w, b, target, **common, options={"filter_eps": "auto"})
    assert all(torch.equal(one, other) for one, other in zip(exact, rough, strict=True))


@pytest.mark.parametrize("backend", KERNELS)
def test_the_filter_lets_nan_through(backend):
    x, w, b, target = trained()
    with torch.no_grad():
        x[3, 0] = torch.nan
    options = {"filter_eps": 1e-3}
    _, of_x, of_w, _ = gradients(x, w, b, target, backend=backend, options=options)
    assert of_x[3].isnan().all()
    assert of_w.isnan().all(1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_auto_is_below_the_resolution_of_the_dtype(dtype):
    x, w, b, target = trained(dtype=dtype)
    exact = gradients(x, w, b, target, reduction="sum")
    rough = gradients(x, w, b, target, reduction="sum", options={"filter_eps": "auto"})
    for one, other in zip(exact[1:], rough[1:], strict=True):
        # Sums of many such gradients: far below the resolution of the largest.
        assert (one - other).abs().max() <= 4 * torch.finfo(dtype).eps * one.abs().max()


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("backend", KERNELS)
def test_threads_and_workspaces_change_only_roundings(backend, reduction):
    x, w, b, target = trained(rows=700, vocab=3000)
    upstream = torch.linspace(-1, 1, 700).double() if reduction == "none" else None
    most = torch.get_num_threads()
    results = []
    try:
        for threads, workspace in ((1, 64), (2, 64), (most, 2), (most, 7)):
            torch.set_num_threads(threads)
            results.append(
                gradients(
                    x, w, b, target, reduction=reduction, upstream=upstream, backend=backend,
                    options={"workspace_mb": workspace},
                )
            )  # fmt: skip
    finally:
        torch.set_num_threads(most)
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


PEAK = """
import sys, torch, neglog
from resource import RUSAGE_SELF, getrusage

def step(rows):
    x = torch.randn(rows, 64, requires_grad=True)
    w = torch.randn(65536, 64, requires_grad=True)
    target = torch.randint(65536, (rows,))
    neglog.linear_cross_entropy(x, w, target, backend=sys.argv[1]).backward()

def peak():
    return getrusage(RUSAGE_SELF).ru_maxrss >> 10

step(64)  # what libraries take at their first call, and the head with its gradient
before = peak()
step(8192)
print(peak() - before)
"""


@pytest.mark.parametrize("backend", KERNELS)
def test_logits_never_lie_in_memory(backend):
    made = subprocess.run(
        [sys.executable, "-c", PEAK, backend], capture_output=True, text=True, check=True
    )
    assert int(made.stdout) < 160  # MB; the logits of 8192 rows are 2048
