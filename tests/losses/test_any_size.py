"""What a loss over classes means does not depend on how many numbers there are.

Each form of each loss with each option, at three sizes; then what once differed, or still has two
paths. tests/test_checks.py shows it for arguments and errors, test_any_size_of_pairs.py for losses
over embeddings.
"""

import math
from functools import cache

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor

import neglog
from neglog import dispatch
from neglog.losses._result import LossStats
from tests.support.backends import BEST
from tests.support.nll_tensors import LOSSES, loss_of

# One call of a kernel in one thread, a few tiles, and more logits than have their gradient formed
# in the forward, on several threads. Few classes, so that these are many rows.
SIZES = (5, 700, 30_000)
CLASSES = 11

# Below and above what nll calls small, and several tiles and threads.
ROWS = (9, 3000)
VOCAB = 50


def by_masked(logits, target, ignore_index=-100, **options):
    counted = target != ignore_index
    return neglog.masked_cross_entropy(logits, target.clamp(min=0), counted, **options)


def by_axis_1(logits, target, **options):
    """(N, C) as (N / 5, C, 5), as logits of segmentation lie."""
    apart = logits.view(-1, 5, CLASSES).transpose(1, 2).contiguous()
    made = neglog.cross_entropy(apart, target.view(-1, 5), **options)
    if not isinstance(made, Tensor):
        return LossStats(*(x.flatten() if x.dim() else x for x in made))
    return made.flatten() if made.dim() else made


def by_linear(logits, target, **options):
    head = torch.eye(CLASSES, dtype=logits.dtype)
    return neglog.linear_cross_entropy(logits, head, target, **options)


def of_probabilities(function):
    """With a distribution for each row, one of five, of which none is ignored."""

    def loss(logits, target, ignore_index=None, **options):
        rows = (torch.arange(len(target)) % 5)[:, None] + torch.arange(CLASSES)
        return function(logits, rows.to(logits.dtype).sin().softmax(1), **options)

    return loss


def by_masked_probabilities(logits, target, ignore_index=-100, **options):
    def masked(logits, probabilities, **options):
        return neglog.masked_cross_entropy(logits, probabilities, target != ignore_index, **options)

    return of_probabilities(masked)(logits, target, **options)


FORMS = {
    "cross_entropy": neglog.cross_entropy,
    "axis 1": by_axis_1,
    "masked": by_masked,
    "linear": by_linear,
    "probabilities": of_probabilities(neglog.cross_entropy),
    "masked probabilities": by_masked_probabilities,
    "linear, probabilities": of_probabilities(by_linear),
}
WEIGHT = torch.linspace(0.5, 2, CLASSES)
EACH_OPTION = {
    "plain": {},
    "weight": {"weight": WEIGHT},
    "ignore_index": {"ignore_index": 3},
    "label_smoothing": {"label_smoothing": 0.1},
    "logit_scale": {"logit_scale": 0.5},
    "tensor": {"logit_scale": torch.tensor(0.5), "z_loss": torch.tensor(0.1)},
    "learned": {"logit_scale": torch.tensor(0.5, requires_grad=True)},
    "softcap": {"softcap": 3.0},
    "z_loss": {"z_loss": 0.1},
    "stats": {"return_stats": True},
    "in place": {"inplace_backward": True},
    "loss_dtype": {"loss_dtype": torch.float64},
    "all": {"weight": WEIGHT, "label_smoothing": 0.1, "logit_scale": 0.5, "softcap": 3.0,
            "z_loss": 0.1, "return_stats": True},
}  # fmt: skip


@cache
def batch(dtype):
    """The largest batch, whose first rows are the smaller ones: logits, targets, upstream."""
    rows = max(SIZES)
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(rows, CLASSES, generator=generator)).to(dtype)
    target = torch.arange(rows) * 7 % CLASSES
    for first, value in ((1, torch.nan), (13, torch.inf), (25, -torch.inf), (37, 6e4)):
        logits[first::48, first % CLASSES] = value
    logits[49::480] = -torch.inf
    upstream = (torch.arange(rows) % 7 + 1).to(dtype) / 4
    return logits, target, upstream


def by_row(form, options, dtype, rows, backend):
    """Loss, statistics and gradient of the first rows of the batch."""
    logits, target, upstream = (x[:rows].clone() for x in batch(dtype))
    target[1::3] = options.get("ignore_index", -100)
    target[2::5] = options.get("ignore_index", -100)
    logits.requires_grad_()
    if "weight" in options:
        options = options | {"weight": options["weight"].to(dtype)}
    made = FORMS[form](logits * 1, target, reduction="none", backend=backend, **options)
    loss, *stats = made if isinstance(made, LossStats) else [made]
    (grad,) = torch.autograd.grad(loss, logits, upstream.to(loss.dtype))
    return {"loss": loss.detach(), "grad": grad, **dict(enumerate(stats))}


