"""neglog.token_logprobs and linear_token_logprobs against the oracle and torch's own formulas."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import neglog
from neglog import dispatch, reference
from tests.support.allocations import largest_allocation
from tests.support.errors import relative_error
from tests.support.linear_cases import draw as draw_head

BUDGET = {torch.float64: 2e-14, torch.float32: 2e-6, torch.bfloat16: 2e-6, torch.float16: 2e-6}
GRADIENT_BUDGET = {
    torch.float64: 2e-14, torch.float32: 4e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3,
}  # fmt: skip


def draw(*shape, dtype=torch.float64, seed=0):
    """Logits (..., C), a target of which a quarter does not count, an upstream of each result."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(shape, generator=generator, dtype=torch.float64) * 3).to(dtype)
    target = torch.randint(shape[-1], shape[:-1], generator=generator)
    target.view(-1)[1::4] = -100
    real = torch.float64 if dtype == torch.float64 else torch.float32
    upstream = torch.randn(3, *shape[:-1], generator=generator, dtype=torch.float64).to(real)
    return logits.requires_grad_(), target, upstream


def total(found, upstream):
    return sum((one * grad).sum() for one, grad in zip(found[:3], upstream, strict=True))


def truth(logits, target, upstream, temperature=1.0, logit_scale=1.0, softcap=None):
    """The results and the gradient by the oracle, whose rows that do not count are emptied."""
    x = logits.detach().double().numpy().reshape(-1, logits.shape[-1])
    t = target.numpy().reshape(-1)
    counted = t != -100
    of_logprob, of_entropy, of_lse = (
        np.where(counted, g.double().numpy().reshape(-1), 0) for g in upstream
    )
    made = reference.nll(
        x, t, reduction="none", logit_scale=logit_scale / temperature,
        softcap=softcap and softcap / temperature, grad_loss=-of_logprob, grad_lse=of_lse,
        grad_entropy=of_entropy,
    )  # fmt: skip
    results = (-made.loss, made.entropy, made.lse, made.argmax, made.correct)
    return [np.where(counted, x, 0) for x in results], made.grad


def check(found, gradient, expected, dtype, slack=1):
    results, exact = expected
    for name, one, other in zip(found._fields, found, results, strict=True):
        assert relative_error(one.detach().flatten().double(), other) <= slack * BUDGET[dtype], name
    assert gradient.dtype == dtype
    flat = gradient.double().view(-1, gradient.shape[-1])
    assert relative_error(flat, exact) <= GRADIENT_BUDGET[dtype]


OPTIONS = [
    {},
    {"temperature": 0.7},
    {"temperature": 1.5, "logit_scale": 0.5, "softcap": 5.0},
]


# One row, few classes (a group of rows at a time), more than a block of 2048, a real vocabulary.
@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "temperature", "softcap"])
@pytest.mark.parametrize("dtype", BUDGET, ids=str)
@pytest.mark.parametrize("shape", [(1,), (1, 1), (7, 2), (3, 2, 31), (5, 257), (3, 50257)], ids=str)
def test_against_the_oracle(backend, shape, dtype, options):
    if len(shape) == 1:
        shape = (31,)
    logits, target, upstream = draw(*shape, dtype=dtype)
    with dispatch.record() as ran:
        found = neglog.token_logprobs(logits, target, **options)
        (gradient,) = torch.autograd.grad(total(found, upstream), logits)
    expected = (
        ["nll:torch"] if backend == "torch" else [f"nll:{backend}", f"nll_backward:{backend}"]
    )
    assert ran == expected
    assert found.argmax.dtype == torch.int64
    assert found.correct.dtype == torch.bool
    slack = 3 if backend == "torch" else 1  # its float32 sums over 50,000 classes
    check(found, gradient, truth(logits, target, upstream, **options), dtype, slack)


def plain(logits, target):
    """As trainers write it in torch, in the dtype of the logits."""
    log_p = logits.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return log_p.gather(-1, target[..., None]).squeeze(-1), entropy, logits.logsumexp(-1)


def hard(dtype):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(6, 1000, generator=generator, dtype=torch.float64)
    x[0, 3] += 18  # p > 0.999
    x[1, 5] += 60
    x[2] *= 1e3
    x[3, 10:] = -1e4
    x[4] += 1e4
    x[5, ::2] -= 300
    return x.to(dtype), torch.tensor([3, 5, 0, 2, 7, 1])


