"""What ops/define.py promises of an op, on ops that are defined here for nothing else."""

import subprocess
import sys

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.library import opcheck

from neglog.ops.define import Op, library, save, saved, second_derivative

calls = []  # of the functions below, in order

# y = factor * x * scale by row, and the sum of the rows; the sum has no gradient by x here.
scaled = Op(
    "test_scaled(Tensor x, Tensor? scale, float factor, bool[] flags) -> (Tensor y, Tensor total)"
)
untraced = Op("test_untraced(Tensor x) -> Tensor", compiled=False)


def _scaled(a):
    calls.append(("forward", a))
    y = a.x * a.factor if a.scale is None else a.x * a.factor * a.scale
    return y, y.sum()


def _setup(ctx, a, results):
    save(ctx, x=a.x, scale=a.scale)
    ctx.factor = a.factor
    calls.append(("setup", results))


def _backward(ctx, grad):
    kept = saved(ctx)
    calls.append(("backward", grad, ctx.wanted, tuple(kept)))
    factor = ctx.factor if kept["scale"] is None else ctx.factor * kept["scale"]
    y = torch.zeros_like(kept["x"]) if grad.y is None else grad.y
    total = 0 if grad.total is None else grad.total
    found = {"x": (y + total) * factor}
    if ctx.wanted.scale:
        found["scale"] = (y + total) * kept["x"] * ctx.factor
    return found


scaled.implement("CPU", _scaled)
scaled.shapes(lambda a: (a.x.new_empty(a.x.shape), a.x.new_empty(())))
scaled.differentiable(_setup, _backward)
untraced.implement("CPU", lambda a: a.x.clone())
untraced.shapes(lambda a: a.x.new_empty(a.x.shape))


# What another library implements; the sum of the rows has no gradient here.
elsewhere = Op("test_elsewhere(Tensor x, float factor) -> (Tensor y, Tensor total)")
library.impl("test_elsewhere", lambda x, factor: (x * factor, x.sum()), "CPU")
elsewhere.implemented_by_library("cpu")
elsewhere.shapes(lambda a: (a.x.new_empty(a.x.shape), a.x.new_empty(())))


def _setup_elsewhere(ctx, a, results):
    ctx.mark_non_differentiable(results.total)
    ctx.factor = a.factor


elsewhere.differentiable(_setup_elsewhere, lambda ctx, grad: {"x": grad.y * ctx.factor})


@pytest.fixture(autouse=True)
def no_calls():
    calls.clear()


def inputs():
    x = torch.linspace(-1, 2, 6, dtype=torch.float64).view(2, 3).requires_grad_()
    return x, torch.tensor([0.5, 2.0, 3.0], dtype=torch.float64).expand(2, 3).clone()


def test_arguments_and_results_go_by_name():
    x, scale = inputs()
    out = scaled(x.detach(), scale, 2.0, [True])
    assert scaled.Arguments._fields == ("x", "scale", "factor", "flags")
    assert out._fields == ("y", "total")
    torch.testing.assert_close(out.y, 2 * x.detach() * scale)
    ((_, given),) = calls
    assert (given.factor, list(given.flags)) == (2.0, [True])


def test_one_result_comes_bare():
    assert torch.equal(untraced(torch.ones(2)), torch.ones(2))
    assert untraced.Results._fields == ("result",)


def test_an_op_that_a_library_implements():
    """Eager calls take the short form, and nothing depends on it."""
    x, _ = inputs()
    out = elsewhere(x, 3.0)
    assert type(out.y.grad_fn).__name__ == "Eager_test_elsewhereBackward"
    assert not out.total.requires_grad
    for y in (out.y, elsewhere.registered(x, 3.0)[0]):
        torch.testing.assert_close(y, 3 * x)
        torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], torch.full_like(x, 3))
    with torch.no_grad():
        assert elsewhere(x, 3.0).y.grad_fn is None
    by_func = torch.func.grad(lambda x: elsewhere(x, 3.0).y.sum())(x.detach())
    torch.testing.assert_close(by_func, torch.full_like(x, 3))
    compiled = torch.compile(lambda x: elsewhere(x, 3.0).y, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), 3 * x)


