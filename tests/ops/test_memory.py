"""Memory of the ops: gradients that can be resized, and tensors that begin within a number."""

import pytest
import torch
from torch.nn import Parameter

import neglog
from neglog import kernels
from neglog.kernels.memory import LARGE
from neglog.losses.cross_entropy import cross_entropy
from neglog.ops.nll import cpu as nll_cpu
from neglog.ops.nll import remembered
from neglog.ops.pairs import autograd as pairs
from neglog.ops.pairs import cpu as pairs_cpu

ROWS = 1100  # times 1000 floats: more than 4 MB


def leaves_of(name):
    """A loss, and parameters whose gradients are large."""
    table = Parameter(torch.randn(ROWS, 1000))
    target = torch.arange(ROWS) % 1000
    if name == "logits":
        return cross_entropy(table, target), [table]
    if name == "linear":
        bias, x = Parameter(torch.zeros(ROWS)), Parameter(torch.randn(8, 1000))
        loss = neglog.linear_cross_entropy(x, table, torch.arange(8), linear_bias=bias)
        return loss, [table, bias, x]
    other = Parameter(torch.randn(ROWS, 1000))
    scale = [10.0] if name == "clip_loss" else [10.0, -10.0]
    return getattr(neglog, name)(table, other, *scale), [table, other]


# FSDP frees the gradients of parameters by resizing their storages to nothing.
@pytest.mark.parametrize("name", ["logits", "linear", "clip_loss", "siglip_loss"])
def test_storages_of_parameters_gradients_can_be_resized(name):
    loss, parameters = leaves_of(name)
    loss.backward()
    assert any(p.grad.nbytes >= LARGE for p in parameters)
    for parameter in parameters:
        parameter.grad.untyped_storage().resize_(0)
        assert parameter.grad.untyped_storage().nbytes() == 0


def shifted(tensor):
    """The same numbers, one byte past where they should begin."""
    memory = bytearray(tensor.nbytes + 1)
    made = torch.frombuffer(memory, dtype=tensor.dtype, offset=1).view(tensor.shape)
    made.copy_(tensor)
    assert made.data_ptr() % made.itemsize
    return made


class Aligned:
    """Kernels that refuse an address at which no float or int64 can begin."""

    def __init__(self, kernels):
        self._kernels = kernels

    def __getattr__(self, name):
        function = getattr(self._kernels, name)

        def checked(*arguments):
            for x in torch.utils._pytree.tree_leaves(arguments):
                if isinstance(x, int) and x > 2**32:  # the heap's addresses
                    assert x % 2 == 0
            return function(*arguments)

        return checked


@pytest.fixture
def aligned_kernels(monkeypatch):
    load = kernels.load
    monkeypatch.setattr(kernels, "load", lambda *given: Aligned(load(*given)))
    assert nll_cpu.kernels is pairs_cpu.kernels is kernels


@pytest.mark.parametrize("place", ["few", "many", "in place"])
@pytest.mark.parametrize("probabilities", [False, True])
def test_misaligned_rows(aligned_kernels, probabilities, place):
    rows = 4000 if place == "many" else 6
    logits, weight = torch.randn(rows, 40), torch.rand(40)
    target = torch.rand(rows, 40) if probabilities else torch.arange(rows) % 40
    grad = torch.rand(rows)

    def run(*tensors):
        x, t, w, g = tensors
        x.requires_grad_()
        given = x * 1 if place == "in place" else x
        loss = cross_entropy(
            given, t, w, reduction="none", label_smoothing=0.1,
            inplace_backward=place == "in place",
        )  # fmt: skip
        return loss.detach(), *torch.autograd.grad(loss, x, g)

    made = run(*map(shifted, (logits, target, weight, grad)))
    torch.testing.assert_close(made, run(logits, target, weight, grad), rtol=0, atol=0)


