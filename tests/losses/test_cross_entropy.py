"""neglog.cross_entropy against torch's own: values, gradients, errors, on torch's own samples."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing._internal.common_methods_invocations import op_db

import neglog
from neglog import dispatch, reference
from tests.support.allocations import largest_allocation
from tests.support.backends import KERNELS
from tests.support.nll_cases import OPTIONS

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
OPINFO = next(op for op in op_db if op.name == "nn.functional.cross_entropy")


def draw(shape, dtype, probabilities=False, ignored=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(shape, generator=generator, dtype=torch.float64) * 3).to(dtype)
    if probabilities:
        target = torch.randn(shape, generator=generator).softmax(1).to(dtype)
        return logits.requires_grad_(), target
    rows = (shape[0], *shape[2:])
    target = torch.randint(0, shape[1], rows, generator=generator)
    if ignored and target.numel() > 1:
        target.view(-1)[target.numel() // 2] = -100
    return logits.requires_grad_(), target


def loss_and_gradient(function, logits, *arguments, **options):
    loss = function(logits, *arguments, **options)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    return loss.detach(), gradient


def truth(logits, target, **options):
    """The oracle's answer as torch tensors, for (N, C) logits."""
    options = {
        name: x.double().numpy() if isinstance(x, torch.Tensor) else x
        for name, x in options.items()
    }
    result = reference.nll(
        logits.detach().double().numpy(),
        target.double().numpy() if target.dim() == 2 else target.numpy(),
        **options,
    )
    return torch.from_numpy(result.loss), torch.from_numpy(result.grad)


def ours_is_no_worse(ours, theirs, expected, dtype):
    """Our largest error is within torch's, give or take three roundings of the largest number (an
    error of torch's below that is luck); sixteen in float64, where the oracle rounds as torch."""
    error, budget = ((x.double() - expected).abs().max() for x in (ours, theirs))
    roundings = 16 if dtype == torch.float64 else 3
    rounding = roundings * torch.finfo(dtype).eps * expected.abs().max()
    assert error <= budget + rounding, (float(error), float(budget), float(rounding))


# torch's own samples


def in_float64(value):
    floating = isinstance(value, torch.Tensor) and value.dtype.is_floating_point
    return value.detach().double() if floating else value


# The torch backend is torch's own function, and needs no comparison with it, here and below.
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_opinfo_samples(kernel_backend, dtype):
    count = 0
    for sample in OPINFO.sample_inputs("cpu", dtype, requires_grad=True):
        with dispatch.record() as ran:
            ours = neglog.cross_entropy(sample.input, *sample.args, **sample.kwargs)
        assert ran == [f"nll:{kernel_backend}"]
        theirs = F.cross_entropy(sample.input, *sample.args, **sample.kwargs)
        exact_input = in_float64(sample.input).requires_grad_()
        exact = F.cross_entropy(
            exact_input,
            *map(in_float64, sample.args),
            **{name: in_float64(value) for name, value in sample.kwargs.items()},
        )
        assert ours.shape == theirs.shape
        assert ours.dtype == theirs.dtype
        upstream = torch.randn_like(theirs)
        losses = (ours, theirs, exact)
        gradients = [
            torch.autograd.grad(loss, x, upstream.to(loss.dtype))[0]
            for loss, x in zip(losses, (sample.input, sample.input, exact_input), strict=True)
        ]
        for mine, its, right in (losses, gradients):
            torch.testing.assert_close(mine.isnan(), right.isnan())
            mine, its, right = (x.detach().nan_to_num(0) for x in (mine, its, right))
            if right.numel():
                ours_is_no_worse(mine, its, right, dtype)
        count += 1
    assert count > 20


def test_opinfo_derivatives(kernel_backend):
    count = 0
    for sample in OPINFO.sample_inputs("cpu", torch.float64, requires_grad=True):

        def function(x, sample=sample):
            return neglog.cross_entropy(x, *sample.args, **sample.kwargs)

        if not torch.isfinite(function(sample.input)).all():
            continue  # a mean over nothing: differences of NaN say nothing
        assert torch.autograd.gradcheck(function, sample.input)
        assert torch.autograd.gradgradcheck(function, sample.input)
        count += 1
    assert count > 20


# Precision


