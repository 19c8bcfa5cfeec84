"""neglog.linear_cross_entropy against torch's, and against cross_entropy of logits in memory."""

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch.testing._internal.common_methods_invocations import op_db

import neglog
from neglog import dispatch
from neglog.tiles import gemm
from tests.support.backends import BEST, NUMBA
from tests.support.linear_cases import draw, gradients, in_memory

OPINFO = [op for op in op_db if op.name == "nn.functional.linear_cross_entropy"]


# torch's own samples: shapes, options and chunks of each kind, in the dtypes that torch tests.
@pytest.mark.parametrize("variant", OPINFO, ids=lambda op: op.variant_test_name or "plain")
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        *((BEST, dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16)),
        *((name, torch.float64) for name in NUMBA),
    ],
    ids=str,
)
def test_opinfo_samples(backend, variant, dtype):
    tolerance = {torch.bfloat16: {"rtol": 4e-2, "atol": 4e-2}}.get(dtype, {})
    count = 0
    for sample in variant.sample_inputs("cpu", dtype, requires_grad=True):
        weight, target = sample.args
        reference = {**sample.kwargs, "options": None}
        theirs = F.linear_cross_entropy(sample.input, weight, target, **reference)
        ours = neglog.linear_cross_entropy(
            sample.input, weight, target, backend=backend, **sample.kwargs
        )
        torch.testing.assert_close(ours, theirs, equal_nan=True, **tolerance)
        inputs = (sample.input, weight)
        expected, actual = gradients(theirs, inputs), gradients(ours, inputs)
        if not theirs.isnan().any():
            torch.testing.assert_close(actual, expected, equal_nan=True, **tolerance)
        count += 1
    assert count > 50


def test_opinfo_derivatives():
    """By each kernel they are in tests/ops/test_linear_nll.py."""
    for sample in list(OPINFO[0].sample_inputs("cpu", torch.float64, requires_grad=True))[::4]:
        weight, target = sample.args

        def function(x, w, target=target, options=sample.kwargs):
            return neglog.linear_cross_entropy(x, w, target, **options)

        inputs = (sample.input, weight)
        assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


OPTIONS = {
    "plain": {},
    "bias": {"bias": True},
    "smoothing, weight": {"label_smoothing": 0.1, "weight": True, "bias": True},
    "scale, cap, z": {"logit_scale": 0.7, "softcap": 5.0, "z_loss": 0.1},
    "num_items": {"num_items": 17},
}


# Each option with what it meets; each reduction has its own backward; many tiles, and one.
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("workspace", [0.1, 64])
def test_tiles_make_what_memory_makes(backend, options, reduction, workspace):
    if reduction == "none" and "num_items" in options:
        reduction = "mean"
    *head, target = draw()
    options = {**options, "reduction": reduction}
    if options.pop("bias", False):
        options["linear_bias"] = head[2]
    if options.pop("weight", False):
        options["weight"] = torch.linspace(0.5, 2, 1000, dtype=torch.float64)
    inputs = head if "linear_bias" in options else head[:2]
    with dispatch.record() as ran:
        ours = neglog.linear_cross_entropy(
            *head[:2], target, options={"workspace_mb": workspace}, **options
        )
    assert ran[0] == ("nll:torch" if backend == "torch" else f"linear_nll:{backend}")
    theirs = in_memory(*head[:2], target, **options)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradients(ours, inputs), gradients(theirs, inputs))


# Gradients formed in the backward, and in the forward. Which are wanted is asked above the kernels.
@pytest.mark.parametrize("frozen", [0, 1, 2])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_frozen_parts_have_no_gradient(frozen, reduction):
    *head, target = draw()
    head[frozen] = head[frozen].detach()
    inputs = [part for part in head if part.requires_grad]
    results = [
        gradients(f(*head[:2], target, linear_bias=head[2], reduction=reduction), inputs)
        for f in (neglog.linear_cross_entropy, in_memory)
    ]
    torch.testing.assert_close(*results)


