"""token_weight and per_sequence: weights of positions and the means over them, of each loss."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

import neglog
from neglog import dispatch
from tests.support.backends import BEST, KERNELS

BATCH, TIME, VOCAB, WIDTH = 3, 5, 41, 8
LOSSES = ["cross_entropy", "masked_cross_entropy", "linear_cross_entropy"]
NAN = float("nan")


def case(dtype=torch.float64, probabilities=False, seed=0):
    """Hidden states (B, T, D), a head (V, D), targets, weights of positions, of which some are 0
    and below 0, and of classes."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    hidden, head = normal(BATCH, TIME, WIDTH), normal(VOCAB, WIDTH)
    target = torch.randint(VOCAB, (BATCH, TIME), generator=generator)
    target[0, 1] = -100
    if probabilities:
        target = normal(BATCH, TIME, VOCAB).softmax(-1)
    weight = normal(BATCH, TIME)
    weight[1, 2] = weight[2, 4] = 0
    return hidden.requires_grad_(), head.requires_grad_(), target, weight, normal(VOCAB).abs()


def ours(name, hidden, head, target, **options):
    if name == "linear_cross_entropy":
        return neglog.linear_cross_entropy(hidden, head, target, **options)
    logits = F.linear(hidden, head)
    if name == "masked_cross_entropy":
        mask = torch.ones(BATCH, TIME, dtype=torch.bool)
        if target.dim() == 2:
            mask, target = target != -100, target.clamp(min=0)
        return neglog.masked_cross_entropy(logits, target, mask, **options)
    moved = target.movedim(-1, 1) if target.dim() == 3 else target
    return neglog.cross_entropy(logits.movedim(-1, 1), moved, **options)


def expected(hidden, head, target, token_weight, reduction, weight=None, num_items=None):
    """By torch's loss of each position."""
    logits, rows = F.linear(hidden, head).flatten(0, 1), token_weight.flatten()
    flat = target.flatten(0, 1)
    loss = F.cross_entropy(logits, flat, weight, reduction="none") * rows
    if reduction == "none":
        return loss.view(BATCH, TIME)
    if reduction == "sum" or num_items is not None:
        return loss.sum() / (1 if num_items is None else num_items)
    share = rows if target.dim() == 3 else rows * (flat != -100)
    if weight is not None and target.dim() == 2:
        share = share * weight[flat.clamp(min=0)]
    return loss.sum() / share.sum()


def gradients(loss, inputs):
    upstream = torch.linspace(0.5, 2, loss.numel(), dtype=loss.dtype).view(loss.shape)
    return torch.autograd.grad(loss, inputs, upstream)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("probabilities", [False, True], ids=["index", "probabilities"])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "num_items"])
@pytest.mark.parametrize("with_classes", [False, True])
def test_against_torch(backend, name, probabilities, reduction, with_classes):
    hidden, head, target, token_weight, weight = case(probabilities=probabilities)
    options = {"reduction": reduction}
    if reduction == "num_items":
        options = {"reduction": "mean", "num_items": 7}
    if with_classes:
        options["weight"] = weight
    truth = expected(hidden, head, target, token_weight, **options)
    with dispatch.record() as ran:
        loss = ours(name, hidden, head, target, token_weight=token_weight, **options)
        found = gradients(loss, (hidden, head))
    forward = ran[0].split(":")
    assert forward[0] in ("nll", "linear_nll")
    assert forward[1] == backend
    torch.testing.assert_close(loss, truth, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found, gradients(truth, (hidden, head)), rtol=1e-11, atol=1e-12)


# Each kernel reads the weight in its own dtype; rows of few classes, and long rows.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("vocab", [1, 7, 257, 5003])
def test_error_is_no_larger_than_torchs(kernel, dtype, vocab):
    generator = torch.Generator().manual_seed(vocab)
    logits = (torch.randn(9, vocab, generator=generator) * 4).to(dtype).requires_grad_()
    target = torch.randint(vocab, (9,), generator=generator)
    token_weight = torch.linspace(-0.5, 2, 9)

    def plain(x):
        return (F.cross_entropy(x, target, reduction="none") * token_weight).sum() / 2.5

    truth = torch.autograd.grad(plain(logits.double()), logits)[0]
    exact = logits.detach().double().requires_grad_()
    truth = torch.autograd.grad(plain(exact), exact)[0]
    theirs = torch.autograd.grad(plain(logits), logits)[0]
    loss = neglog.cross_entropy(
        logits, target, token_weight=token_weight, num_items=2.5, backend=kernel
    )
    made = torch.autograd.grad(loss, logits)[0]
    error, allowed = ((x.double() - truth).abs().max() for x in (made, theirs))
    assert error <= allowed + 3 * torch.finfo(dtype).eps * truth.abs().max()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("probabilities", [False, True], ids=["index", "probabilities"])