def cases():
    """Each option; and without any each dtype. What a form does not take is left out."""
    for form in FORMS:
        for option, values in EACH_OPTION.items():
            in_place = form.startswith("linear") and option == "in place"
            no_index = "probabilities" in form and option == "ignore_index"
            if not (in_place or no_index):
                yield pytest.param(form, values, torch.float32, id=f"{form}-{option}")
        for dtype in (torch.float64, torch.bfloat16, torch.float16):
            yield pytest.param(form, EACH_OPTION["all"], dtype, id=f"{form}-{dtype}")


# The logits hold NaN, inf and rows of -inf, some in rows that are ignored. A matmul of other size
# may sum in another order, though by a unit matrix it adds zeros alone.
@pytest.mark.parametrize(("form", "options", "dtype"), list(cases()))
def test_a_row_is_what_it_is_at_any_size(form, options, dtype):
    """Bit for bit: loss, statistics, gradient, whatever lies beside the row."""
    small, middle, large = (by_row(form, options, dtype, rows, BEST) for rows in SIZES)
    for name, expected in middle.items():
        for rows, few, many in ((5, small[name], expected), (700, expected, large[name])):
            assert many.dtype == few.dtype
            torch.testing.assert_close(many[:rows], few, rtol=0, atol=0, equal_nan=True)


# In float64, where two correct answers differ in the last digits alone.
@pytest.mark.parametrize("option", EACH_OPTION)
@pytest.mark.parametrize("form", FORMS)
def test_torch_formula_means_the_same(form, option):
    options = EACH_OPTION[option]
    if form.startswith("linear"):
        options = {k: v for k, v in options.items() if k != "inplace_backward"}
    for rows in SIZES[:2]:
        found = by_row(form, options, torch.float64, rows, BEST)
        expected = by_row(form, options, torch.float64, rows, "torch")
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12, equal_nan=True)


