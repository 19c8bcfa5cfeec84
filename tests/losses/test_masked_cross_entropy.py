"""neglog.masked_cross_entropy against torch's loss of the counted rows alone, and the oracle."""

import pytest
import torch
import torch.nn.functional as F

import neglog
from neglog import dispatch
from tests.support.allocations import largest_allocation
from tests.support.backends import BACKENDS


def draw(*shape, dtype=torch.float64, probabilities=False, seed=0):
    """Logits (..., C), a target whose uncounted half is nonsense, and the mask."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    mask = torch.rand(shape[:-1], generator=generator) < 0.4
    if probabilities:
        target = torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype)
    else:
        target = torch.randint(shape[-1], shape[:-1], generator=generator)
        target = torch.where(mask, target, 10**9)
    return logits.requires_grad_(), target, mask


def gradient(loss, *inputs):
    upstream = torch.linspace(0.5, 2, loss.numel(), dtype=loss.dtype).view(loss.shape)
    return torch.autograd.grad(loss, inputs, upstream)


# One position to three axes of them; index targets are marked, distributions are selected.
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize("shape", [(7, 5), (3, 4, 31), (2, 3, 2, 257), (9,)], ids=str)
def test_against_torch_on_the_counted_rows(backend, shape, probabilities, reduction):
    logits, target, mask = draw(*shape, probabilities=probabilities)
    if len(shape) == 1:
        mask = torch.tensor(True)
        target = target if probabilities else torch.tensor(3)
    with dispatch.record() as ran:
        ours = neglog.masked_cross_entropy(
            logits, target, mask, reduction=reduction, label_smoothing=0.1
        )
    assert set(ran) == {f"nll:{backend}"}
    counted = F.cross_entropy(logits[mask], target[mask], reduction=reduction, label_smoothing=0.1)
    if reduction == "none":
        theirs = torch.zeros(mask.shape, dtype=torch.float64).masked_scatter(mask, counted)
    else:
        theirs = counted
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradient(ours, logits), gradient(theirs, logits))


# Those of training; float64 is above.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_large_batch_reads_counted_rows_only(compiled_or_torch, dtype):
    logits, target, mask = draw(40, 16, 1000, dtype=dtype)
    with torch.no_grad():
        logits[~mask] = torch.nan
    ours = neglog.masked_cross_entropy(logits, target, mask, z_loss=0.0, return_stats=True)
    kept = logits.detach().float()[mask].requires_grad_()
    theirs = F.cross_entropy(kept, target[mask])
    tolerance = {"rtol": 2e-2, "atol": 1e-5} if dtype != torch.float32 else {}
    torch.testing.assert_close(ours.loss.float(), theirs, **tolerance)
    (grad,) = torch.autograd.grad(ours.loss, logits)
    torch.testing.assert_close(
        grad[mask].float(), torch.autograd.grad(theirs, kept)[0], **tolerance
    )
    assert not grad[~mask].any()
    assert ours.entropy.shape == ours.correct.shape == mask.shape


# Each reduction of nothing is another number; indices are marked, distributions are selected.
@pytest.mark.parametrize(("reduction", "value"), [("mean", torch.nan), ("sum", 0.0), ("none", 0.0)])
@pytest.mark.parametrize("probabilities", [False, True])
def test_an_empty_mask(backend, reduction, value, probabilities):
    logits, target, mask = draw(3, 4, 31, probabilities=probabilities)
    loss = neglog.masked_cross_entropy(logits, target, torch.zeros_like(mask), reduction=reduction)
    torch.testing.assert_close(loss, torch.full_like(loss, value), equal_nan=True)


# What marks the positions that do not count is no target of one that does.
@pytest.mark.parametrize("marker", [-(2**63), -100])
def test_no_counted_target_is_ignored(backend, marker):
    target, mask = torch.tensor([1, marker, marker]), torch.tensor([True, True, False])
    with pytest.raises(IndexError, match=r"at row 1 is out of range: expected 0 <= target < 5"):
        neglog.masked_cross_entropy(torch.randn(3, 5), target, mask)
    assert neglog.masked_cross_entropy(torch.randn(3, 5), target, mask & (target == 1)) > 0


# Every shape that broadcasts to (3, 4).
@pytest.mark.parametrize("shape", [(), (1,), (4,), (3, 1), (1, 4)], ids=str)
def test_the_mask_broadcasts(shape):
    logits, target, _ = draw(3, 4, 31)
    target = target.clamp(max=30)
    mask = (torch.arange(torch.Size(shape).numel()) % 2 == 0).view(shape)
    ours = neglog.masked_cross_entropy(logits, target, mask, reduction="sum")
    theirs = neglog.masked_cross_entropy(logits, target, mask.expand(3, 4).clone(), reduction="sum")
    torch.testing.assert_close(ours, theirs)


def test_options_pass_through(backend):
    logits, target, mask = draw(3, 40, 31)
    weight = torch.rand(31, dtype=torch.float64)
    options = {"logit_scale": 0.7, "softcap": 5.0, "z_loss": 0.1, "num_items": 17}
    ours = neglog.masked_cross_entropy(logits, target, mask, weight, **options)
    theirs = neglog.cross_entropy(logits[mask], target[mask], weight, **options)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradient(ours, logits), gradient(theirs, logits))


@pytest.mark.parametrize("probabilities", [False, True])
def test_derivatives(backend, probabilities):
    logits, target, mask = draw(3, 4, 7, probabilities=probabilities)

    def function(x):
        return neglog.masked_cross_entropy(x, target, mask, label_smoothing=0.1)

    assert torch.autograd.gradcheck(function, logits)
    assert torch.autograd.gradgradcheck(function, logits)


def test_compiles_whole():
    logits, target, mask = draw(20, 16, 1000, dtype=torch.float32)
    torch.compiler.reset()
    compiled = torch.compile(neglog.masked_cross_entropy, fullgraph=True, backend="aot_eager")
    ours = compiled(logits, target, mask)
    theirs = neglog.masked_cross_entropy(logits, target, mask)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradient(ours, logits), gradient(theirs, logits))


def test_in_place(kernel_backend):
    logits, target, mask = draw(20, 16, 1000)
    copy = logits * 1
    loss = neglog.masked_cross_entropy(copy, target, mask, inplace_backward=True)
    expected = gradient(neglog.masked_cross_entropy(logits, target, mask), logits)
    torch.testing.assert_close(gradient(loss, logits), expected)


# What each formula would carry a NaN through.
@pytest.mark.parametrize("backend", [None, *BACKENDS])
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}, {"z_loss": 0.1}], ids=str)
def test_what_does_not_count_may_be_nan(backend, options):
    logits, target, mask = draw(8, 5)
    with torch.no_grad():
        logits[~mask] = torch.nan
    loss = neglog.masked_cross_entropy(logits, target, mask, backend=backend, **options)
    counted = neglog.cross_entropy(logits[mask], target[mask], **options)
    torch.testing.assert_close(loss, counted)
    torch.testing.assert_close(gradient(loss, logits), gradient(counted, logits))


@pytest.mark.parametrize("probabilities", [False, True])
def test_statistics_are_of_what_counts(backend, probabilities):
    logits, target, mask = draw(30, 9, probabilities=probabilities)
    stats = neglog.masked_cross_entropy(logits, target, mask, return_stats=True)
    expected = neglog.cross_entropy(logits[mask], target[mask], return_stats=True)
    torch.testing.assert_close(stats.loss, expected.loss)
    for ours, theirs in zip(stats[1:], expected[1:], strict=True):
        assert not ours[~mask].any()
        torch.testing.assert_close(ours[mask], theirs)


def loss_of_probabilities(reduction, stats=True):
    options = {"reduction": reduction, "return_stats": stats, "label_smoothing": 0.1}
    if reduction == "items":
        options |= {"reduction": "mean", "num_items": 7}
    return lambda x, t, m: neglog.masked_cross_entropy(x, t, m, **options)


# While torch traces no size may depend on data.
@pytest.mark.parametrize("reduction", ["none", "items"])
def test_probabilities_compile_whole(reduction):
    torch.compiler.reset()
    logits, target, mask = draw(8, 5, probabilities=True)
    loss = loss_of_probabilities(reduction)
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits, target, mask), loss(logits, target, mask))


# As above; statistics are stacked one by one.
@pytest.mark.parametrize("stats", [False, True])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum", "items"])
def test_probabilities_map(compiled_or_torch, reduction, stats):
    inputs = draw(3, 8, 5, probabilities=True)
    loss = loss_of_probabilities(reduction, stats)
    expected = [loss(*each) for each in zip(*inputs, strict=True)]
    mapped = torch.func.vmap(loss)(*inputs)
    if not stats:
        torch.testing.assert_close(mapped, torch.stack(expected))
        return
    for ours, theirs in zip(mapped, zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(ours, torch.stack(theirs))


def test_nothing_in_place_and_no_classes():
    x = torch.randn(3, 4, requires_grad=True) * 1
    none = torch.zeros(3, dtype=torch.bool)
    loss = neglog.masked_cross_entropy(
        x, torch.rand(3, 4), none, inplace_backward=True, reduction="sum"
    )
    assert loss.item() == 0.0
    target = torch.zeros(3, dtype=torch.int64)
    assert neglog.masked_cross_entropy(x[:, :0], target, none, reduction="sum").item() == 0.0


# The rows that count are marked. Probabilities of another dtype are selected, then converted to the
# wider one. `copies`: what one allocation may have of the logits.
@pytest.mark.parametrize(
    ("probabilities", "options", "every", "copies"),
    [
        (None, {"z_loss": 0.1}, 8, 0),
        (None, {"softcap": 3.0}, 1, 0),
        (torch.float32, {}, 1, 0),
        (torch.float32, {"z_loss": 0.1}, 8, 0),
        (torch.float64, {}, 8, 2 / 8),
    ],
    ids=str,
)
def test_no_copy_of_all_logits(kernel_backend, probabilities, options, every, copies):
    logits, mask = torch.randn(512, 1000, requires_grad=True), torch.arange(512) % every == 0
    target = torch.arange(512)
    if probabilities:
        target = F.one_hot(target, 1000).to(probabilities)

    def forward():
        neglog.masked_cross_entropy(logits, target, mask, reduction="none", **options)

    a_number_a_row = 8 * 512
    assert largest_allocation(forward) <= max(a_number_a_row, copies * logits.numel() * 4)


# The leaf is overwritten if all rows count, and copied from if not: it is refused in both cases.
@pytest.mark.parametrize("all_count", [True, False])
def test_in_place_over_a_leaf_is_refused_for_any_mask(all_count):
    logits, mask = torch.randn(4, 5, requires_grad=True), torch.ones(4) > 0
    mask[0] = all_count
    with pytest.raises(RuntimeError, match="inplace_backward: input is a leaf"):
        neglog.masked_cross_entropy(logits, torch.rand(4, 5), mask, inplace_backward=True)
