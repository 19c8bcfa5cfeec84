"""cross_entropy of few classes, and of (N, C, d1, ..., dK) where the classes are not last.

Such logits go to the ops as (N, C, P), and are read where they lie; the kernels' own arithmetic is
tested in tests/kernels/test_positions.py.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

import neglog
from neglog import dispatch, reference

SHAPES = [(200, 2), (70, 3), (40, 21), (33, 77), (2, 19, 9, 11), (2, 150, 40), (3, 4, 2, 3, 5)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def draw(shape, dtype=torch.float32, probabilities=False, last=False, seed=0):
    """Logits, classes last in memory or not, and a target with ignored positions."""
    generator = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(shape, generator=generator)).to(dtype)
    if last:
        logits = logits.movedim(1, -1).contiguous().movedim(-1, 1)
    if probabilities:
        return logits, torch.randn(shape, generator=generator).softmax(1).to(dtype)
    positions = (shape[0], *shape[2:])
    target = torch.randint(shape[1], positions, generator=generator)
    target[torch.rand(positions, generator=generator) < 0.2] = -100
    return logits, target


def loss_and_gradient(function, logits, *arguments, **options):
    leaf = logits.detach().requires_grad_()
    loss = function(leaf, *arguments, **options)
    upstream = torch.linspace(0.5, 1.5, loss.numel()).reshape(loss.shape).to(loss.dtype)
    loss.backward(upstream)
    return loss.detach(), leaf.grad


def rows_of(x):
    return x.movedim(1, -1).reshape(-1, x.shape[1])


# Few classes, one block of 128 and more; one to three axes of positions.
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_the_oracle(kernel_backend, shape, dtype):
    weight = (torch.rand(shape[1], generator=torch.Generator().manual_seed(1)) + 0.5).to(dtype)
    for last in (False, True):
        for probabilities in (False, True):
            logits, target = draw(shape, dtype, probabilities, last)
            given = {"label_smoothing": 0.1, "reduction": "none"}
            with dispatch.record() as ran:
                found = loss_and_gradient(neglog.cross_entropy, logits, target, weight, **given)
            assert ran == [f"nll:{kernel_backend}", f"nll_backward:{kernel_backend}"]
            wide = rows_of(target).double() if probabilities else target.flatten()
            upstream = torch.linspace(0.5, 1.5, found[0].numel()).to(dtype).double()
            truth = reference.nll(
                rows_of(logits).double().numpy(), wide.numpy(), weight=weight.double().numpy(),
                grad_loss=upstream.numpy(), **given,
            )  # fmt: skip
            errors = [_errors(found, truth)]
            errors.append(
                _errors(loss_and_gradient(F.cross_entropy, logits, target, weight, **given), truth)
            )
            for ours, theirs in zip(*errors, strict=True):
                # As in test_cross_entropy.py: the oracle rounds as float64 does.
                roundings = 16 if dtype == torch.float64 else 3
                assert ours <= theirs + roundings * torch.finfo(dtype).eps


def _errors(found, truth):
    """Of loss and gradient, relative to 1 + the truth."""
    loss, gradient = found
    pairs = ((loss.flatten(), truth.loss), (rows_of(gradient), truth.grad))
    return [
        float(((x.double() - torch.from_numpy(y)).abs() / (1 + torch.from_numpy(y).abs())).max())
        for x, y in pairs
    ]


# Memory formats, a slice of more classes, of more positions, each second position, and positions
# that share memory.
LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "other order": lambda x: x.permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3),
    "some classes": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "some columns": lambda x: torch.cat([x, x], 3)[..., : x.shape[3]],
    "each second": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "one for all": lambda x: x[:1].expand(x.shape),
    "one position for all": lambda x: x[:1, :, :1, :1].contiguous().expand(x.shape),
    "overlapping": lambda x: x.flatten().as_strided(x.shape, (60, 1, 7, 1)),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("classes", [5, 140])
def test_layouts(kernel_backend, classes, layout):
    logits, target = draw((3, classes, 6, 7))
    expected = loss_and_gradient(F.cross_entropy, logits, target)
    laid = layout(logits)
    found = loss_and_gradient(neglog.cross_entropy, laid, target)
    torch.testing.assert_close(found[0], F.cross_entropy(laid, target))
    expected = loss_and_gradient(F.cross_entropy, laid, target)
    torch.testing.assert_close(found[1], expected[1])
    assert found[1].stride() == expected[1].stride()


def test_the_scores_of_one_image_for_all_its_pixels():
    leaf = draw((1, 5))[0].requires_grad_()
    target = draw((1, 5, 4, 6))[1]
    found = [
        torch.autograd.grad(loss(leaf[:, :, None, None].expand(1, 5, 4, 6), target), leaf)[0]
        for loss in (neglog.cross_entropy, F.cross_entropy)
    ]
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("probabilities", [False, True], ids=["index", "probabilities"])
def test_many_classes_with_a_stride_keep_their_digits(kernel_backend, probabilities):
    """50,000 log-probabilities added one after the other were off by 79 roundings. The oracle's own
    float64 is not enough to see it."""
    shape = (2, 50000, 2)
    logits = 0.05 * draw(shape, torch.float64)[0] + 3
    target = draw(shape, torch.float64, True)[1] if probabilities else torch.zeros(2, 2).long()
    z = rows_of(logits).numpy().astype(np.longdouble)
    log_p = z - np.log(np.exp(z).sum(1, keepdims=True))
    truth = -(log_p * rows_of(target).numpy()).sum(1) if probabilities else -log_p.mean(1)
    found = neglog.cross_entropy(
        logits, target, label_smoothing=0.0 if probabilities else 1.0, reduction="none"
    )
    errors = np.abs(found.flatten().numpy() / truth - 1)
    assert errors.max() <= 8 * torch.finfo(torch.float64).eps


def test_the_gradient_is_as_contiguous_as_the_logits():
    """At 4 MB it lies in memory of our own."""
    for shape in ((2, 3, 4, 5), (2, 19, 200, 200)):
        logits, target = draw(shape)
        for form in (torch.contiguous_format, torch.channels_last):
            leaf = (logits * 1).contiguous(memory_format=form).requires_grad_()
            made = neglog.cross_entropy(leaf * 1, target)
            (gradient,) = torch.autograd.grad(made, leaf)
            assert gradient.is_contiguous(memory_format=form)


@pytest.mark.parametrize("shape", [(6, 3), (2, 3, 2, 4)], ids=str)
@pytest.mark.parametrize("probabilities", [False, True], ids=["index", "probabilities"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_derivatives(kernel_backend, shape, probabilities, reduction):
    logits, target = draw(shape, torch.float64, probabilities)
    inputs = (logits.requires_grad_(), target.requires_grad_(probabilities))

    def loss(x, t):
        return neglog.cross_entropy(
            x, t, label_smoothing=0.1, softcap=5.0, z_loss=0.01, reduction=reduction
        )

    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs)


@pytest.mark.parametrize("probabilities", [False, True], ids=["index", "probabilities"])
def test_extensions_are_those_of_rows(backend, probabilities):
    """A scale that learns, statistics, softcap, num_items, losses in another dtype."""
    logits, target = draw((2, 5, 3, 4), probabilities=probabilities)
    scale = torch.tensor(1.3, requires_grad=True)
    given = {"logit_scale": scale, "softcap": 4.0, "z_loss": 0.1, "num_items": 17}
    rows = rows_of(target) if probabilities else target.flatten()
    found = loss_and_gradient(neglog.cross_entropy, logits, target, **given)
    of_scale, scale.grad = scale.grad, None
    expected = loss_and_gradient(neglog.cross_entropy, rows_of(logits), rows, **given)
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(rows_of(found[1]), expected[1])
    torch.testing.assert_close(of_scale, scale.grad)
    stats = neglog.cross_entropy(logits, target, return_stats=True, reduction="none")
    of_rows = neglog.cross_entropy(rows_of(logits), rows, return_stats=True, reduction="none")
    for part, of_part in zip(stats, of_rows, strict=True):
        assert part.shape == (2, 3, 4)
        torch.testing.assert_close(part.flatten(), of_part)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("classes", [5, 140])
def test_in_place(kernel_backend, classes, reduction, last):
    logits, target = draw((2, classes, 3, 4), last=last)
    given = {"reduction": reduction, "label_smoothing": 0.1}
    expected = loss_and_gradient(neglog.cross_entropy, logits, target, **given)
    leaf = logits.clone().requires_grad_()
    activations = leaf * 1
    address = activations.data_ptr()
    activations.register_hook(lambda grad: addresses.append(grad.data_ptr()))
    addresses = []
    loss = neglog.cross_entropy(activations, target, inplace_backward=True, **given)
    upstream = torch.linspace(0.5, 1.5, loss.numel()).reshape(loss.shape)
    loss.backward(upstream)
    assert addresses == [address]
    torch.testing.assert_close(loss.detach(), expected[0])
    torch.testing.assert_close(leaf.grad, expected[1])


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("last", [False, True])
def test_compiles_whole(dynamic, last):
    torch.compiler.reset()

    def loss(x, t):
        return neglog.cross_entropy(x * 2, t, label_smoothing=0.1)

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic)
    for side in (6, 9):
        logits, target = draw((2, 5, side, 7), last=last)
        found = loss_and_gradient(compiled, logits, target)
        torch.testing.assert_close(found, loss_and_gradient(loss, logits, target))
        assert found[1].stride() == logits.stride()


def test_transforms():
    logits, target = draw((4, 5, 3, 2))

    def loss(x, t):
        return neglog.cross_entropy(x, t)

    gradient = torch.func.grad(loss)(logits, target)
    torch.testing.assert_close(gradient, torch.func.grad(F.cross_entropy)(logits, target))
    mapped = torch.vmap(torch.func.grad(loss))(logits[:, None], target[:, None])
    expected = torch.stack(
        [torch.func.grad(loss)(x[None], t[None]) for x, t in zip(logits, target, strict=True)]
    )
    torch.testing.assert_close(mapped, expected)


@pytest.mark.parametrize("reduction", [0, 1])
@pytest.mark.parametrize("probabilities", [False, True], ids=["index", "probabilities"])
@pytest.mark.parametrize("last", [False, True])
def test_opcheck(reduction, probabilities, last):
    logits, target = draw((2, 5, 7), probabilities=probabilities, last=last)
    target = target if probabilities else target.flatten()
    options = (reduction, -100, 0.1, 1.0, 0.0, 0.0)
    forward = (logits.requires_grad_(), target, None, None, None, *options, True, "")
    outcome = opcheck(torch.ops.neglog.nll.default, forward)
    assert set(outcome.values()) == {"SUCCESS"}
    _, lse, low, total, _, entropy, _ = torch.ops.neglog.nll.default(*forward)
    grad = torch.rand(() if reduction else (14,), requires_grad=True)
    upstream = (grad, torch.rand(14), torch.rand(14))
    kept = (logits, target, None, None, lse.detach(), low, entropy.detach(), total)
    outcome = opcheck(torch.ops.neglog.nll_backward.default, (*upstream, *kept, *options, ""))
    assert set(outcome.values()) == {"SUCCESS"}


def test_nothing(backend):
    for shape in ((0, 3, 2), (2, 3, 0), (2, 3, 0, 4)):
        logits, target = draw(shape)
        found = loss_and_gradient(neglog.cross_entropy, logits, target, reduction="sum")
        assert found[0] == 0
        assert found[1].shape == shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(kernel_backend, dtype):
    logits, target = draw((2, 5, 3, 4), dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = neglog.cross_entropy(logits, target)
        assert loss.dtype == F.cross_entropy(logits, target).dtype == torch.float32