@pytest.mark.parametrize("dtype", list(BUDGET)[1:], ids=str)
def test_no_further_from_the_truth_than_torch(kernel_backend, dtype):
    """Of rows that are nearly certain, of scores of 1e4, and the gradients of each result."""
    x, target = hard(dtype)
    exact = x.double().requires_grad_()
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    results = [
        neglog.token_logprobs(ours, target)[:3], plain(theirs, target), plain(exact, target),
    ]  # fmt: skip
    for at in range(3):
        made = []
        for found, leaf in zip(results, (ours, theirs, exact), strict=True):
            (gradient,) = torch.autograd.grad(found[at].sum(), leaf, retain_graph=True)
            made.append((found[at].detach().double(), gradient.double()))
        for own, torchs, true in zip(*made, strict=True):
            rounding = 2 * torch.finfo(own.dtype).eps
            error, allowed = (own - true).abs().max(), (torchs - true).abs().max()
            assert error <= allowed + rounding, at


def test_masked_scores_have_no_probability(kernel_backend):
    logits = torch.tensor([[0.0, -torch.inf, 1.0, -torch.inf]], requires_grad=True)
    found = neglog.token_logprobs(logits, torch.tensor([2]))
    (gradient,) = torch.autograd.grad(found.entropy.sum() + found.logprob.sum(), logits)
    short = torch.tensor([[0.0, 1.0]], requires_grad=True)
    expected = plain(short, torch.tensor([1]))
    (exact,) = torch.autograd.grad(expected[0].sum() + expected[1].sum(), short)
    torch.testing.assert_close(found.entropy, expected[1])
    assert gradient[0, [1, 3]].tolist() == [0, 0]
    torch.testing.assert_close(gradient[:, [0, 2]], exact)


def test_what_does_not_count(backend):
    """All are 0, and so is the gradient, of NaN too; the mask, the index and a shift agree."""
    logits, target, upstream = draw(2, 6, 40)
    with torch.no_grad():
        logits[target == -100] = torch.nan
    found = neglog.token_logprobs(logits, target)
    (gradient,) = torch.autograd.grad(total(found, upstream), logits)
    skipped = target == -100
    assert not any(x[skipped].any() for x in found)
    assert not gradient[skipped].any()
    assert gradient[~skipped].any(-1).all()
    by_mask = neglog.token_logprobs(logits, target.clamp(min=0), mask=~skipped)
    for one, other in zip(found, by_mask, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    shifted = neglog.token_logprobs(logits.detach().nan_to_num(), target, shift=True)
    direct = neglog.token_logprobs(logits.detach().nan_to_num()[:, :-1], target[:, 1:])
    for one, other in zip(shifted, direct, strict=True):
        assert one.shape == (2, 5)
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def of_head(head, target, **options):
    return neglog.linear_token_logprobs(head[0], head[1], target, linear_bias=head[2], **options)


# Several tiles and one; each backend.
@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "temperature", "softcap"])
@pytest.mark.parametrize("workspace", [0.1, 64])
def test_of_a_head(backend, workspace, options):
    *head, target = draw_head(120, 8, 300)
    tiles = {"workspace_mb": workspace}
    upstream = draw(120, 2)[2]
    with dispatch.record() as ran:
        found = of_head(head, target, options=tiles, **options)
        gradients = torch.autograd.grad(total(found, upstream), head)
    kind = "nll" if backend == "torch" else "linear_nll"
    assert ran[0] == f"{kind}:{backend}"
    logits = F.linear(*head)
    expected = neglog.token_logprobs(logits, target, backend="torch", **options)
    exact = torch.autograd.grad(total(expected, upstream), head)
    for one, other in zip([*found, *gradients], [*expected, *exact], strict=True):
        torch.testing.assert_close(one, other)
    assert found.argmax[target != -100].tolist() == logits.argmax(-1)[target != -100].tolist()


def test_of_a_head_in_16_bits(kernel_backend):
    """Scores are float32, as wide as they are multiplied; so are the results."""
    *head, target = draw_head(90, 16, 500, dtype=torch.bfloat16)
    found = of_head(head, target)
    exact = [part.detach().double() for part in head]
    expected = of_head(exact, target)
    assert {x.dtype for x in found[:3]} == {torch.float32}
    for one, other in zip(found[:3], expected[:3], strict=True):
        torch.testing.assert_close(one.double(), other, rtol=2e-2, atol=6e-2)
    gradients = torch.autograd.grad(found.logprob.sum() + found.entropy.sum(), head)
    assert {g.dtype for g in gradients} == {torch.bfloat16}