# Less than a vector, a rest after several, a block and many; each kind of target is other code.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [1, 2, 7, 31, 257, 50257])
@pytest.mark.parametrize("probabilities", [False, True], ids=["index", "probabilities"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_error_is_within_torchs(kernel_backend, dtype, vocab, probabilities, smoothing):
    logits, target = draw((13, vocab), dtype, probabilities)
    expected = truth(logits, target, label_smoothing=smoothing)
    with dispatch.record() as ran:
        ours = loss_and_gradient(neglog.cross_entropy, logits, target, label_smoothing=smoothing)
    assert ran[0] == f"nll:{kernel_backend}"
    theirs = loss_and_gradient(F.cross_entropy, logits, target, label_smoothing=smoothing)
    for mine, its, right in zip(ours, theirs, expected, strict=True):
        assert mine.dtype == its.dtype
        ours_is_no_worse(mine, its, right, dtype)


# Both signs, of what has 24 and 8 bits for 1e4.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shift", [-1e4, 1e4])
def test_large_logits_lose_no_more_than_torch(kernel_backend, dtype, shift):
    logits, target = draw((9, 3001), torch.float64)
    logits = (logits.detach() + shift).to(dtype).requires_grad_()
    expected = truth(logits, target)
    ours = loss_and_gradient(neglog.cross_entropy, logits, target)
    theirs = loss_and_gradient(F.cross_entropy, logits, target)
    for mine, its, right in zip(ours, theirs, expected, strict=True):
        ours_is_no_worse(mine, its, right, dtype)


def test_confident_bfloat16_gradient(kernel_backend):
    """At p = 0.999 a gradient formed as p - 1 in bfloat16 is wrong by up to all of it."""
    logits = torch.zeros(4, 1000, dtype=torch.bfloat16)
    logits[:, 5] = torch.tensor([10.0, 12.0, 13.0, 13.8125])
    logits.requires_grad_()
    target = torch.full((4,), 5)
    _, expected = truth(logits, target, reduction="sum")
    _, gradient = loss_and_gradient(neglog.cross_entropy, logits, target, reduction="sum")
    relative = (gradient.double() - expected).abs() / expected.abs()
    assert relative.max() < 2**-8


# Sums of one block, and of many.
@pytest.mark.parametrize("vocab", [50, 1000, 50257])
def test_sure_targets_keep_their_digits(kernel_backend, vocab):
    """Terms of e^-10 beside the maximum's 1: each rounds in the same direction, and so do sums."""
    logits = torch.zeros(6, vocab)
    logits[:, 3] = torch.tensor([5.0, 10.0, 12.0, 15.0, 17.0, 18.0])
    logits.requires_grad_()
    target = torch.full((6,), 3)
    _, expected = truth(logits, target, reduction="sum")

    def error(function):
        gradient = loss_and_gradient(function, logits, target, reduction="sum")[1]
        return (gradient[:, 3].double() - expected[:, 3]).abs().max()

    one_rounding = 1.2e-7
    assert error(neglog.cross_entropy) <= error(F.cross_entropy) + one_rounding


# No rows, no classes, neither; each reduction of nothing is another number.
@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (3, 0)], ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_empty_probabilities(kernel_backend, shape, reduction):
    logits, target = torch.zeros(shape, requires_grad=True), torch.zeros(shape)
    options = {"reduction": reduction, "label_smoothing": 0.1 if shape[1] else 0.0}
    ours = neglog.cross_entropy(logits, target, **options)
    theirs = F.cross_entropy(logits, target, **options)
    torch.testing.assert_close(ours, theirs, equal_nan=True)
    assert torch.autograd.grad(ours.sum(), logits)[0].shape == shape


@pytest.mark.parametrize("logit_scale", [1.0, 2.0])  # read where they lie, and through a buffer
def test_bfloat16_gradients_round_to_nearest_even(kernel_backend, logit_scale):
    """One class has p = 1, so the gradient is the upstream of logsumexp, whatever that is."""
    halfway = (torch.arange(0x80, 0x7F7F, 5, dtype=torch.int32) << 16) | 0x8000
    beside = torch.cat([halfway - 1, halfway, halfway + 1]).view(torch.float32)
    upstream = torch.cat([beside, -beside, torch.tensor([0.0, torch.inf, torch.nan])]) / logit_scale
    logits = torch.zeros(len(upstream), 1, dtype=torch.bfloat16, requires_grad=True)
    target = torch.zeros(len(upstream), dtype=torch.int64)
    stats = neglog.cross_entropy(logits, target, logit_scale=logit_scale, return_stats=True)
    stats.logsumexp.backward(upstream)
    expected = (upstream * logit_scale).bfloat16()
    torch.testing.assert_close(logits.grad[:, 0], expected, rtol=0, atol=0, equal_nan=True)


def with_weights(options, dtype=torch.float32):
    """The options with weights for 301 classes and 11 rows, one of them 0 and some below."""
    weights = {
        "weight": torch.linspace(0.1, 2, 301, dtype=dtype),
        "token_weight": torch.linspace(-0.5, 2, 11, dtype=dtype) * (torch.arange(11) != 5),
    }
    return {**options, **{name: x for name, x in weights.items() if options.get(name)}}


# How options reach kernel and formula, and what each reduction does to the upstream. In each dtype
# they are in tests/kernels.
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("probabilities", [False, True], ids=["index", "probabilities"])
def test_options_against_the_oracle(backend, options, reduction, probabilities):
    logits, target = draw((11, 301), torch.float64, probabilities)
    options = {**with_weights(options, torch.float64), "reduction": reduction}
    expected, slope = truth(logits, target, **options)
    with dispatch.record() as ran:
        loss, gradient = loss_and_gradient(neglog.cross_entropy, logits, target, **options)
    backward = [] if backend == "torch" else [f"nll_backward:{backend}"]
    assert ran == [f"nll:{backend}", *backward]
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(gradient, slope, rtol=1e-13, atol=1e-14)


# Rows of few classes are computed in groups, longer ones alone.
@pytest.mark.parametrize("vocab", [7, 129, 5003])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_in_any_batch(kernel_backend, vocab, dtype):
    logits, target = draw((150, vocab), dtype)
    options = {"reduction": "none", "loss_dtype": torch.float32, "backend": kernel_backend}
    loss = neglog.cross_entropy(logits, target, **options)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    for rows in (slice(0, 1), slice(3, 70), slice(149, 150), [88, 2, 31]):
        some = logits.detach()[rows].clone().requires_grad_()
        found = neglog.cross_entropy(some, target[rows], **options)
        assert torch.equal(found, loss[rows])
        assert torch.equal(torch.autograd.grad(found.sum(), some)[0], gradient[rows])


def test_a_softcap_beyond_float32_is_none(backend):
    """As inf it would make a NaN of inf * 0."""
    logits, target = draw((6, 40), torch.float32)
    torch.testing.assert_close(
        loss_and_gradient(neglog.cross_entropy, logits, target, softcap=1e300),
        loss_and_gradient(neglog.cross_entropy, logits, target),
    )


def test_composite_agrees_with_the_kernels():
    for options in OPTIONS.values():
        options = {**with_weights(options), "return_stats": True, "num_items": 5}
        logits, target = draw((11, 301), torch.float32)
        results = []
        for backend in ("torch", *KERNELS):
            stats = neglog.cross_entropy(logits, target, backend=backend, **options)
            (gradient,) = torch.autograd.grad(stats.loss + stats.logsumexp.sum(), logits)
            results.append((*stats, gradient))
        for other in results[1:]:
            torch.testing.assert_close(other, results[0], rtol=1e-5, atol=1e-6)


@given(
    rows=st.integers(1, 9),
    vocab=st.integers(1, 70),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    reduction=st.sampled_from(["none", "mean", "sum"]),
    smoothing=st.sampled_from([0.0, 0.25, 1.0]),
    weighted=st.booleans(),
    probabilities=st.booleans(),
    ignore_index=st.integers(-3, 2),
    strides=st.sampled_from(["contiguous", "transposed", "expanded", "every other"]),
    special=st.lists(st.sampled_from([0.0, 1e4, -1e4, float("-inf")]), max_size=4),
    backend=st.sampled_from(KERNELS),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=300, deadline=None)
def test_fuzz_against_torch(
    rows, vocab, dtype, reduction, smoothing, weighted, probabilities, ignore_index, strides,
    special, backend, seed,
):  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocab, generator=generator, dtype=dtype)
    for value in special:
        place = torch.randint(0, logits.numel(), (), generator=generator)
        logits.view(-1)[place] = value
    layout = {
        "contiguous": lambda x: x,
        "transposed": lambda x: x.t().contiguous().t(),
        "expanded": lambda x: x[:1].expand(rows, vocab),
        "every other": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    }
    logits = layout[strides](logits).requires_grad_()
    options = {"reduction": reduction, "label_smoothing": smoothing}
    if weighted:
        options["weight"] = torch.rand(vocab, generator=generator, dtype=dtype)
    if probabilities:
        target = torch.rand(rows, vocab, generator=generator, dtype=dtype)
    else:
        target = torch.randint(0, vocab, (rows,), generator=generator)
        options["ignore_index"] = ignore_index
    ours = loss_and_gradient(neglog.cross_entropy, logits, target, backend=backend, **options)
    theirs = loss_and_gradient(F.cross_entropy, logits, target, **options)
    tolerance = 1e-10 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(ours[0], theirs[0], rtol=tolerance, atol=tolerance, equal_nan=True)
    finite = torch.isfinite(theirs[1])
    torch.testing.assert_close(ours[1][finite], theirs[1][finite], rtol=tolerance, atol=tolerance)


