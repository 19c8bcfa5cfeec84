"""Every loss under what traces, maps or fakes it: right numbers, or torch's own kind of error.

tests/losses/test_export.py has torch.export and torch.compile with dynamic rows.
"""

import warnings

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import neglog
from tests.support.processes import python
from tests.support.traced_calls import (
    CALLS,
    IGNORED,
    ROWS,
    TARGET,
    X,
    assert_same,
    of_rows,
    outcome,
)

every_call = pytest.mark.parametrize(("function", "given"), CALLS.values(), ids=CALLS.keys())


def assert_shaped_alike(found, expected):
    for mine, other in zip(found, expected, strict=True):
        assert (mine.shape, mine.dtype) == (other.shape, other.dtype)


@every_call
def test_meta(function, given):
    if isinstance(function, torch.nn.Module):
        function = function.to("meta")
    found = outcome(function, [x.to("meta") for x in given])
    assert all(x.is_meta for x in found)
    assert_shaped_alike(found, outcome(function, given))


@every_call
def test_fake(function, given):
    with FakeTensorMode() as mode:
        found = outcome(function, [mode.from_tensor(x) for x in given])
    assert_shaped_alike(found, outcome(function, given))


# The gradient too is a part of the graph where it is taken inside. A graph of real numbers differs
# from a symbolic one by its sizes alone.
@pytest.mark.parametrize(
    ("mode", "inside"), [("real", True), ("symbolic", True), ("symbolic", False)]
)
@every_call
def test_make_fx(function, given, mode, inside):
    run = (lambda *values: tuple(outcome(function, values))) if inside else function
    graph = make_fx(run, tracing_mode=mode)(*given)
    for count in (ROWS,) if mode == "real" else (ROWS, 2, 600):
        rows = of_rows(given, count)
        found, expected = (
            f(*rows) if inside else outcome(f, rows) for f in (graph, run)
        )  # fmt: skip
        assert_same(found, expected)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("learns", [False, True])
@every_call
def test_jit_trace(function, given, learns):
    """Traced where all rows count, with a gradient or without; then a third are ignored and NaN."""
    first = [x.clone() if x.is_floating_point() else x.clamp(min=0) for x in given]
    traced = torch.jit.trace(function, (first[0].requires_grad_(learns), *first[1:]))
    later = [x.clone() for x in given]
    if not later[1].is_floating_point() and bool((later[1] == IGNORED).any()):
        later[0][later[1] == IGNORED] = torch.nan
    assert_same(outcome(traced, later), outcome(function, later))


def test_a_jit_trace_of_a_tensor_for_a_number():
    """logit_scale is an input of the graph, as it is of the function."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(
            lambda x, scale: neglog.cross_entropy(x, TARGET, logit_scale=scale),
            (X, torch.tensor(1.0)),
        )
    other = torch.tensor(3.0)
    expected = neglog.cross_entropy(X, TARGET, logit_scale=other)
    torch.testing.assert_close(traced(X, other), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "module", [neglog.nn.CrossEntropyLoss, neglog.nn.InfoNCELoss, neglog.nn.CLIPLoss]
)
def test_jit_script_is_refused_by_name(module):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), module())
    says = f"expected no {module.__name__}.* use torch.compile or torch.export"
    with pytest.raises(torch.jit.frontend.NotSupportedError, match=says):
        torch.jit.script(model)


# What makes memory without a device makes it where this says, and a kernel would write to address
# 0. 1,100,000 logits: their gradient has memory of another kind (kernels/memory.py).
DEFAULT_DEVICE = """
import warnings, torch, neglog
warnings.simplefilter("ignore")
x, t, w = torch.randn(1100, 1000), torch.arange(1100) % 1000, torch.randn(99, 1000)
def losses(x, t, w):
    x.requires_grad_()
    return [
        neglog.cross_entropy(x[:9], t[:9]),
        neglog.cross_entropy(x, t),
        neglog.cross_entropy(x, t, return_stats=True).loss,
        neglog.cross_entropy(x * 1, t, inplace_backward=True),
        neglog.linear_cross_entropy(x, w, t % 99),
        neglog.info_nce(x[:99], x[1:100]),
        neglog.siglip_loss(x[:99], x[1:100], 1.0, 0.0),
        neglog.nt_xent(x[:99], x[1:100]),
        neglog.sup_con(x[:99], t[:99] // 2),
    ]
def gradients(losses):
    return [torch.autograd.grad(loss, x, retain_graph=True)[0] for loss in losses]
traced = torch.jit.trace(neglog.cross_entropy, (x, t))
expected = losses(x, t, w)
expected += gradients(expected)
torch.set_default_device("meta")
found = losses(x, t, w)
found += gradients(found)
with torch.no_grad():
    found += losses(x, t, w) + [traced(x, t)]
for mine, other in zip(found, expected + expected[:9] + expected[1:2]):
    torch.testing.assert_close(mine, other)
print("equal")
"""


def test_a_default_device_without_memory():
    run = python(DEFAULT_DEVICE)
    assert run.stdout == "equal\n", run.stderr[-2000:]


def mapped(function, given):
    return torch.stack([function(*(x[i] for x in given)) for i in range(len(given[0]))])


@every_call
def test_vmap(function, given):
    """Of values, and of gradients; every argument is mapped over."""
    batch = [torch.stack([x, x.flip(0)]) for x in given]
    slope = torch.func.grad(lambda *values: function(*values).sum())
    for run in (function, slope):
        assert_same([torch.vmap(run)(*batch)], [mapped(run, batch)])


# torch's own functions have no batch of 0 there: a division by a number, and index_add. An op takes
# zeros in its place, which are no log-probabilities.
OF_NO_BATCH = {
    "siglip_loss": IndexError, "sup_con": RuntimeError, "kl_div_loss, by torch": IndexError,
    "kl_div_loss, named": ValueError,
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_vmap_over_a_batch_of_0(name):
    function, given = CALLS[name]
    batch = [x.new_empty(0, *x.shape) for x in given]
    slope = torch.func.grad(lambda *values: function(*values).sum())
    if name in OF_NO_BATCH:
        with pytest.raises(OF_NO_BATCH[name]):
            torch.vmap(function)(*batch)
        return
    value = torch.vmap(function)(batch[0].requires_grad_(), *batch[1:])
    assert value.shape == (0, *function(*given).shape)
    assert torch.autograd.grad(value.sum(), batch[0])[0].shape == batch[0].shape
    assert torch.vmap(slope)(*batch).shape == batch[0].shape


@every_call
def test_jacobians(function, given):
    """Backwards, which maps over a kernel's backward, and forwards, by torch's own formula."""
    given = of_rows(given, 7)

    def of_first(x):
        return function(x, *given[1:])

    backwards, forwards = (
        jacobian(of_first)(given[0]) for jacobian in (torch.func.jacrev, torch.func.jacfwd)
    )
    torch.testing.assert_close(backwards, forwards, rtol=1e-3, atol=1e-5)
    twice, hessian = (
        of(lambda x: of_first(x).sum())(given[0])
        for of in (lambda f: torch.func.jacrev(torch.func.jacrev(f)), torch.func.hessian)
    )
    torch.testing.assert_close(twice, hessian, rtol=1e-3, atol=1e-4)