# Tiles of each dtype by the best build; Numba's rows of 16 bits are in test_cross_entropy.py.
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        *((BEST, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)),
        *((name, torch.float32) for name in NUMBA),
    ],
    ids=str,
)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_error_is_within_torchs(backend, dtype, reduction):
    x, w, b, target = draw(dtype=dtype, rows=600)
    if dtype == torch.float16:
        reduction = "none" if reduction == "sum" else reduction

    def error(function, **options):
        loss = function(x, w, target, linear_bias=b, reduction=reduction, **options)
        upstream = torch.full_like(loss, 256.0 if dtype == torch.float16 else 1.0)
        found = torch.autograd.grad(loss, (x, w, b), upstream)
        exact = [part.detach().double().requires_grad_() for part in (x, w, b)]
        true_loss = in_memory(*exact[:2], target, linear_bias=exact[2], reduction=reduction)
        truth = torch.autograd.grad(true_loss, exact, upstream.double())
        return [(f.double() - t).norm() / t.norm() for f, t in zip(found, truth, strict=True)]

    ours = error(neglog.linear_cross_entropy, backend=backend)
    theirs = error(getattr(F, "linear_cross_entropy", in_memory))  # new in torch 2.13
    for mine, other in zip(ours, theirs, strict=True):
        assert mine <= 1.2 * other + 2e-7, (ours, theirs)


def test_statistics(backend):
    x, w, b, target = draw()
    stats = neglog.linear_cross_entropy(x, w, target, linear_bias=b, return_stats=True)
    expected = in_memory(x, w, target, linear_bias=b, return_stats=True)
    counted = target != -100
    torch.testing.assert_close(stats.loss, expected.loss)
    for ours, theirs in zip(stats[1:], expected[1:], strict=True):
        torch.testing.assert_close(ours[counted], theirs[counted])
        assert not ours[~counted].any()
    both = [
        gradients(s.loss + 0.1 * s.logsumexp[counted].square().sum(), (x, w, b))
        for s in (stats, expected)
    ]
    torch.testing.assert_close(*both)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_shift_and_mask(compiled_or_torch, reduction):
    x, w, b, target = draw()
    x, target = x.view(3, 4, 25, -1), target.view(3, 4, 25)
    mask = torch.rand(25, generator=torch.Generator().manual_seed(1)) < 0.5
    ours = neglog.linear_cross_entropy(
        x, w, target, linear_bias=b, shift=True, mask=mask, reduction=reduction
    )
    labels = torch.where(mask, target, -100)[..., 1:]
    logits = F.linear(x[..., :-1, :], w, b)
    theirs = F.cross_entropy(logits.flatten(0, 2), labels.flatten(), reduction=reduction)
    theirs = theirs.view(3, 4, 24) if reduction == "none" else theirs
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradients(ours, (x, w, b)), gradients(theirs, (x, w, b)))


def test_bytes_as_targets_and_a_mask_that_broadcasts(compiled_or_torch):
    x, w, b, _ = draw(vocab=200)
    x, target = x.view(12, 25, -1), torch.arange(300).remainder(200).view(12, 25)
    mask = (torch.arange(12) % 3 > 0)[:, None]
    ours, theirs = (
        neglog.linear_cross_entropy(x, w, t, linear_bias=b, shift=True, mask=m)
        for t, m in ((target.to(torch.uint8), mask), (target, mask.expand(12, 25)))
    )
    torch.testing.assert_close(ours, theirs)
    probabilities = F.one_hot(target, 200).to(x.dtype)
    same = neglog.linear_cross_entropy(x, w, probabilities, linear_bias=b, shift=True, mask=mask)
    torch.testing.assert_close(ours, same)


