"""The ops of nll: opcheck, tracers, transforms, autocast, derivatives, threads, memory."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

import neglog
import neglog.losses.cross_entropy  # defines the ops
from neglog import dispatch
from neglog.kernels import memory
from neglog.ops.nll import schema
from tests.support.nll_tensors import forward_arguments, large
from tests.support.traced_calls import HEAD, TARGET, WEIGHT, X


# The backend is an argument that opcheck does not look at. What changes shapes and outputs:
@pytest.mark.parametrize("reduction", [0, 1, 2])
@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize("weight", [None, torch.rand(40)])
def test_opcheck_forward(reduction, probabilities, weight):
    arguments = forward_arguments(probabilities=probabilities, reduction=reduction, weight=weight)
    outcome = opcheck(torch.ops.neglog.nll.default, arguments)
    assert set(outcome.values()) == {"SUCCESS"}


# An upstream by row and one for all; a gradient of the log-sum-exps or none.
@pytest.mark.parametrize("reduction", [0, 1])
@pytest.mark.parametrize("grad_lse", [None, torch.rand(6)])
@pytest.mark.parametrize("grad_entropy", [None, torch.rand(6)])
def test_opcheck_backward(reduction, grad_lse, grad_entropy):
    logits, target, *rest = forward_arguments(reduction=reduction)
    _, lse, low, total, _, entropy, _ = torch.ops.neglog.nll.default(logits, target, *rest)
    grad = torch.rand(() if reduction else (6,), requires_grad=True)
    options, name = rest[3:9], rest[-1]
    kept = (logits, target, None, None, lse.detach(), low, entropy.detach(), total)
    outcome = opcheck(
        torch.ops.neglog.nll_backward.default,
        (grad, grad_lse, grad_entropy, *kept, *options, name),
    )
    assert set(outcome.values()) == {"SUCCESS"}


def backward_of(function, logits, target):
    """Loss, gradient and the ops that ran, of a function of logits that are not a leaf."""
    x = logits.detach().requires_grad_()
    with dispatch.record() as ran:
        loss = function(x * 2, target)
        loss.backward()
    return (loss.detach(), x.grad), ran


def loss_of_stats(x, target):
    stats = neglog.cross_entropy(x, target, label_smoothing=0.1, return_stats=True)
    return stats.loss + stats.logsumexp.mean()


# Rows that are symbols and rows that are constants, by what only traces; the last as code.
@pytest.mark.parametrize(
    ("compiler", "dynamic"), [("aot_eager", True), ("aot_eager", False), ("inductor", True)]
)
def test_compiles_whole(kernel_backend, compiler, dynamic):
    torch.compiler.reset()
    compiled = torch.compile(loss_of_stats, fullgraph=True, dynamic=dynamic, backend=compiler)
    logits, target = large()
    for rows in (200, 199):
        given = (logits[:rows], target[:rows])
        found, ran = backward_of(compiled, *given)
        assert ran == [f"nll:{kernel_backend}", f"nll_backward:{kernel_backend}"]
        torch.testing.assert_close(found, backward_of(loss_of_stats, *given)[0])


def test_compiles_whole_with_an_in_place_request():
    """It is no more than a request: a graph keeps the logits, ignored rows or not."""
    torch.compiler.reset()
    logits, target = large()
    target[::2] = -100
    compiled = torch.compile(
        lambda x, t: neglog.cross_entropy(x.tanh(), t, inplace_backward=True),
        fullgraph=True, backend="aot_eager",
    )  # fmt: skip
    compiled(logits, target).backward()
    (expected,) = torch.autograd.grad(F.cross_entropy(logits.tanh(), target), logits)
    torch.testing.assert_close(logits.grad, expected)


def test_few_numbers_compile_whole():
    torch.compiler.reset()
    compiled = torch.compile(neglog.cross_entropy, fullgraph=True, backend="aot_eager")
    x, t = torch.randn(4, 9), torch.randint(0, 9, (4,))
    with dispatch.record() as ran:
        torch.testing.assert_close(compiled(x, t), F.cross_entropy(x, t))
    assert ran == [f"nll:{dispatch.best('cpu')}"]


def test_export_keeps_the_op():
    class Loss(torch.nn.Module):
        def forward(self, x, t):
            return neglog.cross_entropy(x, t)

    logits, target = large()
    program = torch.export.export(Loss(), (logits.detach(), target))
    assert "neglog.nll" in str(program.graph)
    torch.testing.assert_close(
        program.module()(logits.detach(), target), F.cross_entropy(logits, target).detach()
    )


def test_make_fx_sees_the_op():
    from torch.fx.experimental.proxy_tensor import make_fx

    logits, target = large()
    graph = make_fx(lambda x: neglog.cross_entropy(x, target))(logits.detach())
    other = torch.randn_like(logits)
    torch.testing.assert_close(graph(other), F.cross_entropy(other, target))


TRANSFORMS = {
    "grad": lambda f, x, batch: torch.func.grad(f)(x),
    "jacrev": lambda f, x, batch: torch.func.jacrev(f)(x),
    "jacrev twice": lambda f, x, batch: torch.func.jacrev(torch.func.jacrev(f))(x),
    "vmap": lambda f, x, batch: torch.func.vmap(f)(batch),
    "vmap of grad": lambda f, x, batch: torch.func.vmap(torch.func.grad(f))(batch),
}


def transformed(function, transform):
    target = torch.tensor([0, 4, -100])
    batch = torch.linspace(-3, 4, 60, dtype=torch.float64).sin().view(4, 3, 5)
    return transform(lambda x: function(x, target, label_smoothing=0.1), batch[0], batch)


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
def test_torch_func(kernel_backend, transform):
    ours = transformed(neglog.cross_entropy, transform)
    torch.testing.assert_close(ours, transformed(F.cross_entropy, transform))


def test_forward_mode_is_torchs():
    """No kernel has a formula for it, so the choice is left to the route."""

    def jvp(f, x, batch):
        return torch.func.jvp(f, (x,), (torch.ones_like(x),))

    ours = transformed(neglog.cross_entropy, jvp)
    torch.testing.assert_close(ours, transformed(F.cross_entropy, jvp))


# Those that autocast would change, and float64, which it leaves alone.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_autocast(kernel_backend, dtype):
    logits, target = large(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = neglog.cross_entropy(logits, target), F.cross_entropy(logits, target)
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs)
    pair = [torch.autograd.grad(loss, logits)[0] for loss in (ours, theirs)]
    assert pair[0].dtype == dtype
    torch.testing.assert_close(*pair, rtol=1e-2, atol=1e-6)


def test_retained_graph_and_create_graph(kernel_backend):
    logits, target = large(torch.float64)
    loss = neglog.cross_entropy(logits, target)
    first = torch.autograd.grad(loss, logits, retain_graph=True)[0].clone()
    second = torch.autograd.grad(loss, logits, create_graph=True)[0]
    torch.testing.assert_close(first, second)
    penalty = torch.autograd.grad(second.square().sum(), logits)[0]
    own = torch.autograd.grad(F.cross_entropy(logits, target), logits, create_graph=True)[0]
    torch.testing.assert_close(penalty, torch.autograd.grad(own.square().sum(), logits)[0])


# Both sides of what the forward forms.
@pytest.mark.parametrize("rows", [6, 4000])
def test_an_ignored_row_of_nan_has_no_second_derivative(kernel_backend, rows):
    """With a gradient of the log-sum-exps, and under every option that multiplies by a NaN."""
    logits = torch.randn(rows, 40, dtype=torch.float64)
    target = torch.arange(rows) % 40
    target[::3], logits[::3] = -100, torch.nan
    logits[3] = torch.inf
    logits.requires_grad_()
    options = {"softcap": 3.0, "z_loss": 0.1, "label_smoothing": 0.1, "logit_scale": 1.5}
    stats = neglog.cross_entropy(logits, target, return_stats=True, **options)
    loss = stats.loss + stats.logsumexp[target != -100].sum()
    (first,) = torch.autograd.grad(loss, logits, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), logits)
    for made in (first, second):
        assert not made[::3].any()
        assert made[1::3].isfinite().all()
        assert made[1::3].any(1).all()


def test_changing_the_logits_before_backward_is_caught(kernel_backend):
    leaf, target = large()
    logits = leaf * 1
    loss = neglog.cross_entropy(logits, target)
    with torch.no_grad():
        logits.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_changing_the_returned_logsumexp_changes_no_gradient(kernel_backend):
    logits, target = large()
    stats = neglog.cross_entropy(logits, target, return_stats=True)
    with torch.no_grad():
        stats.logsumexp.zero_()
    (gradient,) = torch.autograd.grad(stats.loss, logits)
    torch.testing.assert_close(
        gradient, torch.autograd.grad(F.cross_entropy(logits, target), logits)[0]
    )


def test_bits_do_not_depend_on_torchs_threads(kernel_backend):
    logits, target = large(rows=40_000, vocab=7)
    before, outcomes = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            loss = neglog.cross_entropy(logits, target)
            (gradient,) = torch.autograd.grad(loss, logits)
            outcomes.append((loss.item(), gradient))
    finally:
        torch.set_num_threads(before)
    for loss, gradient in outcomes[1:]:
        assert loss == outcomes[0][0]
        assert torch.equal(gradient, outcomes[0][1])


def test_threads_of_the_user(kernel_backend):
    logits, target = large(torch.float64)
    expected = torch.autograd.grad(F.cross_entropy(logits, target), logits)[0]
    results, failures = [], []

    def work():
        try:
            x = logits.detach().clone().requires_grad_()
            neglog.cross_entropy(x, target).backward()
            results.append(x.grad)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    for gradient in results:
        torch.testing.assert_close(gradient, expected)


def test_gradients_never_share_memory():
    """A buffer is used again only when nothing looks at it any more."""
    memory.give_back()  # what other tests have left would be used first
    logits, target = large(rows=2000, vocab=1000)
    assert logits.nbytes > 4 << 20
    first = torch.autograd.grad(neglog.cross_entropy(logits, target), logits)[0]
    kept, view = first.clone(), first[5:7]
    second = torch.autograd.grad(neglog.cross_entropy(logits * 2, target), logits)[0]
    assert first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr()
    assert torch.equal(first, kept)
    address = first.data_ptr()
    del first
    third = torch.autograd.grad(neglog.cross_entropy(logits * 3, target), logits)[0]
    assert third.data_ptr() != address
    assert torch.equal(view, kept[5:7])
    del view
    fourth = torch.autograd.grad(neglog.cross_entropy(logits, target), logits)[0]
    assert fourth.data_ptr() == address
    assert torch.equal(fourth, kept)


def test_large_gradients_can_be_copied_and_changed():
    logits, target = large(rows=2000, vocab=1000)
    neglog.cross_entropy(logits, target).backward()
    kept = copy.deepcopy(logits.grad)
    logits.grad.mul_(2)
    assert torch.equal(logits.grad, kept * 2)


def test_batched_upstream(kernel_backend):
    logits, target = large()
    loss = neglog.cross_entropy(logits, target, reduction="none")
    upstream = torch.eye(len(target))[[0, 7, 3]]
    (ours,) = torch.autograd.grad(loss, logits, upstream, is_grads_batched=True)
    theirs = F.cross_entropy(logits, target, reduction="none")
    (theirs,) = torch.autograd.grad(theirs, logits, upstream, is_grads_batched=True)
    torch.testing.assert_close(ours, theirs)


# A sum of weights that float32 rounds: the registered op hands it on as a tensor.
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", ["cross_entropy", "linear_cross_entropy"])
def test_eager_and_compiled_give_the_same_bits(name, reduction):
    torch.compiler.reset()
    x = torch.randn(4000, 40, generator=torch.Generator().manual_seed(0))
    target = torch.arange(4000) % 40
    weight = torch.rand(40, generator=torch.Generator().manual_seed(1)) + 0.1
    head = (torch.eye(40),) if name == "linear_cross_entropy" else ()

    def loss(x):
        function = getattr(neglog, name)
        return function(x, *head, target, weight=weight, reduction=reduction)

    found = []
    for run in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaf = x.clone().requires_grad_()
        value = run(leaf)
        found.append((value.detach(), *torch.autograd.grad(value * 3, leaf)))
    torch.testing.assert_close(*found, rtol=0, atol=0)


# Numbers in tensors, as torch.compile has those that change

NUMBERS = (0.1, 1.5, 4.0, 0.01)


def test_numbers_in_tensors_give_the_bits_of_floats():
    x = X.clone().requires_grad_()
    found = []
    for numbers in (NUMBERS, [torch.tensor(v, dtype=torch.float64) for v in NUMBERS]):
        loss, lse, *_ = schema.forward(x, TARGET, WEIGHT, None, None, 1, -100, *numbers, False, "")
        grads = torch.autograd.grad(2 * loss + lse.sum(), x, create_graph=True)
        found.append((loss, lse, *grads, *torch.autograd.grad(grads[0].square().sum(), x)))
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_opcheck_of_numbers_in_tensors():
    numbers = torch.tensor(NUMBERS, dtype=torch.float64)
    utilities = ("test_schema", "test_faketensor", "test_autograd_registration")
    x, w = X.clone().requires_grad_(), HEAD.clone().requires_grad_()
    given = (x, TARGET, WEIGHT, None, None, 1, -100, numbers, False, "")
    opcheck(torch.ops.neglog.nll_numbers.default, given, test_utils=utilities)
    tiles = ([1, 1, 0], 1 << 16, torch.float32, 0.0, "")
    given = (x, w, None, TARGET, WEIGHT, None, None, 1, -100, numbers, False, *tiles)
    opcheck(torch.ops.neglog.linear_nll_numbers.default, given, test_utils=utilities)