def test_a_weight_of_zero_leaves_the_position_out(backend, name, probabilities):
    hidden, head, target, token_weight, _ = case(probabilities=probabilities)
    truth = expected(hidden, head, target, token_weight, "mean")
    slopes = gradients(truth, (hidden, head))
    with torch.no_grad():
        hidden[1, 2] = NAN
        target[2, 4] = NAN if probabilities else VOCAB + 7  # out of range
    stats = ours(
        name, hidden, head, target, token_weight=token_weight, backend=backend, return_stats=True
    )
    found = gradients(stats.loss, (hidden, head))
    torch.testing.assert_close(stats.loss, truth, rtol=1e-12, atol=1e-12)
    if name == "linear_cross_entropy":
        torch.testing.assert_close(found, slopes, rtol=1e-11, atol=1e-12)
        assert stats.logsumexp[1, 2] == 0
    else:  # torch's own matmul has 0 * NaN in the gradient of the head
        torch.testing.assert_close(found[0], slopes[0], rtol=1e-11, atol=1e-12)
    assert not stats.correct[1, 2]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("probabilities", [False, True], ids=["index", "probabilities"])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "num_items"])
def test_a_weight_that_learns(name, probabilities, reduction):
    hidden, head, target, token_weight, _ = case(probabilities=probabilities)
    token_weight.requires_grad_()
    options = {"reduction": reduction}
    if reduction == "num_items":
        options = {"reduction": "mean", "num_items": 7}
    inputs = (hidden, head, token_weight)
    truth = expected(hidden, head, target, token_weight, **options)
    loss = ours(name, hidden, head, target, token_weight=token_weight, **options)
    torch.testing.assert_close(loss, truth, rtol=1e-12, atol=1e-12)
    found = gradients(loss, inputs)
    torch.testing.assert_close(found, gradients(truth, inputs), rtol=1e-11, atol=1e-12)


def of_sequences(loss, token_weight, sequences, num_items=None):
    """The mean of each sequence's own mean, of losses and weights of positions."""
    means = [
        (loss[s] * token_weight[s]).sum() / token_weight[s].sum()
        for s in sequences
        if token_weight[s].sum() != 0
    ]
    return torch.stack(means).sum() / (len(means) if num_items is None else num_items)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("num_items", [None, 11])