def test_the_registered_op_passes_opcheck():
    x, scale = inputs()
    for given in ((x, scale, 2.0, []), (x, scale.requires_grad_(), 2.0, [True, False])):
        outcome = opcheck(torch.ops.neglog.test_scaled.default, given)
        assert set(outcome.values()) == {"SUCCESS"}


def test_only_what_is_compiled_says_so():
    tags = [getattr(torch.ops.neglog, op.name).default.tags for op in (scaled, untraced)]
    assert [torch.Tag.pt2_compliant_tag in of_one for of_one in tags] == [True, False]


def test_shapes_compute_nothing():
    with FakeTensorMode():
        out = scaled(torch.empty(4, 5), None, 1.0, [])
    assert (out.y.shape, out.total.shape) == ((4, 5), ())
    meta = scaled(torch.empty(4, 5, device="meta"), None, 1.0, [])
    assert meta.y.device.type == "meta"
    assert not calls


def test_backward_knows_what_is_wanted_and_what_arrived():
    x, scale = inputs()
    out = scaled(x, scale, 2.0, [])
    (grad,) = torch.autograd.grad(out.y.sum(), x)
    torch.testing.assert_close(grad, 2 * scale)
    _, arrived, wanted, kept = calls[-1]
    assert arrived.total is None  # zero is not made of memory
    assert (wanted.x, wanted.scale) == (True, False)
    assert kept == ("x", "scale")
    out = scaled(x, scale.requires_grad_(), 2.0, [])
    grads = torch.autograd.grad(out.total, (x, scale))
    torch.testing.assert_close(grads, (2 * scale.detach(), 2 * x.detach()))
    assert calls[-1][1].y is None


def test_what_is_absent_is_saved_as_absent():
    x, _ = inputs()
    (grad,) = torch.autograd.grad(scaled(x, None, 3.0, []).y.sum(), x)
    torch.testing.assert_close(grad, torch.full_like(x, 3.0))


def test_backward_is_not_called_for_no_gradient():
    x, _ = inputs()

    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            ctx.set_materialize_grads(False)
            return y.clone()

        @staticmethod
        def backward(ctx, grad):
            return None

    for form in (scaled, lambda *given: scaled._named(scaled._functional.apply(*given))):
        loss = Nothing.apply(form(x, None, 3.0, []).y).sum()
        (grad,) = torch.autograd.grad(loss, x, allow_unused=True)
        assert grad is None
    assert "backward" not in [name for name, *_ in calls]


def test_derivatives_of_both_forms():
    x, scale = inputs()
    scale.requires_grad_()

    def registered(x, scale):
        return torch.ops.neglog.test_scaled.default(x, scale, 2.0, [])

    def functional(x, scale):
        return scaled._functional.apply(x, scale, 2.0, [])

    for form in (registered, functional):
        assert torch.autograd.gradcheck(form, (x, scale))
        assert torch.autograd.gradgradcheck(form, (x, scale))