def test_misaligned_logits_in_place(aligned_kernels):
    logits, target = torch.randn(6, 40), torch.arange(6)
    expected = logits.clone()
    rest = (target, None, None, None, 1, -100, 0.0, 1.0, 0.0, 0.0, False, "")
    torch.ops.neglog.nll_(expected, *rest)
    made = shifted(logits)
    torch.ops.neglog.nll_(made, *rest)
    torch.testing.assert_close(made, expected, rtol=0, atol=0)


def test_misaligned_heads_and_embeddings(aligned_kernels):
    x, table = torch.randn(6, 16), torch.randn(40, 16)
    target, weight, grad = torch.arange(6), torch.rand(40), torch.rand(6)

    def run(x, table, target, weight, grad):
        loss = neglog.linear_cross_entropy(x, table, target, weight=weight, reduction="none")
        rows = neglog.info_nce(x, table[:6], reduction="none")
        x.requires_grad_()
        of_linear = neglog.linear_cross_entropy(x, table, target, weight=weight, reduction="none")
        of_pairs = neglog.info_nce(x, table[:6], reduction="none")
        gradients = [torch.autograd.grad(made, x, grad)[0] for made in (of_linear, of_pairs)]
        return loss, rows, *gradients

    given = (x, table, target, weight, grad)
    torch.testing.assert_close(run(*map(shifted, given)), run(*given))


def freed(tensor):
    tensor.untyped_storage().resize_(0)
    return tensor


def tail(tensor):
    """The numbers in a storage that begins before them."""
    return torch.cat([tensor[:1], tensor])[1:]


LOSSES = {
    "cross_entropy": ("input", "target", "weight"),
    "linear_cross_entropy": ("input", "linear_weight", "target", "linear_bias", "weight"),
    "pairs": ("query", "key"),
}
ARGUMENTS = [(loss, name) for loss, names in LOSSES.items() for name in names]


def call(loss, given, reduction):
    """The loss of tensors by name; that of pairs without a function that reads them before."""
    if loss != "pairs":
        return getattr(neglog, loss)(**given, reduction=reduction)
    none, rows = [None] * 3, torch.arange(6)
    options = (False, False, 1 << 20, torch.float32, "", False)
    made = pairs.forward(*given.values(), torch.tensor(1.0), None, rows, *none, *options).row_loss
    return made if reduction == "none" else made.sum()


def arguments_of(loss):
    """New tensors, each in memory of its own."""
    if loss == "cross_entropy":
        made = torch.randn(6, 40), torch.arange(6), torch.rand(40)
    elif loss == "pairs":
        made = torch.randn(6, 16), torch.randn(6, 16)
    else:
        made = (
            torch.randn(6, 16), torch.randn(40, 16), torch.arange(6), torch.rand(40),
            torch.rand(40),
        )  # fmt: skip
    return dict(zip(LOSSES[loss], made, strict=True))


# An offset is the address of a tensor without memory, so with one the address is not 0. The
# gradient of a sum is formed in the forward, those of rows are not.
@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize(("loss", "name"), ARGUMENTS)
def test_freed_memory_before_the_call_is_an_error_that_names_the_argument(loss, name, offset):
    for reduction in ("sum", "none"):
        given = arguments_of(loss)
        next(iter(given.values())).requires_grad_()
        with torch.no_grad():
            given[name] = freed(tail(given[name]) if offset else given[name])
        with pytest.raises(RuntimeError, match=f"^{name}: .* whose memory was freed"):
            call(loss, given, reduction)


X, LABELS, MASK = torch.randn(4, 5), torch.arange(4), torch.ones(4) > 0
READ_BEFORE = {
    "target": lambda: neglog.cross_entropy(X, freed(LABELS.to(torch.uint8))),
    "num_items": lambda: neglog.cross_entropy(X, LABELS, num_items=freed(torch.tensor(4.0))),
    "mask": lambda: neglog.masked_cross_entropy(X, LABELS, freed(MASK.clone())),
    "linear_bias": lambda: neglog.linear_cross_entropy(
        X.double(), X.double(), LABELS, linear_bias=freed(torch.rand(4).double()),
    ),
    "positive_key|key": lambda: neglog.info_nce(X, freed(X.clone())),
    "image_features": lambda: neglog.siglip_loss(freed(X.clone()), X, 1.0, 0.0),
    "exclude": lambda: neglog.nt_xent(X, X, exclude=freed(LABELS.clone())),
}  # fmt: skip


