"""The op linear_nll: derivatives, opcheck, tracers, what is saved, bits, threads, memory."""

import pytest
import torch
import torch.utils.checkpoint
from torch.library import opcheck

import neglog
import neglog.losses.linear_cross_entropy  # defines the ops
from tests.support.backends import BEST
from tests.support.linear_cases import draw, gradients, in_memory, loss_and_gradients, trained
from tests.support.processes import python


# Gradients formed in the backward, and in the forward.
@pytest.mark.parametrize("reduction", [0, 1])
@pytest.mark.parametrize("token_weight", [None, torch.rand(6)])
def test_opcheck(token_weight, reduction):
    x, w, b, target = draw(6, 3, 5, dtype=torch.float32)
    options = (reduction, -100, 0.1, 1.0, 0.0, 0.0)
    wanted = [reduction != 0] * 3
    tiles = (1 << 20, torch.float32, 1e-3, "")
    arguments = (x, w, b, target, None, token_weight, None, *options, True, wanted, *tiles)
    opcheck(torch.ops.neglog.linear_nll.default, arguments)
    loss, _, total, _, _, _, *formed = torch.ops.neglog.linear_nll.default(*arguments)
    arguments = (torch.ones_like(loss), None, None, x, w, b, target, None, token_weight, total,
                 *formed, *options, [True] * 3, *tiles)  # fmt: skip
    arguments = tuple(
        a.detach().requires_grad_(a.is_floating_point() and a.requires_grad)
        if isinstance(a, torch.Tensor) else a for a in arguments
    )  # fmt: skip
    opcheck(
        torch.ops.neglog.linear_nll_backward.default, arguments,
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )  # fmt: skip


# What is traced is the same for every backend: one is demanded, to see it in the graph. By torch's
# own compiler once, as code takes seconds.
@pytest.mark.parametrize(
    ("compiler", "dynamic", "reduction", "backend"),
    [
        ("inductor", True, "mean", None),
        ("aot_eager", True, "none", None),
        ("aot_eager", False, "none", BEST),
        ("aot_eager", False, "mean", BEST),
    ],
)
def test_compiles_whole(compiler, dynamic, reduction, backend):
    torch.compiler.reset()
    compiled = torch.compile(
        lambda x, w, b, t: neglog.linear_cross_entropy(
            x, w, t, linear_bias=b, reduction=reduction, backend=backend
        ),
        fullgraph=True, dynamic=dynamic, backend=compiler,
    )  # fmt: skip
    for rows in (300, 299):
        x, w, b, target = draw(rows, dtype=torch.float32)
        ours = compiled(x, w, b, target)
        theirs = neglog.linear_cross_entropy(x, w, target, linear_bias=b, reduction=reduction)
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(gradients(ours, (x, w, b)), gradients(theirs, (x, w, b)))


def test_torch_func(compiled_or_torch):
    x, w, b, target = draw()

    def loss(function):
        return lambda x, w, b: function(x, w, target, linear_bias=b)

    ours = torch.func.grad(loss(neglog.linear_cross_entropy), (0, 1, 2))(x, w, b)
    theirs = torch.func.grad(loss(in_memory), (0, 1, 2))(x, w, b)
    torch.testing.assert_close(ours, theirs)


# Gradients formed in the backward, and in the forward.
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_derivatives(kernel_backend, reduction):
    *head, target = draw(6, 3, 5)

    def function(x, w, b):
        return neglog.linear_cross_entropy(
            x, w, target, linear_bias=b, reduction=reduction, label_smoothing=0.1
        )

    assert torch.autograd.gradcheck(function, head)
    assert torch.autograd.gradgradcheck(function, head)


def test_second_derivative_and_retained_graph(kernel_backend):
    x, w, b, target = draw()
    loss = neglog.linear_cross_entropy(x, w, target, linear_bias=b)
    first = torch.autograd.grad(loss, (x, w, b), retain_graph=True)
    torch.testing.assert_close(
        torch.autograd.grad(2 * loss, (x, w, b), retain_graph=True), tuple(2 * g for g in first)
    )

    def penalty(function):
        grads = torch.autograd.grad(
            function(x, w, target, linear_bias=b), (x, w), create_graph=True
        )
        return torch.autograd.grad(sum(g.square().sum() for g in grads), (x, w, b))

    torch.testing.assert_close(penalty(neglog.linear_cross_entropy), penalty(in_memory))


