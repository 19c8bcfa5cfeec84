"""kl_div_loss against the oracle and torch's own formulas."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

import neglog
from neglog import dispatch, reference
from tests.support.distillation_cases import case, head_case, normal, plain, taught
from tests.support.errors import relative_error

BETAS = [0.0, 0.3, 1.0]


KINDS = ["logits", "probabilities", "named"]


BUDGET = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}


GRADIENT_BUDGET = {
    torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 2e-3,
}  # fmt: skip


NAN, INF = float("nan"), float("inf")


def truth(logits, target, given, upstream=1.0, **options):
    """By the oracle, of rows."""
    ids = given.get("teacher_ids")
    rows = given["teacher"].double().numpy().reshape(target.numel(), -1)
    names = {"token_weight": options.pop("token_weight", None)}
    weight = names["token_weight"]
    return reference.kl(
        logits.detach().double().numpy().reshape(-1, logits.shape[-1]), rows,
        ids=None if ids is None else ids.numpy().reshape(rows.shape),
        probabilities=given.get("teacher_probabilities", False), target=target.numpy().reshape(-1),
        token_weight=None if weight is None else weight.numpy().reshape(-1), grad_loss=upstream,
        **options,
    )  # fmt: skip


OPTIONS = {
    "plain": {},
    "temperature": {"temperature": 2.5},
    "mixed": {"temperature": 0.7, "soft_weight": 0.6, "hard_weight": 0.4},
    "mixed at 1": {"soft_weight": 2.0, "hard_weight": 0.5},
    "hard alone": {"soft_weight": 0.0, "hard_weight": 1.0},
    "scaled": {"logit_scale": 0.5, "softcap": 3.0, "hard_weight": 0.2},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("kind", KINDS)
def test_against_the_oracle(backend, kind, beta, reduction, options):
    logits, target, weight = case(4, 3, 37)
    given = taught(kind, logits.shape)
    upstream = torch.linspace(0.5, 2, 12 if reduction == "none" else 1).double()
    expected = truth(
        logits, target, given, upstream.numpy(), beta=beta, reduction=reduction,
        token_weight=weight, **options,
    )  # fmt: skip
    with dispatch.record() as ran:
        found = neglog.kl_div_loss(
            logits, given.pop("teacher"), target, beta=beta, reduction=reduction,
            token_weight=weight, return_stats=True, **given, **options,
        )  # fmt: skip
        (gradient,) = torch.autograd.grad(found.loss, logits, upstream.view(found.loss.shape))
    backward = [] if backend == "torch" else [f"kl_backward:{backend}"]
    assert ran == [f"kl:{backend}", *backward]
    assert relative_error(found.loss.detach().flatten(), expected.loss.reshape(-1)) < 1e-12
    assert relative_error(found.divergence.flatten(), expected.divergence) < 1e-12
    assert relative_error(found.cross_entropy.flatten(), expected.cross_entropy) < 1e-12
    assert relative_error(gradient.view(12, -1), expected.grad) < 1e-12


# Each dtype is read and written by other code; more than a block of 1024; a real vocabulary.
@pytest.mark.parametrize("dtype", list(BUDGET)[1:], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocab", [1, 2, 31, 257, 50257])
def test_dtypes_and_sizes(kernel_backend, dtype, kind, vocab):
    logits, target, _ = case(5, vocab, dtype=dtype)
    for of_teacher in {dtype, torch.float32}:
        # Probabilities in 16 bits are 0 for most classes of many, from which KL(p | q) is inf.
        betas = BETAS[:2] if kind == "probabilities" and of_teacher.itemsize == 2 else BETAS
        for beta in betas:
            given = taught(kind, logits.shape, of_teacher)
            expected = truth(logits, target, given, beta=beta, hard_weight=0.3, reduction="sum")
            loss = neglog.kl_div_loss(
                logits, given.pop("teacher"), target, beta=beta, hard_weight=0.3, reduction="sum",
                loss_dtype=torch.float32, backend=kernel_backend, **given,
            )  # fmt: skip
            (gradient,) = torch.autograd.grad(loss, logits)
            assert loss.dtype == torch.float32
            assert gradient.dtype == dtype
            assert relative_error(loss.detach().view(1), expected.loss.reshape(1)) < BUDGET[dtype]
            error = (gradient.double() - torch.from_numpy(expected.grad)).abs().max()
            assert error <= GRADIENT_BUDGET[dtype] * max(1e-3, abs(expected.grad).max())


def hard_rows(dtype):
    """A student that is sure, far apart scores, scores near 1e4 of either sign, and a teacher near
    it."""
    x, teacher = normal(7, 600), normal(7, 600, seed=1)
    x[0, 3] += 18  # p > 0.999
    teacher[0, 3] += 16
    x[1, 5] += 60
    x[2] *= 300
    x[3, 10:] = -1e4
    x[4] += 1e4
    teacher[5] -= 1e4
    teacher[6] = x[6] + 1e-3 * teacher[6]
    return x.to(dtype), teacher.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("kind", ["logits", "named"])
def test_no_further_from_the_truth_than_torch(kernel_backend, dtype, beta, kind):
    x, scores = hard_rows(dtype)
    given = {"teacher": scores}
    if kind == "named":
        found = scores.double().log_softmax(-1).topk(9, -1)
        given = {"teacher": found.values.to(dtype), "teacher_ids": found.indices}
        given["teacher"] = torch.where(given["teacher"].double().exp().sum(-1, True) < 1,
                                       given["teacher"], given["teacher"] - 0.01)  # fmt: skip
    leaves = [y.requires_grad_() for y in (x.double(), x.clone(), x.clone())]
    exact = plain(leaves[0], {**given, "teacher": given["teacher"].double()}, beta)
    theirs = plain(leaves[1], given, beta)
    teacher = given.pop("teacher")
    ours = neglog.kl_div_loss(
        leaves[2], teacher, beta=beta, reduction="none", loss_dtype=torch.float32,
        backend=kernel_backend, **given,
    )  # fmt: skip
    finite = exact.isfinite() & theirs.isfinite()
    assert finite.sum() >= 4
    made = [torch.autograd.grad(y[finite].sum(), leaf)[0] for y, leaf in
            zip((exact, theirs, ours), leaves, strict=True)]  # fmt: skip
    for wanted, given_by_torch, found in ((exact, theirs, ours), made):
        keep = finite if wanted.dim() == 1 else finite[:, None]
        errors = [((y.double() - wanted) * keep).nan_to_num().abs().amax()
                  for y in (given_by_torch, found)]  # fmt: skip
        rounding = 4 * torch.finfo(dtype if wanted.dim() > 1 else torch.float32).eps
        assert errors[1] <= errors[0] + rounding * (wanted * keep).nan_to_num().abs().amax()


def test_impossible_classes(backend):
    """What both call impossible adds nothing, and has no gradient; what one does makes inf or 0."""
    logits, teacher = normal(4, 6), normal(4, 6, seed=1)
    logits[0, 2] = teacher[0, 2] = -INF
    teacher[1, 4] = -INF
    logits[2, 1] = -INF
    logits.requires_grad_()
    for beta in BETAS:
        loss = neglog.kl_div_loss(logits, teacher, beta=beta, reduction="none", backend=backend)
        expected = reference.kl(
            logits.detach().numpy(), teacher.numpy(), beta=beta, reduction="none"
        )
        torch.testing.assert_close(loss, torch.from_numpy(expected.loss), rtol=1e-12, atol=1e-12)
        rows = loss.isfinite()
        (gradient,) = torch.autograd.grad(loss[rows].sum(), logits)
        found = torch.from_numpy(expected.grad)
        torch.testing.assert_close(gradient[rows], found[rows], rtol=1e-11, atol=1e-12)
        assert gradient[0, 2] == 0


def test_a_student_that_is_its_teacher(kernel_backend):
    logits = (normal(5, 3000) * 3).float().requires_grad_()
    for beta in BETAS:
        loss = neglog.kl_div_loss(
            logits, logits.detach(), beta=beta, reduction="none", backend=kernel_backend
        )
        assert loss.abs().max() < 2e-7
        assert torch.autograd.grad(loss.sum(), logits)[0].abs().max() < 1e-8


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beta", BETAS)
def test_rows_that_do_not_count(backend, kind, beta):
    """Exactly zero, whatever they hold."""
    logits, target, weight = case(4, 3, 37)
    given = taught(kind, logits.shape)
    mask = torch.ones(4, 3, dtype=torch.bool)
    mask[3, 1] = False
    nothing = (target == -100) | ~mask | (weight == 0)
    with torch.no_grad():
        logits[nothing] = NAN
        given["teacher"][nothing] = NAN
        target[weight == 0] = 999
        if "teacher_ids" in given:
            given["teacher_ids"][nothing] = -5
    loss = neglog.kl_div_loss(
        logits, given.pop("teacher"), target, beta=beta, hard_weight=0.5, mask=mask,
        token_weight=weight, reduction="none", **given,
    )  # fmt: skip
    assert (loss[nothing] == 0).all()
    assert loss.isfinite().all()
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert (gradient[nothing] == 0).all()
    assert gradient.isfinite().all()


def test_shift():
    """The teacher's distributions are of the same positions; target, mask and weights move."""
    logits, target, weight = case(3, 6, 37)
    given = taught("logits", logits.shape)
    mask = torch.rand(3, 6) > 0.3
    options = {"hard_weight": 0.5, "reduction": "none", "return_stats": True}
    found = neglog.kl_div_loss(
        logits, given["teacher"], target, shift=True, mask=mask, token_weight=weight, **options
    )
    expected = neglog.kl_div_loss(
        logits[:, :-1], given["teacher"][:, :-1], target[:, 1:], mask=mask[:, 1:],
        token_weight=weight[:, 1:], **options,
    )  # fmt: skip
    torch.testing.assert_close(tuple(found), tuple(expected))