# Some of torch's functions crash the process there.
@pytest.mark.parametrize(("name", "call"), READ_BEFORE.items())
def test_freed_memory_that_torch_would_read_first_is_an_error_that_names_the_argument(name, call):
    with pytest.raises(RuntimeError, match=f"^({name}): .* whose memory was freed"):
        call()


@pytest.mark.parametrize(("loss", "name"), ARGUMENTS)
def test_freed_memory_before_the_backward_is_an_error_that_names_the_argument(loss, name):
    given = arguments_of(loss)
    learned = [x.requires_grad_() for x in given.values() if x.is_floating_point()][:2]
    if "weight" in given:
        given["weight"].requires_grad_(False)
    made = {key: x * 1 if x.requires_grad else x for key, x in given.items()}
    rows = call(loss, made, "none")
    freed(made[name])
    with pytest.raises(RuntimeError, match=f"^{name}: .* whose memory was freed"):
        torch.autograd.grad(rows, learned[0], torch.rand(6))


def test_an_input_freed_before_the_backward_is_not_missed_where_its_gradient_was_formed():
    remembered.forget()  # after forwards of other tests without a backward none is formed
    x, target = torch.randn(6, 40, requires_grad=True), torch.arange(6)
    y = x * 1
    loss = cross_entropy(y, target)
    expected = torch.autograd.grad(cross_entropy(x, target), x)
    freed(y)
    torch.testing.assert_close(torch.autograd.grad(loss, x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("loss", LOSSES)
def test_freed_memory_of_an_upstream_gradient_is_an_error_that_names_it(loss):
    given = arguments_of(loss)
    x = next(iter(given.values())).requires_grad_()
    rows = call(loss, given, "none")
    with pytest.raises(RuntimeError, match=r"^grad_\w+: .* whose memory was freed"):
        torch.autograd.grad(rows, x, freed(torch.rand(6)))


def negated(x):
    """x as the negative view of its negation."""
    return torch._neg_view(-x)


# The gradient of a sum is formed in the forward, those of rows are not.
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize("loss", [*LOSSES, "masked_cross_entropy"])
def test_views_that_negate_have_the_numbers_they_show(loss, probabilities, reduction):
    if loss == "masked_cross_entropy":
        given = arguments_of("cross_entropy") | {"mask": torch.arange(6) < 4}
    else:
        given = arguments_of(loss)
    if probabilities and "target" in given:
        given["target"] = torch.rand(6, 40)
    grad = torch.rand(6) if reduction == "none" else torch.tensor(2.0)

    def run(view):
        first, *others = given
        x = given[first].clone().requires_grad_()
        tensors = {key: given[key] if key == "mask" else view(given[key]) for key in others}
        made = call(loss, {first: view(x)} | tensors, reduction)
        return made.detach(), *torch.autograd.grad(made, x, view(grad))

    torch.testing.assert_close(run(negated), run(lambda x: x))


# As autograd makes them: of tensors that have no memory at all.
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_zeros_without_memory_are_zeros(reduction):
    target, zeros = torch.arange(4), torch._efficientzerotensor((4, 10))
    assert zeros._is_zerotensor()
    given = {"target": target, "reduction": reduction}
    expected = cross_entropy(torch.zeros(4, 10), **given)
    torch.testing.assert_close(cross_entropy(zeros, **given), expected)
    table = torch.randn(10, 10)
    made, same = (neglog.linear_cross_entropy(x, table, **given) for x in (zeros, zeros.clone()))
    torch.testing.assert_close(made, same)
    rows = torch.randn(4, 10, requires_grad=True)
    loss = cross_entropy(rows, **given)
    (grad,) = torch.autograd.grad(loss, rows, torch._efficientzerotensor(loss.shape))
    torch.testing.assert_close(grad, torch.zeros(4, 10))