def test_the_logits_of_a_head_never_lie_in_memory(kernel_backend):
    *head, target = draw_head(2000, 4, 2000, dtype=torch.float32)

    def run():
        found = of_head(head, target, options={"workspace_mb": 1})
        torch.autograd.grad(found.logprob.sum() + found.entropy.sum(), head)

    assert largest_allocation(run) <= 2 << 20


# Both sides of what groups of rows compute.
@pytest.mark.parametrize(("rows", "classes"), [(3, 5), (1, 130)])
def test_derivatives(kernel_backend, rows, classes):
    logits, target, _ = draw(rows, classes)
    options = {"temperature": 0.8, "softcap": 4.0}

    def function(x):
        return neglog.token_logprobs(x, target, **options)[:3]

    assert torch.autograd.gradcheck(function, logits)
    assert torch.autograd.gradgradcheck(function, logits)


def test_derivatives_of_a_head(kernel_backend):
    *head, target = draw_head(5, 3, 7)

    def function(*head):
        return of_head(head, target, temperature=0.8)[:3]

    assert torch.autograd.gradcheck(function, tuple(head))
    assert torch.autograd.gradgradcheck(function, tuple(head))


def test_a_scale_that_learns(backend):
    logits, target, upstream = draw(4, 40)
    scale = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)

    def run(name):
        given = {"logit_scale": scale, "softcap": 6.0, "temperature": 0.9, "backend": name}
        found = neglog.token_logprobs(logits, target, **given)
        return torch.autograd.grad(total(found, upstream), (logits, scale))

    torch.testing.assert_close(run(backend), run("torch"))


def test_transforms(kernel_backend):
    logits, target, upstream = draw(3, 4, 40)

    def loss(x, t, g):
        return total(neglog.token_logprobs(x, t), g)

    (expected,) = torch.autograd.grad(loss(logits, target, upstream), logits)
    found = torch.func.grad(loss)(logits.detach(), target, upstream)
    torch.testing.assert_close(found, expected)
    each = torch.func.vmap(torch.func.grad(loss))(
        logits.detach(), target, upstream.transpose(0, 1).contiguous()
    )
    torch.testing.assert_close(each, expected)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", ["logits", "head"])
def test_compiles_whole(name, dynamic):
    torch.compiler.reset()

    def loss(*given):
        *head, target = given
        if name == "head":
            found = of_head(head, target, temperature=0.7)
        else:
            found = neglog.token_logprobs(head[0], target, temperature=0.7)
        return (found.logprob - 0.1 * found.entropy + found.correct).sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (40, 39):
        given = draw_head(rows, 6, 50) if name == "head" else draw(rows, 50)[:2]
        learned = given[:-1]
        ours, own = compiled(*given), loss(*given)
        torch.testing.assert_close(ours, own)
        torch.testing.assert_close(
            torch.autograd.grad(ours, learned), torch.autograd.grad(own, learned)
        )


def test_exports_with_dynamic_rows():
    class Model(torch.nn.Module):
        def forward(self, x, target):
            return neglog.token_logprobs(x, target, shift=True)[:2]

    logits, target, _ = draw(4, 9, 31)
    rows = {0: torch.export.Dim("batch", min=2, max=64)}
    program = torch.export.export(
        Model(), (logits.detach(), target), dynamic_shapes={"x": rows, "target": rows}
    )
    logits, target, _ = draw(7, 9, 31, seed=1)
    expected = Model()(logits.detach(), target)
    torch.testing.assert_close(program.module()(logits.detach(), target), expected)


def test_the_same_bits_in_any_batch(kernel_backend):
    """Alone, in a batch of other rows, and by another number of threads."""
    logits, target, upstream = draw(40, 3000, dtype=torch.float32)

    def run(rows):
        leaf = logits.detach()[rows].clone().requires_grad_()
        found = neglog.token_logprobs(leaf, target[rows])
        return [*found, *torch.autograd.grad(total(found, upstream[:, rows]), leaf)]

    whole, threads = run(slice(None)), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        for rows in (slice(2, 3), slice(7, 23)):
            for one, other in zip(run(rows), whole, strict=True):
                assert torch.equal(one, other[rows])
    finally:
        torch.set_num_threads(threads)