@pytest.mark.parametrize("per_sequence", [True, torch.tensor([0, 5, 12])])
@pytest.mark.parametrize("num_items", [None, 7])
def test_mean_over_sequences(per_sequence, num_items):
    logits, target, weight = case(4, 3, 37)
    weight = weight.abs()
    teacher = taught("logits", logits.shape)["teacher"]
    by_row = neglog.kl_div_loss(logits, teacher, target, reduction="none").flatten()
    counted = weight.flatten() * (target.flatten() != -100)
    ends = [0, 3, 6, 9, 12] if per_sequence is True else per_sequence.tolist()
    spans = [slice(a, b) for a, b in pairwise(ends)]
    means = [(by_row[s] * counted[s]).sum() / counted[s].sum() for s in spans]
    loss = neglog.kl_div_loss(
        logits, teacher, target, token_weight=weight, per_sequence=per_sequence, num_items=num_items
    )
    torch.testing.assert_close(loss, sum(means) / (num_items or len(means)))


def test_a_weight_that_learns():
    logits, target, weight = case(4, 3, 37)
    teacher = taught("logits", logits.shape)["teacher"]
    weight.requires_grad_()
    by_row = neglog.kl_div_loss(logits, teacher, target, reduction="none")
    truth_of_mean = (by_row * weight).sum() / weight[target != -100].sum()
    loss = neglog.kl_div_loss(logits, teacher, target, token_weight=weight)
    torch.testing.assert_close(loss, truth_of_mean)
    found = torch.autograd.grad(loss, (logits, weight))
    torch.testing.assert_close(found, torch.autograd.grad(truth_of_mean, (logits, weight)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beta", BETAS)
def test_derivatives(backend, kind, beta):
    logits, target, weight = case(3, 11)
    given = taught(kind, logits.shape)
    options = {
        "beta": beta, "temperature": 1.5, "hard_weight": 0.3, "softcap": 4.0,
        "token_weight": weight, "backend": backend, "target": target,
    }  # fmt: skip

    def loss(x):
        return neglog.kl_div_loss(x, **given, **options)

    assert torch.autograd.gradcheck(loss, logits)
    assert torch.autograd.gradgradcheck(loss, logits)


def test_functional_gradient_and_vmap(kernel_backend):
    logits = case(3, 6, 37)[0]
    teacher = taught("logits", logits.shape)["teacher"]

    def loss(x, t):
        return neglog.kl_div_loss(x, t, beta=0.3, backend=kernel_backend)

    expected = torch.autograd.grad(loss(logits, teacher), logits)[0]
    torch.testing.assert_close(torch.func.grad(loss)(logits, teacher), expected)
    each = torch.stack([loss(x, t) for x, t in zip(logits, teacher, strict=True)])
    torch.testing.assert_close(torch.func.vmap(loss)(logits, teacher), each)
    several = torch.autograd.grad(
        loss(logits, teacher), logits, torch.tensor([1.0, 2.0]).double(), is_grads_batched=True
    )[0]
    torch.testing.assert_close(several, torch.stack([expected, 2 * expected]))


NUMBERS = (0.3, 1.5, 1.0, 0.4, 1.0, 0.0, 0.7, 0.0)


@pytest.mark.parametrize(("kind", "reduction"), [("logits", 0), ("named", 1)])
def test_opcheck(kind, reduction):
    logits, target, weight = case(6, 20, dtype=torch.float32)
    given = taught(kind, logits.shape, torch.float32)
    tensors = (logits, given["teacher"], given.get("teacher_ids"), target, weight.float())
    rest = (reduction, -100, False, *NUMBERS, "")
    outcome = opcheck(torch.ops.neglog.kl.default, (*tensors, None, *rest))
    assert set(outcome.values()) == {"SUCCESS"}
    grad = torch.rand(() if reduction else (6,), requires_grad=True)
    total = torch.tensor(3.0)
    outcome = opcheck(torch.ops.neglog.kl_backward.default, (grad, *tensors, total, *rest))
    assert set(outcome.values()) == {"SUCCESS"}


@pytest.mark.parametrize("form", ["logits", "head"])
def test_compiles_whole_for_numbers_in_tensors(form):
    torch.compiler.reset()
    (hidden, weight, _), (states, head, _), target = head_case(torch.float32)

    def loss(hidden, beta, temperature):
        options = {"beta": beta, "temperature": temperature, "target": target, "hard_weight": 0.5}
        if form == "logits":
            scores = F.linear(hidden, weight), F.linear(states, head)
            return neglog.kl_div_loss(*scores, **options)
        return neglog.linear_kl_div_loss(hidden, weight, states, teacher_weight=head, **options)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for numbers in ((0.0, 1.0), (0.5, 2.0), (1.0, 0.7)):
        given = [torch.tensor(x) for x in numbers]
        found, expected = compiled(hidden, *given), loss(hidden, *numbers)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(
            torch.autograd.grad(found, hidden), torch.autograd.grad(expected, hidden)
        )


def test_the_same_bits_in_any_batch(kernel_backend):
    """For any number of threads too, and wherever the gradient is formed."""
    logits, _, _ = case(64, 2100, dtype=torch.float32)
    given = taught("named", logits.shape, torch.float32)
    teacher = given.pop("teacher")
    whole = neglog.kl_div_loss(logits, teacher, reduction="none", backend=kernel_backend, **given)
    (gradient,) = torch.autograd.grad(whole.sum(), logits)
    part = neglog.kl_div_loss(
        logits[5:9], teacher[5:9], teacher_ids=given["teacher_ids"][5:9], reduction="none",
        backend=kernel_backend,
    )  # fmt: skip
    assert torch.equal(whole[5:9], part)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        loss = neglog.kl_div_loss(logits, teacher, reduction="sum", backend=kernel_backend, **given)
        assert torch.equal(torch.autograd.grad(loss, logits)[0], gradient)
    finally:
        torch.set_num_threads(before)


def test_an_upstream_that_changes_and_a_second_backward(kernel_backend):
    logits, target, _ = case(5, 300, dtype=torch.float32)
    teacher = taught("logits", logits.shape, torch.float32)["teacher"]
    expected = None
    for upstream in (1.0, 0.25, 0.25, 3.0):
        loss = neglog.kl_div_loss(logits, teacher, target, backend=kernel_backend)
        (found,) = torch.autograd.grad(loss, logits, torch.tensor(upstream), retain_graph=True)
        expected = found if expected is None else expected
        torch.testing.assert_close(found, expected * upstream)
        torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], expected)