def test_an_ignored_row_of_nan_has_no_second_derivative(kernel_backend):
    """Nor one through the weight, which the formula multiplies by every row's input."""
    x, w, b, target = draw()
    ignored = target == -100
    assert ignored.any()
    found = []
    for value in (torch.nan, 0.0):
        given = torch.where(ignored[:, None], value, x.detach()).requires_grad_()
        loss = neglog.linear_cross_entropy(given, w, target, linear_bias=b)
        grads = torch.autograd.grad(loss, (given, w), create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in grads), (given, w, b)))
    torch.testing.assert_close(*found)
    assert not found[0][0][ignored].any()


def test_the_log_sum_exps_alone(kernel_backend):
    """No gradient of the loss arrives; both derivatives come through the log-sum-exps."""
    x, w, b, target = draw(60)
    counted = target != -100

    def derivatives(function):
        stats = function(x, w, target, linear_bias=b, return_stats=True)
        lse = stats.logsumexp[counted].square().sum()
        first = torch.autograd.grad(lse, (x, w, b), create_graph=True)
        return *first, *torch.autograd.grad(sum(g.square().sum() for g in first), (x, w, b))

    found = derivatives(neglog.linear_cross_entropy)
    torch.testing.assert_close(found, derivatives(in_memory))


# Each dtype keeps its sums in another, and float16 alone divides in the backward.
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_graph_that_is_walked_again(dtype, reduction):
    """The first walk is given the memory of the gradients; it keeps what it was given."""
    x, w, b, target = draw(dtype=dtype)
    loss = neglog.linear_cross_entropy(x, w, target, linear_bias=b, reduction=reduction)
    first = torch.autograd.grad(loss, (x, w, b), retain_graph=True)
    held = [part.clone() for part in first]
    for factor in (1.0, 0.5, 1.0):  # by powers of two nothing is rounded
        again = torch.autograd.grad(factor * loss, (x, w, b), retain_graph=True)
        for part, before, kept in zip(again, first, held, strict=True):
            torch.testing.assert_close(part, factor * before)
            assert torch.equal(before, kept)
            assert part.data_ptr() != before.data_ptr()
    wanted = torch.autograd.grad(loss, (x, w, b), create_graph=True)
    torch.testing.assert_close(wanted, first)
    for _ in range(2):
        loss.backward(retain_graph=True)
    for leaf, part in zip((x, w, b), first, strict=True):
        torch.testing.assert_close(leaf.grad, 2 * part)
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_gradients_are_not_copied():
    """What the forward formed is what the backward gives."""
    x, w, _, target = draw(2400, dtype=torch.float32)
    loss = neglog.linear_cross_entropy(x, w, target)
    formed = [part.data_ptr() for part in loss.grad_fn.formed[:2]]
    assert [grad.data_ptr() for grad in torch.autograd.grad(loss, (x, w))] == formed
    with torch.autocast("cpu", torch.bfloat16):  # whose float32 weights get theirs as it was formed
        loss = neglog.linear_cross_entropy(x, w, target)
    formed = [part.data_ptr() for part in loss.grad_fn.formed[:2]]
    assert [grad.data_ptr() for grad in torch.autograd.grad(loss, (x, w))] == formed


def test_hooks_of_saved_tensors_get_the_gradients_too():
    """Checkpointing drops what is saved, offloading moves it: nothing as large as the weight may be
    kept past them."""
    x, w, _, target = draw(2400, dtype=torch.float32)
    expected = torch.autograd.grad(neglog.linear_cross_entropy(x, w, target), (x, w))
    packed = []

    def pack(tensor):
        packed.append(tuple(tensor.shape))
        return tensor.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = neglog.linear_cross_entropy(x, w, target)
    assert packed.count(tuple(w.shape)) == 2  # the weight, and its gradient
    torch.testing.assert_close(torch.autograd.grad(loss, (x, w)), expected)
    loss = torch.utils.checkpoint.checkpoint(
        neglog.linear_cross_entropy, x, w, target, use_reentrant=False
    )
    torch.testing.assert_close(torch.autograd.grad(loss, (x, w)), expected)