# Shapes and memory


# Every number of axes that torch has, and no rows; the view of each as rows is made in Python.
@pytest.mark.parametrize("probabilities", [False, True], ids=["index", "probabilities"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("shape", [(5,), (4, 5), (4, 5, 3), (2, 5, 3, 4), (0, 5), (0, 5, 3)])
def test_shapes(compiled_or_torch, shape, probabilities, reduction):
    logits = torch.randn(shape, requires_grad=True)
    if probabilities:
        target = torch.rand(shape)
    else:
        target = torch.randint(0, 5, shape[:0] if len(shape) == 1 else (shape[0], *shape[2:]))
    ours = loss_and_gradient(neglog.cross_entropy, logits, target, reduction=reduction)
    theirs = loss_and_gradient(F.cross_entropy, logits, target, reduction=reduction)
    torch.testing.assert_close(ours, theirs, equal_nan=True)
    stats = neglog.cross_entropy(logits, target, reduction=reduction, return_stats=True)
    expected = F.cross_entropy(logits, target, reduction="none").shape
    assert stats.logsumexp.shape == stats.correct.shape == stats.entropy.shape == expected


# Index targets, and probabilities, which are transposed too. With reduction "none" no gradient is
# formed in the forward.
@pytest.mark.parametrize("probabilities", [False, True])
def test_a_transposed_class_axis_is_read_where_it_lies(probabilities):
    """(B, V, T) that is a transpose of (B, T, V), as language models pass it: it is not copied, and
    the gradient of what was transposed is contiguous, as the layer below takes it."""
    base = torch.randn(3, 500, 40, requires_grad=True)
    target = torch.randint(40, (3, 500))
    if probabilities:
        target = F.one_hot(target, 40).float().transpose(1, 2)
    made = []

    def forward():
        logits = base.transpose(1, 2)
        made.append(neglog.cross_entropy(logits, target, reduction="none"))

    assert largest_allocation(forward) <= 8 * 3 * 500  # a number a row
    (grad,) = torch.autograd.grad(made[0].sum(), base)
    assert grad.is_contiguous()
    expected = F.cross_entropy(base.transpose(1, 2), target, reduction="sum")
    torch.testing.assert_close(grad, torch.autograd.grad(expected, base)[0])


def test_row_stride(kernel_backend):
    wide = torch.randn(40, 700, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, 300, (40,))
    pair = [
        torch.autograd.grad(f(wide[:, 100:400], target), wide)[0]
        for f in (neglog.cross_entropy, F.cross_entropy)
    ]
    torch.testing.assert_close(*pair)


# 256 and 300 are 0 and 44 in 8 bits. torch has uint8 for rows alone, so it is given int64.
@pytest.mark.parametrize("weight", [False, True])
@pytest.mark.parametrize("shape", [(9, 100), (9, 256), (9, 300), (3, 256, 4), (3, 300, 4)], ids=str)
def test_uint8_targets(backend, shape, weight):
    classes = shape[1]
    logits = torch.randn(*shape, 2)[..., 0].requires_grad_()  # not contiguous
    target = torch.randint(min(classes, 256), (shape[0], *shape[2:]))
    options = {"weight": torch.rand(classes), "label_smoothing": 0.1} if weight else {}
    torch.testing.assert_close(
        loss_and_gradient(neglog.cross_entropy, logits, target.to(torch.uint8), **options),
        loss_and_gradient(F.cross_entropy, logits, target, **options),
    )


# torch's own message of a bad uint8 target is no UTF-8.
@pytest.mark.parametrize("shape", [(2, 100), (2, 100, 3)], ids=str)
def test_uint8_target_out_of_range(backend, shape):
    target = torch.full((shape[0], *shape[2:]), 156, dtype=torch.uint8)
    with pytest.raises(IndexError, match=r"target 156 at row 0 is out of range"):
        neglog.cross_entropy(torch.randn(shape), target)


def test_gradient_of_probability_targets():
    logits, target = draw((6, 40), torch.float64, probabilities=True)
    target.requires_grad_()
    pairs = [
        torch.autograd.grad(f(logits, target, label_smoothing=0.2), (logits, target))
        for f in (neglog.cross_entropy, F.cross_entropy)
    ]
    torch.testing.assert_close(*pairs)


# The target is the wider, the input is half as wide, the target is the narrower.
@pytest.mark.parametrize(
    ("input_dtype", "target_dtype"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float64), (torch.float32, torch.half)],
)
def test_probabilities_of_another_dtype_promote(input_dtype, target_dtype):
    logits = torch.randn(30, 500).to(input_dtype).requires_grad_()
    target = torch.rand(30, 500).to(target_dtype)
    ours = loss_and_gradient(neglog.cross_entropy, logits, target)
    theirs = loss_and_gradient(F.cross_entropy, logits, target)
    assert [x.dtype for x in ours] == [x.dtype for x in theirs]
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)