# Each asks another form of it, or the loop over a batch: of all inputs, of one, by another axis.
TRANSFORMS = {
    "grad": lambda f, x, scale: torch.func.grad(lambda x: f(x, scale).sum())(x),
    "vjp": lambda f, x, scale: torch.func.vjp(f, x, scale)[1](torch.ones_like(x)),
    "vmap": lambda f, x, scale: torch.func.vmap(f)(x, scale),
    "vmap of one": lambda f, x, scale: torch.func.vmap(f, (0, None))(x, scale[0]),
    "vmap by the last axis": lambda f, x, scale: torch.func.vmap(f, (1, 1), 1)(x, scale),
    "vmap of grad": lambda f, x, scale: torch.func.vmap(
        torch.func.grad(lambda x, scale: f(x, scale).sum())
    )(x, scale),
    "compile": lambda f, x, scale: torch.compile(f, fullgraph=True, backend="aot_eager")(x, scale),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
def test_transforms(transform):
    torch.compiler.reset()
    x, scale = (part.detach() for part in inputs())
    found = transform(lambda x, scale: scaled(x, scale, 2.0, [True]).y, x, scale)
    torch.testing.assert_close(found, transform(lambda x, scale: 2.0 * x * scale, x, scale))


def test_vmap_of_an_op_with_one_result():
    op = Op("test_doubled(Tensor x) -> Tensor")
    op.implement("CPU", lambda a: a.x * 2)
    op.shapes(lambda a: a.x.new_empty(a.x.shape))
    op.differentiable(lambda ctx, a, results: None, lambda ctx, grad: {"x": grad.result * 2})
    x = torch.arange(6.0).view(2, 3)
    torch.testing.assert_close(torch.func.vmap(op)(x), 2 * x)
    torch.testing.assert_close(torch.func.grad(lambda x: op(x).sum())(x), torch.full((2, 3), 2.0))


# second_derivative, of f = (sum of a^2 b, sum of a b): both are given, or one


def _pair(a, b):
    return (a * a * b).sum(), (a * b).sum()


# Each result with a gradient or without, each input's gradient arriving or not.
@pytest.mark.parametrize("given", [(0,), (1,), (0, 1)], ids=str)
@pytest.mark.parametrize("arrives", [("a",), ("b",), ("a", "b")], ids=str)
def test_second_derivative(given, arrives):
    a, b = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in ([1.0, 2], [3.0, -1]))
    upstream = [torch.tensor(u, dtype=torch.float64, requires_grad=True) for u in (0.5, 1.5)]
    sent = {f"grad_{i}": upstream[i] if i in given else None for i in range(2)}
    gradients = {"a": torch.tensor([0.3, 0.7]).double(), "b": torch.tensor([-1.0, 2]).double()}
    gradients = {name: g if name in arrives else None for name, g in gradients.items()}
    plain = {name: None if u is None else u.detach() for name, u in sent.items()}
    values = {"a": a.detach(), "b": b.detach()}
    found = second_derivative(_pair, plain, values, gradients)
    outputs = _pair(a, b)
    total = sum(upstream[i] * outputs[i] for i in given)
    first = dict(zip("ab", torch.autograd.grad(total, (a, b), create_graph=True), strict=True))
    wanted = {f"grad_{i}": upstream[i] for i in given} | {"a": a, "b": b}
    expected = torch.autograd.grad(
        sum((first[name] * gradients[name]).sum() for name in arrives), list(wanted.values()),
        materialize_grads=True,
    )  # fmt: skip
    torch.testing.assert_close(found, dict(zip(wanted, expected, strict=True)))


def test_second_derivative_of_nothing():
    x = torch.ones(2)
    assert second_derivative(lambda x: (x.sum(),), {"g": torch.ones(())}, {"x": x}, {}) == {}
    empty = {"x": torch.empty(0)}
    assert second_derivative(lambda x: (x.sum(),), {"g": torch.ones(())}, {"x": x}, empty) == {}


ALL_LOSSES = """
import gc, neglog, torch
from neglog.ops.define import Op
for name in dir(neglog):
    getattr(neglog, name)
for op in (x for x in gc.get_objects() if isinstance(x, Op)):
    if "cpu" in op._implementations and "cuda" not in op._implementations:
        print(op.name)
"""


def test_what_the_losses_import_implements_every_op_on_cuda_too():
    """In a process of its own: the tests of the CUDA kernels import what a loss may have forgotten.
    All but nll_, which the library of CUDA kernels registers for itself."""
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ALL_LOSSES], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == ["nll_"]
