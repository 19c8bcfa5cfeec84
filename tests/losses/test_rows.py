"""What the losses over classes share below their checks: loss_dtype, and a logit_scale that learns.

By the best compiled build and by torch's formula: what is told apart lies above the kernels.
"""

import pytest
import torch
import torch.nn.functional as F

import neglog
from tests.support.nll_tensors import LOSSES, loss_of


def draw(rows=40, classes=11, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(rows, classes, generator=generator)).to(dtype)
    target = torch.arange(rows) % classes
    target[::4] = -100
    return logits.requires_grad_(), target


# loss_dtype


# With and without what torch has not: the torch backend takes two paths.
@pytest.mark.parametrize("options", [{}, {"z_loss": 0.1}], ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_float32_is_the_loss_before_it_is_rounded(
    compiled_or_torch, name, dtype, reduction, options
):
    """Within float32's error of float64, and rounded it is the loss that comes by default."""
    logits, target = draw(dtype=dtype)
    given = {"reduction": reduction, **options}
    wide = loss_of(name, logits, target, loss_dtype=torch.float32, **given)
    exact = loss_of(name, logits.double(), target, **given)
    assert wide.dtype == torch.float32
    torch.testing.assert_close(wide.double(), exact, rtol=1e-5, atol=1e-6)
    narrow = loss_of(name, logits, target, **given)
    assert narrow.dtype == dtype
    assert torch.equal(narrow, wide.to(dtype))
    assert not torch.equal(narrow.float(), wide)
    (grad,) = torch.autograd.grad(wide.sum(), logits)
    (expected,) = torch.autograd.grad(exact.sum(), logits)
    torch.testing.assert_close(grad, expected)


# A mask with probabilities selects rows, and under torch.compile zeroes them.
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_of_probabilities(compiled):
    logits, target = draw(dtype=torch.bfloat16)
    probabilities = F.one_hot(target.clamp(min=0), 11).bfloat16()

    def loss(function, **options):
        return function(logits, probabilities, **options)

    def masked(logits, target, **options):
        return neglog.masked_cross_entropy(logits, target, torch.arange(40) % 4 > 0, **options)

    for function in (neglog.cross_entropy, masked):
        run = torch.compile(loss, backend="aot_eager", fullgraph=True) if compiled else loss
        wide = run(function, loss_dtype=torch.float32)
        narrow = run(function)
        assert (wide.dtype, narrow.dtype) == (torch.float32, torch.bfloat16)
        assert torch.equal(narrow, wide.bfloat16())
        assert not torch.equal(narrow.float(), wide)


# Under autocast torch's loss is float32, and what is asked for comes before that.
@pytest.mark.parametrize("name", LOSSES)
def test_under_autocast(compiled_or_torch, name):
    logits, target = draw()
    with torch.autocast("cpu", torch.bfloat16):
        assert loss_of(name, logits, target).dtype == torch.float32
        assert loss_of(name, logits.bfloat16(), target).dtype == torch.float32
        asked = loss_of(name, logits.bfloat16(), target, loss_dtype=torch.bfloat16)
        assert asked.dtype == torch.bfloat16
        assert loss_of(name, logits, target, loss_dtype=torch.float64).dtype == torch.float64


@pytest.mark.parametrize(
    ("dtype", "error", "message"),
    [
        (torch.bfloat16, ValueError, "expected torch.float32, torch.float64 or the input's torch."),
        (torch.int64, ValueError, r"got torch.int64"),
        ("float32", TypeError, "loss_dtype: expected a torch.dtype, got str"),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", LOSSES)
def test_other_dtypes_are_refused(name, dtype, error, message):
    with pytest.raises(error, match=message):
        loss_of(name, *draw(), loss_dtype=dtype)


@pytest.mark.parametrize("name", ["CrossEntropyLoss", "MaskedCrossEntropyLoss"])
def test_a_module_takes_it(name):
    logits, target = draw(dtype=torch.bfloat16)
    mask = () if name == "CrossEntropyLoss" else (target >= 0,)
    module = getattr(neglog.nn, name)(loss_dtype=torch.float32)
    assert module(logits, target.clamp(min=0), *mask).dtype == torch.float32


# logit_scale with a gradient


def head(rows=12, bias=True):
    """input, linear_weight, linear_bias and scale, float64, all of which learn; labels."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((rows, 4), (5, 4), (5,))
    tensors = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    scale = torch.tensor(2.5, dtype=torch.float64)
    target = torch.arange(rows) % 5
    target[1::3] = -100
    return [x.requires_grad_() for x in (*tensors, scale)], target


def scaled_losses(target, options):
    """Each loss of a head as a function of (input, weight, bias, scale), and torch's formula."""

    def linear(x, w, b, s):
        return neglog.linear_cross_entropy(x, w, target, linear_bias=b, logit_scale=s, **options)

    def cross(x, w, b, s):
        return neglog.cross_entropy(F.linear(x, w, b), target, logit_scale=s, **options)

    def masked(x, w, b, s):
        return neglog.masked_cross_entropy(
            F.linear(x, w, b), target.clamp(min=0), target != -100, logit_scale=s, **options
        )

    return {"cross_entropy": cross, "masked_cross_entropy": masked, "linear_cross_entropy": linear}


def expected_of(tensors, target, reduction):
    x, w, b, s = tensors
    return F.cross_entropy(s * F.linear(x, w, b), target, reduction=reduction)


# A tensor that does not learn takes another path under torch.compile than without.
@pytest.mark.parametrize("learns", [True, False], ids=["learns", "does not"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_tensor_scales_the_logits_bias_and_all(
    compiled_or_torch, name, reduction, compiled, learns
):
    tensors, target = head()
    tensors[3].requires_grad_(learns)
    loss = scaled_losses(target, {"reduction": reduction})[name]
    if compiled:
        loss = torch.compile(loss, backend="aot_eager", fullgraph=True)
    found, expected = loss(*tensors), expected_of(tensors, target, reduction)
    torch.testing.assert_close(found, expected)
    learning = tensors if learns else tensors[:3]
    upstream = torch.linspace(1, 2, 12, dtype=torch.float64) if reduction == "none" else None
    torch.testing.assert_close(
        torch.autograd.grad(found, learning, upstream),
        torch.autograd.grad(expected, learning, upstream),
    )


@pytest.mark.parametrize("name", LOSSES)
def test_by_transforms(name):
    """torch.func.grad and jvp by the scale: read as a number, it would have no derivative."""
    tensors, target = head()
    *others, scale = (x.detach() for x in tensors)
    loss = scaled_losses(target, {})[name]

    def ours(s):
        return loss(*others, s)

    def theirs(s):
        return expected_of((*others, s), target, "mean")

    torch.testing.assert_close(torch.func.grad(ours)(scale), torch.func.grad(theirs)(scale))
    one = torch.ones_like(scale)
    torch.testing.assert_close(
        torch.func.jvp(ours, (scale,), (one,)), torch.func.jvp(theirs, (scale,), (one,))
    )


# With statistics the log-sum-exp of an ignored row may be used, and its gradient counts.
@pytest.mark.parametrize("stats", [False, True], ids=["loss", "stats"])
@pytest.mark.parametrize("name", LOSSES)
def test_ignored_rows_of_nan_do_not_reach_the_scale(compiled_or_torch, name, stats):
    logits, target = draw()
    expected_scale = torch.tensor(2.0, requires_grad=True)
    F.cross_entropy(logits * expected_scale, target).backward()
    with torch.no_grad():
        logits[target == -100] = torch.nan
    scale = torch.tensor(2.0, requires_grad=True)
    loss = loss_of(name, logits, target, logit_scale=scale, return_stats=stats)
    (loss.loss if stats else loss).backward()
    torch.testing.assert_close(scale.grad, expected_scale.grad)
    assert not logits.grad[target == -100].any()


def test_the_log_sum_exp_of_an_ignored_row_reaches_the_scale():
    logits, target = draw()
    scale = torch.tensor(2.0, requires_grad=True)
    stats = neglog.cross_entropy(logits, target, logit_scale=scale, return_stats=True)
    (found,) = torch.autograd.grad(stats.logsumexp.sum(), scale)
    (expected,) = torch.autograd.grad(torch.logsumexp(logits * scale, 1).sum(), scale)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_of_a_scale_of_float16_logits_does_not_overflow(
    compiled_or_torch, name, probabilities
):
    """16 of each of 5000 rows: 80,000, beyond float16."""
    logits = torch.zeros(5000, 2, dtype=torch.float16)
    logits[:, 0] = 16
    target = torch.ones(5000, dtype=torch.int64)
    if probabilities:
        target = F.one_hot(target, 2).half()
    scale = torch.tensor(1.0, requires_grad=True)
    options = {"logit_scale": scale, "reduction": "sum", "loss_dtype": torch.float32}
    if name == "masked_cross_entropy":
        mask = torch.ones(5000, dtype=torch.bool)
        loss = neglog.masked_cross_entropy(logits, target, mask, **options)
    elif name == "linear_cross_entropy":
        weight, bias = torch.eye(2).half(), torch.tensor([16.0, 0.0]).half()
        zeros = torch.zeros_like(logits)
        loss = neglog.linear_cross_entropy(zeros, weight, target, linear_bias=bias, **options)
    else:
        loss = neglog.cross_entropy(logits, target, **options)
    (grad,) = torch.autograd.grad(loss, scale)
    torch.testing.assert_close(grad, torch.tensor(80_000.0), rtol=1e-3, atol=0)


def test_in_place_the_scale_learns_too():
    logits, target = draw()
    scale = torch.tensor(2.0, requires_grad=True)
    made = [
        torch.autograd.grad(
            neglog.cross_entropy(logits * 1, target, logit_scale=scale, inplace_backward=in_place),
            (logits, scale),
        )
        for in_place in (True, False)
    ]
    torch.testing.assert_close(*made)


# Two dimensions, as a module's parameter may have; and an integer, which has no gradient.
@pytest.mark.parametrize("scale", [torch.tensor([[2.0]]), torch.tensor(2)], ids=["1 x 1", "int"])
def test_other_tensors_of_one_number(scale):
    logits, target = draw()
    found = neglog.cross_entropy(logits, target, logit_scale=scale)
    torch.testing.assert_close(found, F.cross_entropy(logits * 2, target))
    if scale.is_floating_point():
        found = neglog.cross_entropy(logits, target, logit_scale=scale.requires_grad_())
        torch.testing.assert_close(found, F.cross_entropy(logits * 2, target))


# A sum or a quotient beyond the range of the loss's dtype


@pytest.mark.parametrize("inplace_backward", [False, True])
@pytest.mark.parametrize(
    "options", [{"reduction": "sum"}, {"num_items": 1e-45}, {"num_items": torch.tensor(1e-40)}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_beyond_float32_is_inf(kernel_backend, name, options, inplace_backward):
    logits = torch.zeros(4, 3)
    logits[:, 0] = 2e38
    logits.requires_grad_()
    target = torch.ones(4, dtype=torch.int64)
    if name != "linear_cross_entropy":
        options = options | {"inplace_backward": inplace_backward}
    loss = loss_of(name, logits * 1, target, backend=kernel_backend, **options)
    assert loss.item() == torch.inf
    expected = F.cross_entropy(logits, target, reduction="sum")
    if "num_items" in options:
        expected = expected / options["num_items"]
    assert expected.item() == torch.inf
    if options.get("reduction") == "sum":
        made, exact = (torch.autograd.grad(x, logits)[0] for x in (loss, expected))
        assert torch.equal(made, exact)
