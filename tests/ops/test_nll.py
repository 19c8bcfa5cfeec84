"""The torch.library ops: opcheck, compile, transforms, autocast, and the in-place backward."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

import neglog
import neglog.losses.cross_entropy  # defines the ops
from neglog import dispatch
from tests.support.backends import KERNELS


@pytest.fixture(params=KERNELS)
def backend(request):
    with dispatch.use(request.param):
        yield request.param


def large(dtype=torch.float32, rows=200, vocab=1000, seed=3):
    """Logits that fill several threads."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocab, generator=generator, dtype=dtype).mul_(2)
    target = torch.randint(0, vocab, (rows,), generator=generator)
    target[7] = -100
    return logits.requires_grad_(), target


def forward_arguments(backend, requires_grad=True, probabilities=False, **changes):
    logits = torch.randn(6, 40, requires_grad=requires_grad)
    target = torch.rand(6, 40) if probabilities else torch.randint(0, 40, (6,))
    arguments = {
        "logits": logits, "target": target, "weight": None, "num_items": None, "reduction": 1,
        "ignore_index": -100, "label_smoothing": 0.1, "logit_scale": 1.0, "softcap": 0.0,
        "z_loss": 0.0, "stats": True, "backend": backend,
    }  # fmt: skip
    return tuple({**arguments, **changes}.values())


@pytest.mark.parametrize("reduction", [0, 1, 2])
@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize("weight", [None, torch.rand(40)])
def test_opcheck_forward(backend, reduction, probabilities, weight):
    arguments = forward_arguments(
        backend, probabilities=probabilities, reduction=reduction, weight=weight
    )
    outcome = opcheck(torch.ops.neglog.nll.default, arguments)
    assert set(outcome.values()) == {"SUCCESS"}


@pytest.mark.parametrize("reduction", [0, 1])
@pytest.mark.parametrize("grad_lse", [None, torch.rand(6)])
def test_opcheck_backward(backend, reduction, grad_lse):
    logits, target, *rest = forward_arguments(backend, reduction=reduction)
    _, lse, low, total, _, _ = torch.ops.neglog.nll.default(logits, target, *rest)
    grad = torch.rand(() if reduction else (6,), requires_grad=True)
    options, name = rest[2:8], rest[-1]
    outcome = opcheck(
        torch.ops.neglog.nll_backward.default,
        (grad, grad_lse, logits, target, None, lse.detach(), low, total, *options, name),
    )
    assert set(outcome.values()) == {"SUCCESS"}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("stats", [False, True])
def test_compile_fullgraph(backend, dynamic, stats):
    torch._dynamo.reset()

    def loss(x, t):
        out = neglog.cross_entropy(x * 2, t, label_smoothing=0.1, return_stats=stats)
        return out.loss + out.logsumexp.mean() if stats else out

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic)
    logits, target = large()
    for rows in (200, 199):
        pair = []
        for function in (loss, compiled):
            x = logits[:rows].detach().requires_grad_()
            with dispatch.record() as ran:
                value = function(x, target[:rows])
                value.backward()
            assert ran == [f"nll:{backend}", f"nll_backward:{backend}"]
            pair.append((value.detach(), x.grad))
        torch.testing.assert_close(*pair)


def test_compile_ignored_row_and_in_place_request(backend):
    torch._dynamo.reset()
    logits, target = large()
    target[::2] = -100
    compiled = torch.compile(
        lambda x, t: neglog.cross_entropy(x.tanh(), t, inplace_backward=True), fullgraph=True
    )
    compiled(logits, target).backward()
    (expected,) = torch.autograd.grad(F.cross_entropy(logits.tanh(), target), logits)
    torch.testing.assert_close(logits.grad, expected)


def test_compile_of_few_numbers():
    torch._dynamo.reset()
    compiled = torch.compile(neglog.cross_entropy, fullgraph=True)
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


@pytest.mark.parametrize("mode", ["grad", "jacrev", "jacrev twice", "vmap", "vmap of grad", "jvp"])
def test_torch_func(backend, mode):
    x = torch.randn(3, 5, dtype=torch.float64)
    t = torch.tensor([0, 4, -100])
    batch = torch.randn(4, 3, 5, dtype=torch.float64)
    if mode == "jvp":
        backend = None  # forward mode is torch's alone: the choice is left to the dispatch
    func = torch.func
    apply = {
        "grad": lambda f: func.grad(f)(x),
        "jacrev": lambda f: func.jacrev(f)(x),
        "jacrev twice": lambda f: func.jacrev(func.jacrev(f))(x),
        "vmap": lambda f: func.vmap(f)(batch),
        "vmap of grad": lambda f: func.vmap(func.grad(f))(batch),
        "jvp": lambda f: func.jvp(f, (x,), (torch.ones_like(x),)),
    }[mode]
    with dispatch.use(backend):
        ours = apply(lambda x: neglog.cross_entropy(x, t, label_smoothing=0.1))
    torch.testing.assert_close(ours, apply(lambda x: F.cross_entropy(x, t, label_smoothing=0.1)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_autocast(backend, dtype):
    logits, target = large(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = neglog.cross_entropy(logits, target), F.cross_entropy(logits, target)
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs)
    pair = [torch.autograd.grad(loss, logits)[0] for loss in (ours, theirs)]
    assert pair[0].dtype == dtype
    torch.testing.assert_close(*pair, rtol=1e-2, atol=1e-6)


def test_retained_graph_and_create_graph(backend):
    logits, target = large(torch.float64)
    loss = neglog.cross_entropy(logits, target)
    first = torch.autograd.grad(loss, logits, retain_graph=True)[0].clone()
    second = torch.autograd.grad(loss, logits, create_graph=True)[0]
    torch.testing.assert_close(first, second)
    penalty = torch.autograd.grad(second.square().sum(), logits)[0]
    own = torch.autograd.grad(F.cross_entropy(logits, target), logits, create_graph=True)[0]
    torch.testing.assert_close(penalty, torch.autograd.grad(own.square().sum(), logits)[0])


def test_changing_the_logits_before_backward_is_caught(backend):
    leaf, target = large()
    logits = leaf * 1
    loss = neglog.cross_entropy(logits, target)
    with torch.no_grad():
        logits.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_changing_the_returned_logsumexp_changes_no_gradient(backend):
    logits, target = large()
    stats = neglog.cross_entropy(logits, target, return_stats=True)
    with torch.no_grad():
        stats.logsumexp.zero_()
    (gradient,) = torch.autograd.grad(stats.loss, logits)
    torch.testing.assert_close(
        gradient, torch.autograd.grad(F.cross_entropy(logits, target), logits)[0]
    )


def test_bits_do_not_depend_on_torchs_threads(backend):
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


def test_threads_of_the_user(backend):
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
    """The shelf hands a buffer on only when nothing looks at it any more."""
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
    twin = copy.deepcopy(logits.grad)
    logits.grad.mul_(2)
    assert torch.equal(logits.grad, twin * 2)


# In place


def test_batched_upstream(backend):
    logits, target = large()
    loss = neglog.cross_entropy(logits, target, reduction="none")
    upstream = torch.eye(len(target))[[0, 7, 3]]
    (ours,) = torch.autograd.grad(loss, logits, upstream, is_grads_batched=True)
    theirs = F.cross_entropy(logits, target, reduction="none")
    (theirs,) = torch.autograd.grad(theirs, logits, upstream, is_grads_batched=True)
    torch.testing.assert_close(ours, theirs)