def test_probabilities_of_float32_are_smoothed_in_the_logits_float64(backend):
    logits, target = draw((6, 40), torch.float64, probabilities=True)
    narrow = target.float()
    ours = neglog.cross_entropy(logits, narrow, label_smoothing=0.1)
    theirs = F.cross_entropy(logits, narrow.double(), label_smoothing=0.1)
    torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=0)


def test_all_ignored(kernel_backend):
    logits = torch.randn(4, 9, requires_grad=True)
    target = torch.full((4,), -100)
    mean, gradient = loss_and_gradient(neglog.cross_entropy, logits, target)
    assert mean.isnan()
    assert (gradient == 0).all()
    for reduction in ("sum", "none"):
        loss, gradient = loss_and_gradient(
            neglog.cross_entropy, logits, target, reduction=reduction
        )
        assert (loss == 0).all()
        assert (gradient == 0).all()


def test_unequal_upstream_of_each_row(kernel_backend):
    logits, target = draw((40, 300), torch.float64)
    upstream = torch.randn(40, dtype=torch.float64)
    pair = [
        torch.autograd.grad(f(logits, target, reduction="none"), logits, upstream)[0]
        for f in (neglog.cross_entropy, F.cross_entropy)
    ]
    torch.testing.assert_close(*pair)