def test_export_of_any_number_of_rows(compiled_or_torch):
    class Head(torch.nn.Module):
        def forward(self, x, w, target):
            return neglog.linear_cross_entropy(x, w, target)

    rows = torch.export.Dim("rows", min=2, max=1000)
    shapes = {"x": {0: rows}, "w": None, "target": {0: rows}}
    x, w, _, target = draw(30, dtype=torch.float32)
    program = torch.export.export(Head(), (x, w, target), dynamic_shapes=shapes)
    x, _, _, target = draw(41, dtype=torch.float32)
    expected = neglog.linear_cross_entropy(x, w, target)
    torch.testing.assert_close(program.module()(x, w, target), expected)


def test_vmap(compiled_or_torch):
    x, w, _, target = draw(60)
    x, target = x.view(3, 20, -1), target.view(3, 20)
    ours = torch.func.vmap(lambda x, t: neglog.linear_cross_entropy(x, w, t))(x, target)
    theirs = [neglog.linear_cross_entropy(x[i], w, target[i]) for i in range(3)]
    torch.testing.assert_close(ours, torch.stack(theirs))

    def rows(x):
        return neglog.linear_cross_entropy(x, w, target[0], reduction="none")

    jacobian = torch.func.jacrev(rows)(x[0])
    torch.testing.assert_close(jacobian, torch.autograd.functional.jacobian(rows, x[0]))


def test_bits_repeat(backend):
    x, w, b, target = draw(dtype=torch.float32)
    runs = []
    for _ in range(2):
        loss = neglog.linear_cross_entropy(
            x, w, target, linear_bias=b, options={"workspace_mb": 0.5}
        )
        runs.append((loss, *torch.autograd.grad(loss, (x, w, b))))
    assert all(torch.equal(one, two) for one, two in zip(*runs, strict=True))


# With a mask no size may depend on data while torch traces.
@pytest.mark.parametrize("mask", [False, True])
def test_probabilities_compile_whole(compiled_or_torch, mask):
    torch.compiler.reset()
    x, w, b, _ = draw(30, dtype=torch.float32)
    target = torch.rand(30, 1000)
    options = {"mask": torch.arange(30) % 3 > 0} if mask else {}

    def loss(x, w, b, t):
        return neglog.linear_cross_entropy(x, w, t, linear_bias=b, **options)

    ours = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")(x, w, b, target)
    theirs = loss(x, w, b, target)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradients(ours, (x, w, b)), gradients(theirs, (x, w, b)))


def test_a_tensor_of_scale_compiles(compiled_or_torch):
    x, w, _, target = draw(30, dtype=torch.float32)
    compiled = torch.compile(
        lambda x, w, t, s: neglog.linear_cross_entropy(x, w, t, logit_scale=s),
        fullgraph=True, backend="aot_eager",
    )  # fmt: skip
    scale = torch.tensor(0.5)
    expected = neglog.linear_cross_entropy(x, w, target, logit_scale=0.5)
    torch.testing.assert_close(compiled(x, w, target, scale), expected)


# Gradients formed in the backward, and in the forward.
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_threads_and_workspaces_change_only_roundings(kernel_backend, reduction):
    x, w, b, target = trained(rows=700, vocab=3000)
    upstream = torch.linspace(-1, 1, 700).double() if reduction == "none" else None
    most = torch.get_num_threads()
    results = []
    try:
        for threads, workspace in ((1, 64), (2, 64), (most, 2), (most, 7)):
            torch.set_num_threads(threads)
            results.append(
                loss_and_gradients(
                    x, w, b, target, reduction=reduction, upstream=upstream,
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
    w = torch.randn(32768, 64, requires_grad=True)
    target = torch.randint(32768, (rows,))
    neglog.linear_cross_entropy(x, w, target, backend=sys.argv[1]).backward()

def peak():
    return getrusage(RUSAGE_SELF).ru_maxrss >> 10

step(64)  # what libraries take at their first call, and the head with its gradient
before = peak()
step(4096)
print(peak() - before)
"""


def test_logits_never_lie_in_memory(kernel_backend):
    made = python(PEAK, kernel_backend)
    assert int(made.stdout) < 160, made.stderr  # MB; the logits of 4096 rows are 512