# A mean, and a sum over num_items, of five rows again and again are those of the five. In float16
# the sum of 30,000 losses is beyond the dtype, and that of the five is not.
@pytest.mark.parametrize("option", ["plain", "all", "in place"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
def test_a_mean_of_equal_rows_does_not_depend_on_their_number(form, dtype, option):
    options = EACH_OPTION[option]
    if form.startswith("linear"):
        options = {k: v for k, v in options.items() if k != "inplace_backward"}
    if "weight" in options:
        options = options | {"weight": options["weight"].to(dtype)}
    five = torch.linspace(-3, 3, 5 * CLASSES).view(5, CLASSES).sin().mul(4).to(dtype)
    five[1] = torch.nan if "probabilities" not in form else 0
    labels = torch.tensor([0, -100, 5, 7, 9])
    found = {}
    for rows in SIZES:
        times = rows // 5
        logits, target = five.repeat(times, 1).requires_grad_(), labels.repeat(times)
        for divisor in ({}, {"num_items": torch.tensor(2 * times)}):
            made = FORMS[form](logits * 1, target, **divisor, **options)
            loss = made.loss if isinstance(made, LossStats) else made
            (grad,) = torch.autograd.grad(loss, logits, torch.tensor(times, dtype=loss.dtype))
            found.setdefault(len(divisor), []).append((loss.detach(), grad[:5], grad[-5:]))
    for expected, *others in found.values():
        assert expected[0].isfinite()
        assert expected[1].isfinite().all()
        for other in others:
            torch.testing.assert_close(other, expected)


@pytest.mark.parametrize("form", [name for name in FORMS if "probabilities" not in name])
def test_of_rows_that_are_all_ignored(form):
    """A mean of nothing is NaN as torch has it, a sum is 0, and no gradient is either."""
    for rows in SIZES:
        logits = torch.randn(rows, CLASSES, requires_grad=True)
        target = torch.full((rows,), -100)
        for reduction, expected in (("mean", torch.nan), ("sum", 0.0), ("none", 0.0)):
            loss = FORMS[form](logits, target, reduction=reduction)
            assert loss.shape == ((rows,) if reduction == "none" else ())
            assert (loss.isnan() if reduction == "mean" else loss == 0).all(), expected
            (grad,) = torch.autograd.grad(loss.sum(), logits)
            assert not grad.any()


def draw(rows, dtype=torch.float32):
    """Logits, every third row of which is ignored and NaN, inf or -inf."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, VOCAB, generator=generator).to(dtype)
    target = torch.arange(rows) % VOCAB
    target[1::3] = -100
    for first, value in ((1, torch.nan), (4, torch.inf), (7, -torch.inf)):
        logits[first::9] = value
    return logits.requires_grad_(), target


# What torch's own function has, what only the formula has, a function that has no derivative at
# NaN, and the gradient over the logits.
OPTIONS = [{}, {"z_loss": 0.1}, {"softcap": 3.0}, {"inplace_backward": True}]


# Each reduction makes another upstream of a row; of an ignored one it may be NaN.
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", LOSSES)
def test_an_ignored_row_has_no_gradient_whatever_it_is(backend, name, rows, options, reduction):
    if name == "linear_cross_entropy" and "inplace_backward" in options:
        options = {}
    logits, target = draw(rows)
    loss = loss_of(name, logits * 1, target, reduction=reduction, **options)
    upstream = torch.ones_like(loss)
    if reduction == "none":
        upstream[1::3] = torch.nan
    (grad,) = torch.autograd.grad(loss, logits, upstream)
    assert loss.isfinite().all()
    assert not grad[1::3].any()
    assert grad[target >= 0].isfinite().all()
    assert grad[target >= 0].any(1).all()


# A weight's gradient is a sum over rows, of which one is NaN times 0: with labels in tiles, with
# probabilities and a mask, and with logits of several dimensions, of which all are ignored.
@pytest.mark.parametrize("form", ["labels", "probabilities", "dimensions"])
@pytest.mark.parametrize("rows", ROWS)
def test_nor_does_it_reach_the_head(compiled_or_torch, rows, form):
    x, target = draw(rows)
    shape = (7, 2) if form == "dimensions" else (7,)
    weight, bias = (torch.ones(s, requires_grad=True) for s in ((*shape, VOCAB), shape))
    target, options = target.clamp(max=6), {"linear_bias": bias}
    if form == "probabilities":
        options["mask"] = target != -100
        target = torch.nn.functional.one_hot(target.clamp(min=0), 7).float()
    elif form == "dimensions":
        target = target[:, None].expand(rows, 2)
    loss = neglog.linear_cross_entropy(x, weight, target, **options)
    loss.backward()
    for part in (loss, weight.grad, bias.grad, x.grad):
        assert part.isfinite().all()


@pytest.mark.parametrize("rows", ROWS)
def test_statistics_of_an_ignored_row_of_hidden_states_are_0(compiled_or_torch, rows):
    """In logits of several dimensions too, where another of the row counts."""
    x, _ = draw(rows)
    weight = torch.ones(7, 2, VOCAB)
    target = torch.tensor([3, -100]).expand(rows, 2)
    stats = neglog.linear_cross_entropy(x, weight, target, return_stats=True)
    for part in stats[1:]:
        assert part.shape == (rows, 2)
        assert not part[:, 1].any()


# float16 ends at 65504, so the sum of 70,000 losses of 2 is out of its range, and of 3 is not.
@pytest.mark.parametrize("rows", [3, 70_000])
@pytest.mark.parametrize("name", LOSSES)
def test_a_mean_in_float16_does_not_overflow(backend, name, rows):
    logits = torch.zeros(rows, 2, dtype=torch.float16)
    logits[:, 1] = math.log(math.e**2 - 1)  # beside 0: a loss of 2
    logits.requires_grad_()
    target = torch.zeros(rows, dtype=torch.int64)
    loss = loss_of(name, logits, target)
    assert loss.dtype == torch.float16
    assert loss.item() == pytest.approx(2, rel=1e-3)
    # Each gradient is 0.86 / rows: of 70,000 rows too small for float16 to hold exactly.
    (grad,) = torch.autograd.grad(loss, logits, torch.tensor(1024.0, dtype=torch.float16))
    expected = torch.full((rows,), 1024 * (1 - math.exp(-2)) / rows)
    torch.testing.assert_close(-grad[:, 0].float(), expected, rtol=2e-3, atol=0)


# 131,072 logits are where the gradient stops to be formed in the forward.
@pytest.mark.parametrize("rows", [3, 4000])
@pytest.mark.parametrize("changed", ["logits", "target"])
def test_what_changes_before_the_backward_raises(rows, changed):
    source = torch.randn(rows, 40, requires_grad=True)
    logits, target = source * 1, torch.arange(rows) % 40
    loss = neglog.cross_entropy(logits, target)
    with torch.no_grad():
        {"logits": logits, "target": target}[changed].mul_(0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("rows", [3, 4000])
def test_no_gradient_is_formed_where_none_is_wanted(rows):
    logits = torch.randn(rows, 40, requires_grad=True)
    with torch.no_grad(), dispatch.record() as ran:
        loss = neglog.cross_entropy(logits, torch.arange(rows) % 40)
    assert not loss.requires_grad
    assert ran == [f"nll:{dispatch.best('cpu')}"]


# Checkpointing counts how often a saved tensor is asked for; both sides of 131,072 logits, and an
# upstream that the early gradient serves and one that it does not.
@pytest.mark.parametrize("upstream", [1.0, 0.5])
@pytest.mark.parametrize("rows", [3, 4000])
def test_under_activation_checkpointing(rows, upstream):
    source = torch.randn(rows, 40, requires_grad=True)
    target = torch.arange(rows) % 40

    def loss(x):
        return neglog.cross_entropy(x * 2, target)

    made = torch.utils.checkpoint.checkpoint(loss, source, use_reentrant=False)
    (found,) = torch.autograd.grad(made * upstream, source)
    (expected,) = torch.autograd.grad(loss(source) * upstream, source)
    assert torch.equal(found, expected)