# All that may be a number; a mean and a sum are then the same.
@pytest.mark.parametrize("num_items", [7, torch.tensor(7), torch.tensor([7.0])])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_num_items(backend, num_items, reduction):
    logits, target = draw((40, 300), torch.float64)
    ours = loss_and_gradient(
        neglog.cross_entropy, logits, target, num_items=num_items, reduction=reduction
    )
    theirs = loss_and_gradient(
        lambda x, t: F.cross_entropy(x, t, reduction="sum") / 7, logits, target
    )
    torch.testing.assert_close(ours, theirs)


def test_stats(backend):
    logits, target = draw((40, 300), torch.float64)
    stats = neglog.cross_entropy(logits, target, return_stats=True)
    p = logits.detach().softmax(1)
    counted = target != -100
    torch.testing.assert_close(stats.loss, F.cross_entropy(logits, target))
    torch.testing.assert_close(stats.logsumexp, logits.logsumexp(1))
    torch.testing.assert_close(stats.entropy, -(p * p.log()).sum(1))
    assert torch.equal(stats.correct, counted & (logits.argmax(1) == target))
    assert stats.loss.requires_grad
    assert stats.logsumexp.requires_grad
    assert not stats.entropy.requires_grad
    pair = [
        torch.autograd.grad(x.square().sum(), logits, retain_graph=True)[0]
        for x in (stats.logsumexp, logits.logsumexp(1))
    ]
    torch.testing.assert_close(*pair)


# In torch's table of both names: a mean, a sum, and no reduction.
@pytest.mark.parametrize("deprecated", [{"size_average": True}, {"size_average": False},
                                        {"reduce": False}], ids=str)  # fmt: skip
def test_the_deprecated_arguments(deprecated):
    logits, target = draw((40, 30), torch.float32)
    with pytest.warns(UserWarning, match="args will be deprecated"):
        ours = neglog.cross_entropy(logits, target, **deprecated)
    with pytest.warns(UserWarning, match="args will be deprecated"):
        theirs = F.cross_entropy(logits, target, **deprecated)
    torch.testing.assert_close(ours, theirs)


def test_the_deprecated_name_of_mean():
    logits, target = draw((500, 400), torch.float32)
    with pytest.warns(UserWarning, match="'elementwise_mean' is deprecated"):
        ours = neglog.cross_entropy(logits, target, reduction="elementwise_mean")
    torch.testing.assert_close(ours, F.cross_entropy(logits, target))


# What torch promotes from below and from above.
@pytest.mark.parametrize("dtype", [torch.int64, torch.float64], ids=str)
def test_weights_of_another_dtype_with_probabilities(dtype):
    logits, target = draw((500, 400), torch.float32, True)
    weight = torch.arange(1, 401, dtype=dtype)
    ours, theirs = (f(logits, target, weight) for f in (neglog.cross_entropy, F.cross_entropy))
    torch.testing.assert_close(ours, theirs)
