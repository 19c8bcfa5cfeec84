"""The ops of pairs: derivatives, opcheck, what is kept, bits, threads, memory."""

from functools import partial

import pytest
import torch
from torch.library import opcheck

import neglog
from neglog import route
from neglog.ops.pairs.schema import Pairs
from tests.support import contrastive_formulas as formulas
from tests.support.backends import BEST, NUMBA
from tests.support.contrastive_cases import (
    FORMS,
    LOSSES,
    OF_ONE_NUMBER,
    TILES,
    case,
    form,
    gradients,
    learned,
    normal,
    of_learned,
)
from tests.support.processes import python


@pytest.mark.parametrize("name", LOSSES)
def test_derivatives_of_losses(kernel_backend, name):
    for reduction in ("none", "mean")[name in OF_ONE_NUMBER :]:
        options = {} if name in OF_ONE_NUMBER else {"reduction": reduction}
        arguments = case(name, 5, 3, temperature=0.5)
        function = partial(getattr(neglog, name), options=TILES, **options)
        function, inputs = of_learned(function, arguments)
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


# All forms, by the best build: test_info_nce.py has each backend's gradients of each.
@pytest.mark.parametrize("name", FORMS)
def test_derivatives_of_forms(name):
    arguments, options = form(name, "of each row", rows=4, keys=3, features=2)
    function, inputs = of_learned(partial(neglog.info_nce, **options), arguments)
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


# Log-sum-exps over other keys, over those of the batch too, and without some of these.
@pytest.mark.parametrize("name", ["queue, weights", "further, weights", "exclude, symmetric"])
def test_derivatives_of_statistics(name):
    arguments, options = form(name, "of each row", rows=4, keys=3, features=2)
    statistics = partial(neglog.info_nce, return_stats=True, reduction="none", **options)
    function, inputs = of_learned(lambda *given: statistics(*given)[:2], arguments)
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


# Each input of each loss in turn: which gradients are formed is asked in Python.
@pytest.mark.parametrize("frozen", [0, 1, 2])
@pytest.mark.parametrize("name", LOSSES)
def test_frozen_parts_have_no_gradient(name, frozen):
    arguments = list(case(name, 60, 5))
    places = [i for i, x in enumerate(arguments) if isinstance(x, torch.Tensor) and x.requires_grad]
    frozen = places[frozen % len(places)]
    arguments[frozen] = arguments[frozen].detach()
    inputs = learned(arguments)
    grads = (gradients(getattr(home, name)(*arguments), inputs) for home in (neglog, formulas))
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("name", LOSSES)
def test_second_derivative_and_retained_graph(name):
    arguments = case(name, 60, 5)
    inputs = learned(arguments)
    loss = getattr(neglog, name)(*arguments, options=TILES)
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    twice = torch.autograd.grad(2 * loss, inputs, retain_graph=True)
    torch.testing.assert_close(twice, tuple(2 * g for g in first))

    def penalty(function):
        grads = torch.autograd.grad(function(*arguments), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), inputs)

    torch.testing.assert_close(penalty(getattr(neglog, name)), penalty(getattr(formulas, name)))


# The ops themselves


def pairs_of(rows=7, keys=7, features=3, columns=True, temperature=()):
    query, key = normal(rows, features), normal(keys, features, seed=1)
    scale = torch.linspace(1, 2, rows).double() if temperature else torch.tensor(1.5).double()
    positive, excluded = torch.arange(rows).flip(0), torch.arange(rows).roll(1)
    return Pairs(
        query.requires_grad_(), key.requires_grad_(), scale.requires_grad_(), normal(keys),
        positive, excluded, torch.arange(rows) % 3, torch.arange(keys) % 3, columns, False,
        1 << 16, torch.float64, "",
    )  # fmt: skip


# What changes the outputs of the op: which are empty, and the shape of the scale's gradient.
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("columns", [False, True])
def test_opcheck_of_pairs(columns, per_row, keep):
    pairs = pairs_of(columns=columns, temperature=per_row)
    opcheck(torch.ops.neglog.pairs.default, (*pairs, keep))
    out = torch.ops.neglog.pairs.default(*pairs, keep)
    row, column, row_lse, column_lse, score, *rest = (x.detach() for x in out)
    upstream = [torch.ones_like(x).requires_grad_() for x in (row, row_lse, score)]
    of_column = torch.ones_like(column).requires_grad_() if columns else None
    arguments = (
        upstream[0], of_column, upstream[1], None, upstream[2], *pairs, row_lse, column_lse, *rest,
        [True] * 3,
    )  # fmt: skip
    opcheck(
        torch.ops.neglog.pairs_backward.default, arguments,
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )  # fmt: skip