def wrong_cases():
    x, t = torch.randn(3, 5), torch.randn(3, 5)
    ids = torch.tensor([[0, 1]] * 3)
    logs = torch.full((3, 2), -1.0)
    return {
        "no tensor": (TypeError, "teacher: expected a Tensor, got list", (x, [1.0]), {}),
        "its shape": (
            RuntimeError, r"teacher: expected shape \[3, 5\], got \[3, 4\]", (x, t[:, :4]), {},
        ),
        "it learns": (
            RuntimeError, "teacher: expected a Tensor without gradient",
            (x, t.clone().requires_grad_()), {},
        ),
        "integers": (RuntimeError, "teacher: expected dtype float32", (x, t.long()), {}),
        "its device": (
            RuntimeError, "teacher: expected device cpu, got meta", (x, t.to("meta")), {},
        ),
        "a scalar": (RuntimeError, r"input: expected shape \(..., C\)", (x[0, 0], t[0, 0]), {}),
        "ids of floats": (
            RuntimeError, "teacher_ids: expected dtype torch.int64 or torch.int32",
            (x, logs), {"teacher_ids": logs},
        ),
        "shape of ids": (
            RuntimeError, r"teacher_ids: expected shape \[3, 'K'\]", (x, logs),
            {"teacher_ids": ids[:2]},
        ),
        "shape beside ids": (
            RuntimeError, r"teacher: expected shape \[3, 2\], that of teacher_ids", (x, t),
            {"teacher_ids": ids},
        ),
        "an id twice": (
            ValueError, "teacher_ids: expected each class once in a row, got 1 twice at row",
            (x, logs), {"teacher_ids": ids * 0 + 1},
        ),
        "an id out of range": (
            IndexError, r"teacher_ids: 9 at row \d is out of range: expected 0 <= id < 5",
            (x, logs), {"teacher_ids": ids * 9},
        ),
        "no log-probabilities": (
            ValueError, "teacher: expected log-probabilities, got numbers at row . whose .* sum to",
            (x, logs + 3), {"teacher_ids": ids},
        ),
        "both": (
            ValueError, "teacher_probabilities: expected False with teacher_ids",
            (x, logs), {"teacher_ids": ids, "teacher_probabilities": True},
        ),
        "beta": (ValueError, "beta: expected 0 to 1, got 1.5", (x, t), {"beta": 1.5}),
        "temperature": (
            ValueError, "temperature: expected a number above 0, got 0", (x, t), {"temperature": 0}
        ),
        "no target": (
            ValueError, "target: expected class indices for the cross-entropy", (x, t),
            {"hard_weight": 0.5},
        ),
        "target out of range": (
            IndexError, "target 7 at row 1 is out of range: expected 0 <= target < 5",
            (x, t, torch.tensor([0, 7, 1])), {"hard_weight": 0.5},
        ),
        "shape of target": (
            ValueError, r"target: expected shape \[3\]", (x, t, torch.tensor([0, 7])), {},
        ),
        "reduction": (ValueError, "reduction: expected", (x, t), {"reduction": "batchmean"}),
        "mask": (RuntimeError, "mask: expected dtype torch.bool", (x, t), {"mask": x[:, 0]}),
        "num_items": (ValueError, "num_items", (x, t), {"num_items": 3, "reduction": "none"}),
    }  # fmt: skip


@pytest.mark.parametrize("wrong", wrong_cases().values(), ids=wrong_cases())
def test_errors(kernel_backend, wrong):
    error, message, given, options = wrong
    with pytest.raises(error, match=message):
        neglog.kl_div_loss(*given, backend=kernel_backend, **options)