def test_shift_and_mask_of_probabilities(compiled_or_torch):
    x, w, _, _ = draw()
    x = x.view(12, 25, -1)
    target = torch.rand(12, 25, 1000, dtype=torch.float64)
    mask = torch.rand(12, 25) < 0.5
    ours = neglog.linear_cross_entropy(x, w, target, shift=True, mask=mask)
    kept = mask[:, 1:]
    logits = F.linear(x[:, :-1], w)[kept]
    torch.testing.assert_close(ours, F.cross_entropy(logits, target[:, 1:][kept]))


@pytest.mark.parametrize(("reduction", "value"), [("mean", torch.nan), ("sum", 0.0), ("none", 0.0)])
def test_all_ignored_rows_give_zero_gradients(compiled_or_torch, reduction, value):
    for dtype in (torch.float32, torch.float16):
        x, w, b, target = draw(dtype=dtype)
        target = torch.full_like(target, -100)
        loss = neglog.linear_cross_entropy(x, w, target, linear_bias=b, reduction=reduction)
        torch.testing.assert_close(loss, torch.full_like(loss, value), equal_nan=True)
        if compiled_or_torch != "torch":
            assert not any(g.any() for g in torch.autograd.grad(loss.sum(), (x, w, b)))


def test_ignored_rows_may_be_nan(backend):
    x, w, b, target = draw()
    with torch.no_grad():
        x[::3] = torch.nan
    loss = neglog.linear_cross_entropy(x, w, target, linear_bias=b)
    kept = target != -100
    expected = in_memory(x[kept], w, target[kept], linear_bias=b)
    torch.testing.assert_close(loss, expected)
    if backend != "torch":
        torch.testing.assert_close(gradients(loss, (x, w, b)), gradients(expected, (x, w, b)))


