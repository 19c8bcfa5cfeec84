"""Contrastive losses under torch.compile, export, torch.func and autocast."""

from functools import partial

import pytest
import torch

import neglog
from neglog import dispatch
from tests.support import contrastive_formulas as formulas
from tests.support.backends import NUMBA
from tests.support.contrastive_cases import (
    LOSSES,
    case,
    form,
    gradients,
    learned,
    of_learned,
)


# Numbers of rows that are symbols, and that are constants. What is traced is the same for every
# backend: a demanded one is a word in the graph, whatever the word.
@pytest.mark.parametrize(("backend", "dynamic"), [(None, True), *((name, False) for name in NUMBA)])
@pytest.mark.parametrize("name", LOSSES)
def test_compiles_whole(name, backend, dynamic):
    torch.compiler.reset()
    function = partial(getattr(neglog, name), backend=backend)
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (30, 29)[: 1 + dynamic]:
        arguments = case(name, rows, 8)
        with dispatch.record() as ran:
            ours = compiled(*arguments)
            found = gradients(ours, learned(arguments))
        assert backend is None or ran[0].endswith(f":{backend}")
        theirs = function(*arguments)
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(found, gradients(theirs, learned(arguments)))


# Each source of negatives, and each option that adds to scores; statistics take other outputs.
@pytest.mark.parametrize("name", ["queue, weights", "paired, own weights", "exclude, further",
                                  "smoothing, symmetric"])  # fmt: skip
@pytest.mark.parametrize("stats", [False, True])
def test_compiles_forms(name, stats):
    torch.compiler.reset()
    arguments, options = form(name, "of each row")
    function = partial(neglog.info_nce, return_stats=stats, **options)
    ours = torch.compile(function, fullgraph=True, backend="aot_eager")(*arguments)
    theirs = function(*arguments)
    torch.testing.assert_close(ours, theirs)
    losses = (ours.loss, theirs.loss) if stats else (ours, theirs)
    torch.testing.assert_close(*(gradients(x, learned(arguments)) for x in losses))


def test_compiles_to_code():
    """By torch's own compiler, which takes as long as all that only trace."""
    torch.compiler.reset()
    function = partial(neglog.info_nce, symmetric=True)
    arguments = case("info_nce", 700, 8, torch.float32)
    ours, theirs = torch.compile(function, fullgraph=True)(*arguments), function(*arguments)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(gradients(x, learned(arguments)) for x in (ours, theirs)))


@pytest.mark.parametrize("name", LOSSES)
def test_torch_func(compiled_or_torch, name):
    arguments = case(name, 60, 5)
    grads = []
    for home in (neglog, formulas):
        function, inputs = of_learned(getattr(home, name), arguments)
        places = tuple(range(len(inputs)))
        grads.append(torch.func.grad(function, places)(*(x.detach() for x in inputs)))
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("name", LOSSES)
def test_torch_func_twice(compiled_or_torch, name):
    arguments = case(name, 6, 3)
    second = []
    for home in (neglog, formulas):
        function, inputs = of_learned(getattr(home, name), arguments)
        inputs = [x.detach() for x in inputs]

        def slope(x, function=function, rest=inputs[1:]):
            return torch.func.grad(function)(x, *rest).square().sum()

        second.append(torch.func.grad(slope)(inputs[0]))
    torch.testing.assert_close(*second)


# Both dtypes that autocast knows: of float16's range a square is soon out.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_autocast(compiled_or_torch, name, dtype):
    arguments = case(name, dtype=torch.float32)
    expected = getattr(formulas, name)(*arguments)
    with torch.autocast("cpu", dtype):
        loss = getattr(neglog, name)(*arguments)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=2e-2, atol=2e-2)
    found, truth = (gradients(x, learned(arguments)) for x in (loss, expected))
    for mine, other in zip(found, truth, strict=True):
        assert mine.dtype == torch.float32
        assert (mine - other).norm() <= 0.05 * other.norm() + 1e-5


CALLS = {
    "info_nce": lambda x, y: neglog.info_nce(x, y, 0.2 * torch.ones(3, 5), symmetric=False),
    "symmetric": lambda x, y: neglog.info_nce(x, y, symmetric=True),
    "clip_loss": lambda x, y: neglog.clip_loss(x, y, 2.0),
    "siglip_loss": lambda x, y: neglog.siglip_loss(x, y, 2.0, -1.0),
    "nt_xent": lambda x, y: neglog.nt_xent(x, y),
    "dcl": lambda x, y: neglog.dcl(x, y),
    "sup_con": lambda x, y: neglog.sup_con(x + y, torch.arange(x.shape[0]) // 2),
    "several positives": lambda x, y: neglog.info_nce(
        x,
        y,
        positives=(torch.arange(x.shape[0]) // 2, torch.arange(x.shape[0]) // 3),
        symmetric=True,
    ),
    "positives by rows": lambda x, y: neglog.info_nce(
        x, y, positives=torch.arange(x.shape[0])[:, None] // torch.tensor([1, 2])
    ),
    "siglip_loss of ids": lambda x, y: neglog.siglip_loss(
        x, y, 2.0, -1.0, exclude=torch.arange(x.shape[0]) // 2
    ),
    "own hard negatives": lambda x, y: neglog.info_nce(
        x, y, y + x, negative_mode="in_batch", own_negative_weight=0.5
    ),
}


@pytest.fixture(params=CALLS.values(), ids=CALLS.keys())
def loss(request):
    return request.param


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def x_and_y(*shape):
    dtype = torch.float32
    return draw(*shape).to(dtype), draw(*shape, seed=1).to(dtype)


def test_vmap_of_values_and_gradients(compiled_or_torch, loss):
    x, y = x_and_y(3, 8, 5)
    expected = torch.stack([loss(*pair) for pair in zip(x, y, strict=True)])
    torch.testing.assert_close(torch.func.vmap(loss)(x, y), expected)
    grads = torch.func.vmap(torch.func.grad(loss))(x, y)
    expected = torch.stack([torch.func.grad(loss)(*pair) for pair in zip(x, y, strict=True)])
    torch.testing.assert_close(grads, expected)


def test_a_transform_compiles_whole(loss):
    """Kernels have no formula there, so torch's own functions run whatever the size."""
    torch.compiler.reset()
    x, y = x_and_y(600, 5)
    compiled = torch.compile(torch.func.grad(loss), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, y), torch.func.grad(loss)(x, y), rtol=1e-4, atol=1e-6)
    mapped = torch.compile(torch.func.vmap(loss), fullgraph=True, backend="aot_eager")
    x, y = x_and_y(2, 9, 5)
    torch.testing.assert_close(mapped(x, y), torch.func.vmap(loss)(x, y))


def test_export_of_any_number_of_rows(loss):
    class Loss(torch.nn.Module):
        def forward(self, x, y):
            return loss(x, y)

    rows = torch.export.Dim("rows", min=2, max=200)
    program = torch.export.export(Loss(), x_and_y(20, 5), dynamic_shapes=({0: rows}, {0: rows}))
    x, y = x_and_y(31, 5)
    torch.testing.assert_close(program.module()(x, y), loss(x, y))