def test_a_graph_is_walked_twice_and_results_may_be_changed(kernel_backend):
    *head, target = draw_head(30, 4, 50)
    for found, learned in (
        (neglog.token_logprobs(head[0], target % 4), head[:1]), (of_head(head, target), head),
    ):  # fmt: skip
        loss = found.logprob.sum() + 2 * found.entropy.sum()
        first = torch.autograd.grad(loss, learned, retain_graph=True)
        with torch.no_grad():
            for x in found:
                x.zero_()
        torch.testing.assert_close(torch.autograd.grad(loss, learned), first)


def test_under_autocast(kernel_backend):
    *head, target = draw_head(60, 8, 200, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = of_head(head, target)
    gradients = torch.autograd.grad(found.logprob.sum() - found.entropy.sum(), head)
    assert found.logprob.dtype == torch.float32
    assert {g.dtype for g in gradients} == {torch.float32}
    exact = of_head(head, target)
    torch.testing.assert_close(found.logprob, exact.logprob, rtol=2e-2, atol=6e-2)


def test_of_nothing(backend):
    for shape in ((0, 5), (2, 0, 5)):
        logits = torch.zeros(shape, requires_grad=True)
        found = neglog.token_logprobs(logits, torch.zeros(shape[:-1], dtype=torch.int64))
        assert all(x.shape == shape[:-1] for x in found)
        assert torch.autograd.grad(found.entropy.sum(), logits)[0].shape == shape


LOGITS, TARGET, HEAD = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64), torch.ones(9, 5)
BAD = {
    "no tensor": (TypeError, "logits: expected a Tensor, got list", {"logits": [1.0]}),
    "integers": (NotImplementedError, "logits: .*floating-point", {"logits": LOGITS.long()}),
    "a scalar": (IndexError, "logits: .*got a scalar", {"logits": torch.tensor(1.0)}),
    "shape": (RuntimeError, r"target: expected shape \[2, 3\] \(class indices\), got \[2\]",
              {"target": TARGET[:, 0]}),
    "probabilities": (RuntimeError, r"target: expected shape \[2, 3\]", {"target": LOGITS}),
    "floats": (RuntimeError, "target", {"target": TARGET.float()}),
    "range": (IndexError, "target 5 at row 0 is out of range: expected 0 <= target < 5",
              {"target": TARGET + 5}),
    "temperature": (ValueError, "temperature: expected a number above 0, got 0",
                    {"temperature": 0}),
    "no number": (TypeError, "temperature: expected a number, got str", {"temperature": "1"}),
    "learns": (ValueError, "temperature: expected a number without gradient",
               {"temperature": torch.tensor(1.0, requires_grad=True)}),
    "softcap": (ValueError, "softcap: expected a finite number above 0", {"softcap": -1.0}),
    "mask": (RuntimeError, "mask: expected dtype torch.bool", {"mask": TARGET}),
    "shift of one vector": (RuntimeError, r"shift: .* of shape \(..., T, C\), got one vector",
                            {"logits": LOGITS[0, 0], "target": TARGET[0, 0], "shift": True}),
    "shift": (TypeError, "shift: expected a bool, got int", {"shift": 1}),
    "ignore_index": (TypeError, "ignore_index", {"ignore_index": 0.5}),
    "backend": (ValueError, "backend", {"backend": "gpu"}),
}  # fmt: skip


@pytest.mark.parametrize(("error", "message", "change"), BAD.values(), ids=BAD.keys())
def test_bad_input(error, message, change):
    given = {"logits": LOGITS, "target": TARGET, **change}
    with pytest.raises(error, match=message):
        neglog.token_logprobs(**given)


def test_bad_heads():
    with pytest.raises(RuntimeError, match=r"linear_weight: expected shape \(C, in_features\)"):
        neglog.linear_token_logprobs(LOGITS[0], HEAD[:, None], TARGET[0])
    with pytest.raises(RuntimeError, match="linear_weight: expected in_features 5"):
        neglog.linear_token_logprobs(LOGITS, HEAD[:, 1:], TARGET)
    with pytest.raises(RuntimeError, match=r"target: expected shape \[2, 3\] \(class indices\), g"):
        neglog.linear_token_logprobs(LOGITS, HEAD, torch.zeros(2, 3, 9))
    with pytest.raises(TypeError, match="options: expected None, a dict"):
        neglog.linear_token_logprobs(LOGITS, HEAD, TARGET, options={"workspace": 1})