# Both dtypes that autocast knows.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(compiled_or_torch, dtype):
    x, w, b, target = draw(dtype=torch.float32)
    with torch.autocast("cpu", dtype):
        ours = neglog.linear_cross_entropy(x, w, target, linear_bias=b)
        theirs = F.cross_entropy(F.linear(x, w, b), target)
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)
    grads = gradients(ours, (x, w, b))
    assert all(g.dtype == torch.float32 for g in grads)
    for mine, other in zip(grads, gradients(theirs, (x, w, b)), strict=True):
        torch.testing.assert_close(mine, other, rtol=5e-2, atol=5e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_leaves_doubles_alone(compiled_or_torch, dtype):
    x, w, b, target = draw()
    with torch.autocast("cpu", dtype):
        ours = neglog.linear_cross_entropy(x, w, target, linear_bias=b)
        with pytest.raises(RuntimeError, match=r"linear_weight: expected dtype torch\.float64"):
            neglog.linear_cross_entropy(x, w.float(), target)
    torch.testing.assert_close(ours, in_memory(x, w, target, linear_bias=b))


# What is handed over as it was formed, and what is multiplied.
@pytest.mark.parametrize("upstream", [1.0, 1 / 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_error_under_autocast_is_within_torchs(dtype, upstream, monkeypatch):
    """What autocast rounds is float32, and so are its gradients, whatever multiplies them."""
    monkeypatch.setattr(gemm, "float32_is_faster", lambda dtype: False)
    x, w, b, target = draw(dtype=torch.float32, rows=600)
    exact = [part.detach().double().requires_grad_() for part in (x, w, b)]
    truth = torch.autograd.grad(
        upstream * in_memory(*exact[:2], target, linear_bias=exact[2]), exact
    )

    def error(function):
        with torch.autocast("cpu", dtype):
            loss = function(x, w, target, linear_bias=b)
        up = torch.tensor(upstream * (1024 if dtype == torch.float16 else 1))  # as a scaler has it
        found = torch.autograd.grad(loss, (x, w, b), up, retain_graph=True)
        again = torch.autograd.grad(loss, (x, w, b), up)
        assert all(torch.equal(*both) for both in zip(found, again, strict=True))
        found = [part.double() * upstream / up for part in found]
        return [(f - t).norm() / t.norm() for f, t in zip(found, truth, strict=True)]

    ours = error(neglog.linear_cross_entropy)
    theirs = error(lambda x, w, t, linear_bias: F.cross_entropy(F.linear(x, w, linear_bias), t))
    for mine, other in zip(ours, theirs, strict=True):
        assert mine <= 1.02 * other, (ours, theirs)


# A tile of the operands' dtype, and of float32.
@pytest.mark.parametrize("wide", [False, True])
def test_upstreams_are_not_rounded(monkeypatch, wide):
    """A third in bfloat16 is off by 0.2%, and so would be every gradient."""
    monkeypatch.setattr(gemm, "float32_is_faster", lambda dtype: wide)
    x, w, _, target = draw(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = neglog.linear_cross_entropy(x, w, target)
    whole, third = (
        torch.autograd.grad(loss, (x, w), torch.tensor(up), retain_graph=True) for up in (1, 1 / 3)
    )
    for one, other in zip(whole, third, strict=True):
        assert abs(float((one.double() * other).sum() / one.double().square().sum()) - 1 / 3) < 1e-4


# Both products that may be the faster; a bias of every other number, and of one number.
@pytest.mark.parametrize("library", ["blas", "onednn"])
@pytest.mark.parametrize(
    "bias", [torch.linspace(-3, 3, 2000)[::2], torch.tensor([2.0]).expand(1000)]
)
def test_a_bias_with_strides(monkeypatch, library, bias):
    chosen = getattr(gemm, f"linear_by_{library}")
    monkeypatch.setattr(gemm, "fastest_linear", lambda: chosen)
    x, w, _, target = draw(dtype=torch.float32)
    ours, theirs = (
        neglog.linear_cross_entropy(x, w, target, linear_bias=b) for b in (bias, bias.clone())
    )
    assert torch.equal(ours, theirs)


# A tile of the operands' dtype, and of float32.
@pytest.mark.parametrize("wide", [False, True])
def test_float16_sums_beyond_its_range(monkeypatch, wide):
    """A class that each of 512 rows has, at 200: 102400 before the mean divides it."""
    monkeypatch.setattr(gemm, "float32_is_faster", lambda dtype: wide)
    x, w = torch.full((512, 8), 200.0).half(), torch.zeros(100, 8).half().requires_grad_()
    target = torch.zeros(512, dtype=torch.int64)
    loss = neglog.linear_cross_entropy(x, w, target)
    (grad,) = torch.autograd.grad(loss, w)
    torch.testing.assert_close(grad[0], torch.full((8,), -198.0).half(), rtol=2e-3, atol=0)


def test_few_masked_rows_may_be_nan(backend):
    x, w, _, target = draw(40, 6, 50)
    with torch.no_grad():
        x[::3] = torch.nan
    loss = neglog.linear_cross_entropy(x, w, target, backend=backend)
    kept = target != -100
    expected = in_memory(x[kept], w, target[kept])
    torch.testing.assert_close(gradients(loss, (x, w)), gradients(expected, (x, w)))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_empty_dimensions(compiled_or_torch, reduction):
    options = {"reduction": reduction}
    target = torch.tensor([0, 2])
    ours = neglog.linear_cross_entropy(torch.zeros(2, 0), torch.zeros(7, 0), target, **options)
    torch.testing.assert_close(ours, F.cross_entropy(torch.zeros(2, 7), target, **options))
    x, target = torch.zeros(2, 0, 4), torch.zeros(2, 0, dtype=torch.int64)
    ours = neglog.linear_cross_entropy(x, torch.zeros(7, 4), target, shift=True, **options)
    expected = {"none": torch.zeros(2, 0), "mean": torch.tensor(torch.nan), "sum": torch.zeros(())}
    torch.testing.assert_close(ours, expected[reduction], equal_nan=True)


def test_the_kernels_take_every_size():
    x, w, _, target = draw(dtype=torch.float32)
    for rows in (1, 10, 1000):
        with dispatch.record() as ran:
            neglog.linear_cross_entropy(x[:1].expand(rows, -1), w, target[:1].expand(rows))
        assert ran == [f"linear_nll:{BEST}"]