@pytest.mark.parametrize("learns", [False, True])
def test_mean_over_sequences(name, packed, weighted, num_items, learns):
    hidden, head, target, token_weight, _ = case()
    target[1] = -100  # a sequence in which nothing counts
    boundaries = [0, 4, 4, 11, 15] if packed else [0, 5, 10, 15]
    rows = token_weight.abs() + 0.1 if weighted else torch.ones(BATCH, TIME, dtype=torch.float64)
    if learns:
        rows.requires_grad_()
    losses = F.cross_entropy(
        F.linear(hidden, head).flatten(0, 1), target.flatten(), reduction="none"
    )
    counted = rows.flatten() * (target.flatten() != -100)
    spans = [slice(a, b) for a, b in pairwise(boundaries)]
    truth = of_sequences(losses, counted, spans, num_items)
    loss = ours(
        name, hidden, head, target, token_weight=rows if weighted or learns else None,
        per_sequence=torch.tensor(boundaries, dtype=torch.int32) if packed else True,
        num_items=num_items,
    )  # fmt: skip
    torch.testing.assert_close(loss, truth, rtol=1e-12, atol=1e-12)
    inputs = (hidden, head, rows) if learns else (hidden, head)
    found = torch.autograd.grad(loss, inputs)
    torch.testing.assert_close(found, torch.autograd.grad(truth, inputs), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_class_weights_count_in_the_mean_of_a_sequence(name):
    hidden, head, target, token_weight, weight = case()
    token_weight = token_weight.abs()
    flat, rows = target.flatten(), token_weight.flatten()
    losses = F.cross_entropy(F.linear(hidden, head).flatten(0, 1), flat, weight, reduction="none")
    share = (rows * weight[flat.clamp(min=0)] * (flat != -100)).view(BATCH, TIME)
    truth = ((losses * rows).view(BATCH, TIME).sum(1) / share.sum(1)).mean()
    options = {"token_weight": token_weight, "per_sequence": True, "weight": weight}
    loss = ours(name, hidden, head, target, **options)
    torch.testing.assert_close(loss, truth, rtol=1e-12, atol=1e-12)


# Weights and boundaries are those of the targets before they are shifted.
@pytest.mark.parametrize("probabilities", [False, True], ids=["index", "probabilities"])
@pytest.mark.parametrize("per_sequence", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_shift(probabilities, per_sequence, masked):
    hidden, head, target, token_weight, _ = case(probabilities=probabilities)
    token_weight = token_weight.abs()
    mask = torch.rand(BATCH, TIME) > 0.3 if masked else None
    options = {"token_weight": token_weight, "per_sequence": per_sequence}
    shifted = neglog.linear_cross_entropy(hidden, head, target, shift=True, mask=mask, **options)
    options["token_weight"] = token_weight[:, 1:]
    mask = None if mask is None else mask[:, 1:]
    cut = neglog.linear_cross_entropy(hidden[:, :-1], head, target[:, 1:], mask=mask, **options)
    torch.testing.assert_close(shifted, cut, rtol=1e-12, atol=1e-12)
    found = torch.autograd.grad(shifted, (hidden, head))
    torch.testing.assert_close(found, torch.autograd.grad(cut, (hidden, head)))


@pytest.mark.parametrize("name", LOSSES)
def test_a_weight_broadcasts_and_may_have_any_real_dtype(name):
    hidden, head, target, _, _ = case()
    whole = torch.tensor([1, 0, 2, 1, 1]).expand(BATCH, TIME)
    truth = ours(name, hidden, head, target, token_weight=whole.double())
    for given in (whole, whole[:1], whole[0], whole.bfloat16(), whole.t().contiguous().t()):
        loss = ours(name, hidden, head, target, token_weight=given)
        torch.testing.assert_close(loss, truth, rtol=0, atol=0)
    flags = ours(name, hidden, head, target, token_weight=whole > 0)
    torch.testing.assert_close(
        flags, ours(name, hidden, head, target, token_weight=(whole > 0).double())
    )


@pytest.mark.parametrize("name", LOSSES)
def test_nothing_counts(name):
    hidden, head, target, _, _ = case()
    zeros = torch.zeros(BATCH, TIME)
    for per_sequence in (False, True):
        loss = ours(name, hidden, head, target, token_weight=zeros, per_sequence=per_sequence)
        assert loss.isnan()
        assert not torch.autograd.grad(loss, hidden)[0].nan_to_num(0).any()
    assert ours(name, hidden, head, target, token_weight=zeros, reduction="sum") == 0


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("probabilities", [False, True], ids=["index", "probabilities"])
def test_derivatives(name, probabilities):
    hidden, head, target, token_weight, weight = case(probabilities=probabilities)
    target = target[..., :6] if probabilities else target % 6
    given = {"token_weight": token_weight, "weight": weight[:6], "z_loss": 0.01}
    small = [x.detach()[..., :3].clone().requires_grad_() for x in (hidden, head[:6])]

    def loss(hidden, head):
        return ours(name, hidden, head, target, label_smoothing=0.1, **given)

    assert torch.autograd.gradcheck(loss, small)
    assert torch.autograd.gradgradcheck(loss, small)


@pytest.mark.parametrize("name", LOSSES)
def test_compiles_whole(name):
    torch.compiler.reset()
    hidden, head, target, token_weight, _ = case(torch.float32)

    def loss(hidden, head, target, token_weight):
        given = {"token_weight": token_weight, "per_sequence": True}
        return ours(name, hidden, head, target, **given)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found, truth = (f(hidden, head, target, token_weight) for f in (compiled, loss))
    torch.testing.assert_close(found, truth)
    inputs = (hidden, head)
    torch.testing.assert_close(
        torch.autograd.grad(found, inputs), torch.autograd.grad(truth, inputs)
    )


@pytest.mark.parametrize("name", LOSSES)
def test_functional_gradient_and_vmap(name):
    hidden, head, target, token_weight, _ = case()

    def loss(hidden, token_weight):
        return ours(name, hidden, head, target, token_weight=token_weight)

    found = torch.func.grad(loss)(hidden, token_weight)
    torch.testing.assert_close(found, torch.autograd.grad(loss(hidden, token_weight), hidden)[0])
    weights = torch.stack([token_weight, token_weight.abs(), token_weight * 2])
    by_vmap = torch.func.vmap(loss, (None, 0))(hidden, weights)
    torch.testing.assert_close(by_vmap, torch.stack([loss(hidden, w) for w in weights]))


def test_in_place_has_the_gradient_of_its_own_memory():
    hidden, head, target, token_weight, _ = case(torch.float32)
    for reduction in ("mean", "none"):
        given = {"token_weight": token_weight.flatten(), "reduction": reduction}
        leaf = F.linear(hidden, head).flatten(0, 1).detach().requires_grad_()
        found = []
        for inplace in (True, False):
            options = {**given, "inplace_backward": inplace, "backend": BEST}
            loss = neglog.cross_entropy(leaf * 1, target.flatten(), **options)
            found.append(torch.autograd.grad(loss.sum(), leaf)[0])
        torch.testing.assert_close(*found)


def test_modules_take_them_in_the_call():
    hidden, head, target, token_weight, _ = case(torch.float32)
    logits = F.linear(hidden, head)
    given = {"token_weight": token_weight, "per_sequence": True}
    mask = target != -100
    made = neglog.nn.CrossEntropyLoss()(logits.movedim(-1, 1), target, **given)
    assert made == ours("cross_entropy", hidden, head, target, **given)
    made = neglog.nn.MaskedCrossEntropyLoss()(logits, target.clamp(min=0), mask, **given)
    assert made == ours("masked_cross_entropy", hidden, head, target, **given)
    module = neglog.nn.LinearCrossEntropyLoss(WIDTH, VOCAB)
    made = module(hidden, target, **given)
    assert made == ours("linear_cross_entropy", hidden, module.linear.weight, target, **given)


WRONG = {
    "a number": ({"token_weight": 2.0}, TypeError, "token_weight: expected a Tensor or None"),
    "its shape": (
        {"token_weight": torch.ones(4, 5)}, RuntimeError,
        r"token_weight: expected shape \[3, 5\] or one that broadcasts to it, got \[4, 5\]",
    ),
    "complex": (
        {"token_weight": torch.ones(3, 5) * 1j}, RuntimeError, "token_weight: expected a real dtype"
    ),
    "its device": (
        {"token_weight": torch.ones(3, 5, device="meta")}, RuntimeError,
        "token_weight: expected device cpu, got meta",
    ),
    "no bool": ({"per_sequence": 3}, TypeError, "per_sequence: expected a bool or a Tensor"),
    "a sum": (
        {"per_sequence": True, "reduction": "sum"}, ValueError,
        "per_sequence: expected reduction 'mean', got 'sum'",
    ),
    "floats": (
        {"per_sequence": torch.tensor([0.0, 15.0])}, RuntimeError,
        "per_sequence: expected dtype torch.int32 or torch.int64, got torch.float32",
    ),
    "a matrix": (
        {"per_sequence": torch.tensor([[0, 15]])}, RuntimeError,
        r"per_sequence: expected shape \[S \+ 1\] for S sequences, got \[1, 2\]",
    ),
    "too short": (
        {"per_sequence": torch.tensor([0, 14])}, ValueError,
        r"per_sequence: expected boundaries that rise from 0 to the 15 positions, got \[0, 14\]",
    ),
    "falling": ({"per_sequence": torch.tensor([0, 9, 4, 15])}, ValueError, "per_sequence"),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_errors(name, wrong):
    options, error, message = wrong
    hidden, head, target, _, _ = case()
    with pytest.raises(error, match=message):
        ours(name, hidden, head, target, **options)