# Accumulation in the inputs' dtype and in a wider one; all gradients, and half of them.
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wanted", [[True] * 4, [False, True, False, True]])
def test_opcheck_of_siglip(dtype, wanted):
    image, text, scale, bias = case("siglip_loss", 7, 3, dtype)
    rows, group = torch.arange(7), torch.arange(7) // 3
    inputs = (image, text, scale, bias, rows, group, group)
    utilities = ("test_schema", "test_faketensor", "test_autograd_registration")
    tiles = (1 << 16, dtype, "")
    given = (*inputs, *tiles, wanted)
    opcheck(torch.ops.neglog.pairs_sigmoid.default, given, test_utils=utilities)
    _, *formed = torch.ops.neglog.pairs_sigmoid.default(*given)
    grad = torch.ones((), dtype=scale.dtype, requires_grad=True)
    formed = [x.detach() for x in formed]
    given = (grad, *inputs, *formed, *tiles, wanted)
    opcheck(torch.ops.neglog.pairs_sigmoid_backward.default, given, test_utils=utilities)


def test_siglip_forms_in_the_backward_what_the_forward_did_not():
    """As of a graph that was made without gradients."""
    inputs = (*case("siglip_loss", 7, 3), torch.arange(7), None, None)
    found = []
    for wanted in ([True] * 4, [False] * 4):
        loss = torch.ops.neglog.pairs_sigmoid(*inputs, 1 << 16, torch.float64, "", wanted)[0]
        found.append(torch.autograd.grad(2 * loss, inputs[:4]))
    torch.testing.assert_close(*found)


# A tile has the dtype of what is kept, or a wider one; Numba's functions are the same in each.
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        *((BEST, dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16)),
        *((name, torch.float64) for name in NUMBA),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", FORMS)
def test_kept_similarities_make_what_new_ones_make(monkeypatch, backend, name, dtype):
    inputs, options = form(name, rows=150, keys=140, dtype=dtype)
    if dtype == torch.bfloat16 and "exclude" not in options:
        inputs = (*inputs[:3], inputs[3].detach().float().requires_grad_())
    kept, keeps = [], route.keeps

    def spy(*arguments):
        kept.append(keeps(*arguments))
        return kept[-1]

    monkeypatch.setattr(route, "keeps", spy)
    results = []
    for workspace in (8, 0.01):
        loss = neglog.info_nce(
            *inputs, reduction="none", options={"workspace_mb": workspace}, backend=backend,
            **options,
        )  # fmt: skip
        results.append((loss, *torch.autograd.grad(loss.mean(), learned(inputs))))
    assert kept == ([] if "paired" in name else [True, False])
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance)


# Bits and memory


# Similarities that are kept, and that are made twice.
@pytest.mark.parametrize("workspace", [None, TILES], ids=["kept", "tiles"])
@pytest.mark.parametrize("name", LOSSES)
def test_bits_repeat(backend, name, workspace):
    arguments = case(name, dtype=torch.float32)
    runs = []
    for _ in range(4):
        loss = getattr(neglog, name)(*arguments, options=workspace)
        runs.append((loss, *torch.autograd.grad(loss, learned(arguments))))
    for other in runs[1:]:
        assert all(torch.equal(one, two) for one, two in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("name", LOSSES)
def test_threads_and_workspaces_change_only_roundings(kernel_backend, name):
    arguments = case(name)
    most = torch.get_num_threads()
    results = []
    try:
        for threads, workspace in ((1, 64), (2, 64), (3, 0.1), (most, 0.3)):
            torch.set_num_threads(threads)
            loss = getattr(neglog, name)(*arguments, options={"workspace_mb": workspace})
            results.append((loss, *torch.autograd.grad(loss, learned(arguments))))
    finally:
        torch.set_num_threads(most)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-12, atol=1e-12)


PEAK = """
import sys, torch, neglog
from resource import RUSAGE_SELF, getrusage

def steps(rows, backend):
    x, y = (torch.randn(rows, 32, requires_grad=True) for _ in range(2))
    unit = torch.nn.functional.normalize
    labels = torch.arange(rows) % 100
    neglog.info_nce(x, y, symmetric=True, backend=backend).backward()
    neglog.info_nce(x, y, exclude=labels, backend=backend).backward()
    few = [z[: rows // 8] for z in (x, y)]
    neglog.info_nce(*few, y, return_stats=True, backend=backend).loss.backward()
    neglog.siglip_loss(unit(x), unit(y), 10.0, -10.0, backend=backend).backward()
    neglog.nt_xent(x[::2], y[::2], backend=backend).backward()
    neglog.sup_con(x, labels, backend=backend).backward()

def peak():
    return getrusage(RUSAGE_SELF).ru_maxrss >> 10

steps(700, sys.argv[1])  # what libraries take at their first call
before = peak()
steps(10240, sys.argv[1])
print(peak() - before)
"""


def test_similarities_never_lie_in_memory(kernel_backend):
    made = python(PEAK, kernel_backend)
    assert int(made.stdout) < 100, made.stderr  # MB; the similarities are 400
