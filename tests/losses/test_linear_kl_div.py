"""linear_kl_div_loss against kl_div_loss of the logits, and torch's own formulas."""

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

import neglog
from neglog import dispatch
from tests.support.allocations import largest_allocation
from tests.support.distillation_cases import head_case, linear_given, normal, plain

BETAS = [0.0, 0.3, 1.0]
NUMBERS = (0.3, 1.5, 1.0, 0.4, 1.0, 0.0, 0.7, 0.0)


LINEAR = ["hidden states", "logits", "probabilities", "named"]


@pytest.mark.parametrize("kind", LINEAR)
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_linear_against_the_logits(backend, kind, beta, reduction):
    (hidden, weight, bias), teacher, target = head_case()
    given, alike = linear_given(kind, teacher)
    options = {
        "beta": beta, "temperature": 1.5, "hard_weight": 0.3, "reduction": reduction,
        "logit_scale": 0.8, "softcap": 9.0, "mask": torch.arange(9) != 4, "return_stats": True,
        "token_weight": normal(4, 9, seed=9),
    }  # fmt: skip
    expected = neglog.kl_div_loss(F.linear(hidden, weight, bias), target=target, **alike, **options)
    with dispatch.record() as ran:
        found = neglog.linear_kl_div_loss(
            hidden, weight, target=target, linear_bias=bias, options={"workspace_mb": 0.01},
            **given, **options,
        )  # fmt: skip
        upstream = torch.linspace(0.5, 2, found.loss.numel()).double().view(found.loss.shape)
        gradients = torch.autograd.grad(found.loss, (hidden, weight, bias), upstream)
    op = "kl" if backend == "torch" else "linear_kl"
    late = backend != "torch" and reduction == "none"
    assert ran == [f"{op}:{backend}", *([f"{op}_backward:{backend}"] if late else [])]
    torch.testing.assert_close(tuple(found), tuple(expected), rtol=1e-11, atol=1e-11)
    wanted = torch.autograd.grad(expected.loss, (hidden, weight, bias), upstream)
    torch.testing.assert_close(gradients, wanted, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", LINEAR)
def test_linear_is_no_further_from_the_truth_than_torch(kernel_backend, dtype, kind):
    student, teacher, target = head_case(dtype, rows=(64,), features=32, vocab=700, of_teacher=16)
    given, alike = linear_given(kind, teacher)
    wide = [x.detach().double().requires_grad_() for x in student]
    of_rows = {name: x.double() if x is not True and x.is_floating_point() else x
               for name, x in alike.items()}  # fmt: skip
    if kind == "hidden states":
        of_rows["teacher"] = F.linear(*(x.double() for x in teacher))
    exact = plain(F.linear(*wide), of_rows, 0.0)[target != -100].mean()
    theirs = plain(F.linear(*student), alike, 0.0)[target != -100].mean()
    ours = neglog.linear_kl_div_loss(
        student[0], student[1], target=target, linear_bias=student[2], backend=kernel_backend,
        **given,
    )  # fmt: skip
    wanted, by_torch, found = (
        torch.autograd.grad(loss, leaves)
        for loss, leaves in ((exact, wide), (theirs, student), (ours, student))
    )
    for truth_of, other, made in zip(wanted, by_torch, found, strict=True):
        assert made.dtype == dtype
        errors = [(x.double() - truth_of).norm() for x in (other, made)]
        assert errors[1] <= 1.05 * errors[0] + torch.finfo(dtype).eps * truth_of.norm()


@pytest.mark.parametrize("kind", ["hidden states", "named"])
def test_linear_writes_no_logits(kernel_backend, kind):
    """Beyond the gradients, which are as large as what they are of."""
    rows, vocab = 3000, 2000
    student, teacher, target = head_case(
        torch.float32, rows=(rows,), features=16, vocab=vocab, of_teacher=16
    )
    given, _ = linear_given(kind, teacher)

    def step():
        neglog.linear_kl_div_loss(
            student[0], student[1], target=target, options={"workspace_mb": 2}, **given
        ).backward()

    assert largest_allocation(step) <= 2 << 20
    assert rows * vocab * 4 > 8 * 2 << 20


def test_a_scale_that_learns():
    (hidden, weight, _), teacher, target = head_case()
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    given, alike = linear_given("hidden states", teacher)
    leaves = (hidden, weight, scale)
    found = neglog.linear_kl_div_loss(hidden, weight, target=target, logit_scale=scale, **given)
    logits = F.linear(hidden, weight)
    by_logits = neglog.kl_div_loss(logits, target=target, logit_scale=scale, **alike)
    plainly = neglog.kl_div_loss(logits * scale, target=target, **alike)
    for loss in (found, by_logits):
        torch.testing.assert_close(loss, plainly)
        torch.testing.assert_close(
            torch.autograd.grad(loss, leaves, retain_graph=True),
            torch.autograd.grad(plainly, leaves, retain_graph=True),
        )


@pytest.mark.parametrize("kind", LINEAR)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_derivatives_of_a_head(kind, reduction):
    (hidden, weight, bias), teacher, target = head_case(rows=(5,), features=3, vocab=7)
    given, _ = linear_given(kind, teacher)

    def loss(hidden, weight, bias):
        return neglog.linear_kl_div_loss(
            hidden, weight, target=target, linear_bias=bias, hard_weight=0.3, reduction=reduction,
            **given,
        )  # fmt: skip

    assert torch.autograd.gradcheck(loss, (hidden, weight, bias))
    assert torch.autograd.gradgradcheck(loss, (hidden, weight, bias))


@pytest.mark.parametrize("reduction", [0, 1])
def test_opcheck_of_a_head(reduction):
    (hidden, weight, bias), teacher, target = head_case(torch.float32, rows=(6,))
    tensors = (hidden, weight, bias, *teacher, None, target, None)
    rest = (reduction, -100, False, *NUMBERS, [reduction] * 3, 1 << 16, torch.float32, 0.0, "")
    opcheck(torch.ops.neglog.linear_kl.default, (*tensors, None, *rest))
    made = torch.ops.neglog.linear_kl.default(*tensors, None, *rest)
    kept = (torch.ones_like(made[0]), *tensors, made[1], *made[-3:])
    kept = tuple(
        x.detach().requires_grad_(x.is_floating_point() and x.requires_grad)
        if isinstance(x, torch.Tensor) else x for x in kept
    )  # fmt: skip
    rest = (reduction, -100, False, *NUMBERS, [1] * 3, 1 << 16, torch.float32, 0.0, "")
    opcheck(
        torch.ops.neglog.linear_kl_backward.default, (*kept, *rest),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )  # fmt: skip


def test_autocast(kernel_backend):
    (hidden, weight, bias), (states, head, shift), target = head_case(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = neglog.linear_kl_div_loss(
            hidden, weight, states, target, linear_bias=bias, teacher_weight=head,
            teacher_bias=shift, backend=kernel_backend,
        )  # fmt: skip
        scores = F.linear(hidden, weight, bias), F.linear(states, head, shift)
        expected = neglog.kl_div_loss(*scores, target, backend=kernel_backend)
    assert loss.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0.02, atol=0.02)
    found = torch.autograd.grad(loss, (hidden, weight, bias))
    assert {x.dtype for x in found} == {torch.float32}
    wanted = torch.autograd.grad(expected, (hidden, weight, bias))
    torch.testing.assert_close(found, wanted, rtol=0.1, atol=2e-3)


def wrong_heads():
    h, w = torch.randn(3, 4), torch.randn(5, 4)
    s, v = torch.randn(3, 6), torch.randn(5, 6)
    ids, logs = torch.tensor([[0, 1], [1, 0], [2, 2]]), torch.full((3, 2), -1.0)
    return {
        "features": (
            RuntimeError, r"teacher: expected shape \[3, 6\], hidden states",
            (h, w, s[:, :5]), {"teacher_weight": v},
        ),
        "classes": (
            RuntimeError, r"teacher_weight: expected shape \[5, E\]", (h, w, s),
            {"teacher_weight": v[:4]},
        ),
        "bias alone": (
            ValueError, "teacher_bias: expected none without teacher_weight", (h, w, s),
            {"teacher_bias": v[:, 0]},
        ),
        "bias": (
            RuntimeError, r"teacher_bias: expected shape \[5\]", (h, w, s),
            {"teacher_weight": v, "teacher_bias": v[:4, 0]},
        ),
        "dtype": (
            RuntimeError, "teacher_weight: expected dtype torch.float32, got torch.float64",
            (h, w, s), {"teacher_weight": v.double()},
        ),
        "ids beside a head": (
            ValueError, "teacher_ids: expected none with teacher_weight", (h, w, s),
            {"teacher_weight": v, "teacher_ids": ids},
        ),
        "softcap of probabilities": (
            ValueError, "teacher_logit_scale, teacher_softcap: expected none",
            (h, w, logs), {"teacher_ids": ids, "teacher_softcap": 3.0},
        ),
        "softcap": (
            ValueError, "teacher_softcap: expected a finite number above 0", (h, w, s),
            {"teacher_weight": v, "teacher_softcap": -1.0},
        ),
        "an id twice": (
            ValueError, "teacher_ids: expected each class once in a row, got 2 twice at row 2",
            (h, w, logs), {"teacher_ids": ids, "mask": torch.tensor([False, True, True])},
        ),
        "the student's head": (
            RuntimeError, "linear_weight: expected in_features 4", (h, v, s), {},
        ),
    }  # fmt: skip


@pytest.mark.parametrize("wrong", wrong_heads().values(), ids=wrong_heads())
def test_errors_of_a_head(wrong):
    error, message, given, options = wrong
    with pytest.raises(error, match=message):
        neglog.linear_kl_div_loss(*given, **options)
