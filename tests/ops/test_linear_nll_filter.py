"""filter_eps of linear_nll: what it may leave out of gradients, and what it must not.

What a tile leaves out is decided above the kernels, so one build shows it.
"""

import pytest
import torch

from tests.support.linear_cases import loss_and_gradients, trained


# Each reduction has another bound of the upstream; little is left out, some, and most.
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("filter_eps", [1e-6, 1e-3, 0.5])
def test_what_the_filter_leaves_out_is_within_the_bound(filter_eps, reduction):
    x, w, b, target = trained()
    target[::5] = -100
    counted = target != -100
    upstream = torch.linspace(-2, 1, len(target)).double() if reduction == "none" else None
    largest = {"none": 2.0, "mean": 1 / float(counted.sum()), "sum": 1.0}[reduction]
    common = {"reduction": reduction, "upstream": upstream}
    tiles = {"workspace_mb": 4}
    exact = loss_and_gradients(x, w, b, target, **common, options=tiles)
    rough = loss_and_gradients(
        x, w, b, target, **common, options={**tiles, "filter_eps": filter_eps}
    )
    assert torch.equal(exact[0], rough[0])
    assert torch.equal(exact[3], rough[3])
    most = filter_eps * largest
    for index, other in ((1, w), (2, x[counted])):
        error = (exact[index] - rough[index]).norm(dim=1).max()
        assert 0 < error <= most * other.detach().norm(dim=1).sum()


def test_the_filter_keeps_what_counts():
    """The head of an untrained model: no probability is small, so nothing may change."""
    generator = torch.Generator().manual_seed(0)
    x, w, b = (
        (torch.randn(*shape, generator=generator) / 100).requires_grad_()
        for shape in ((600, 32), (500, 32), (500,))
    )
    target = torch.randint(500, (600,), generator=generator)
    common = {"reduction": "sum"}
    exact = loss_and_gradients(x, w, b, target, **common)
    rough = loss_and_gradients(x, w, b, target, **common, options={"filter_eps": "auto"})
    assert all(torch.equal(one, other) for one, other in zip(exact, rough, strict=True))


def test_the_filter_lets_nan_through():
    x, w, b, target = trained()
    with torch.no_grad():
        x[3, 0] = torch.nan
    options = {"filter_eps": 1e-3}
    _, of_x, of_w, _ = loss_and_gradients(x, w, b, target, options=options)
    assert of_x[3].isnan().all()
    assert of_w.isnan().all(1).all()


# One of each resolution that training has.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_auto_is_below_the_resolution_of_the_dtype(dtype):
    x, w, b, target = trained(dtype=dtype)
    exact = loss_and_gradients(x, w, b, target, reduction="sum")
    rough = loss_and_gradients(x, w, b, target, reduction="sum", options={"filter_eps": "auto"})
    for one, other in zip(exact[1:], rough[1:], strict=True):
        # Sums of many such gradients: far below the resolution of the largest.
        assert (one - other).abs().max() <= 4 * torch.finfo(dtype).eps * one.abs().max()
