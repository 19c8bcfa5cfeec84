"""Which uses of deferred logits make none, and that those which do make torch's own bits."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune
from transformers.trainer_pt_utils import LabelSmoother
from trl.trainer.utils import selective_log_softmax

from neglog import dispatch
from neglog.integrations.deferred import DeferredLogits, defer, undefer
from tests.support.allocations import largest_allocation

BATCH, LENGTH, VOCAB, WIDTH = 4, 64, 3001, 16
Loss = Callable[[Tensor, Tensor], Tensor]


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def linear(bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    head = nn.Linear(WIDTH, VOCAB, bias=bias)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(numbers(*parameter.shape) / 2)
    return head.to(dtype)


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    labels = torch.randint(
        VOCAB, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1)
    )  # fmt: skip
    labels[0, :9] = -100
    return numbers(BATCH, LENGTH, WIDTH).to(dtype).requires_grad_(), labels


def with_gradients(head: nn.Linear, loss: Loss) -> list[Tensor]:
    """The loss, and the gradients of hidden states and head for an upstream not uniform."""
    hidden, labels = inputs(head.weight.dtype)
    result = loss(head(hidden), labels)
    upstream = torch.linspace(0.5, 1.5, result.numel()).reshape(result.shape).to(result.dtype)
    gradients = torch.autograd.grad(result, [hidden, *head.parameters()], upstream)
    return [result.detach(), *gradients]


def rows(logits: Tensor) -> Tensor:
    return logits.view(-1, VOCAB)


def each(labels: Tensor) -> Tensor:
    return labels.reshape(-1)


def counted(labels: Tensor) -> Tensor:
    return labels.clamp(min=0)


def shifted(logits: Tensor, labels: Tensor) -> Tensor:
    """As transformers did up to 4.45."""
    logits, labels = logits[..., :-1, :].contiguous(), labels[..., 1:].contiguous()
    return F.cross_entropy(logits.view(-1, VOCAB), labels.view(-1))


def causal_lm(logits: Tensor, labels: Tensor) -> Tensor:
    labels = F.pad(labels, (0, 1), value=-100)[..., 1:].contiguous()
    return F.cross_entropy(logits.float().view(-1, VOCAB), each(labels), reduction="sum") / 99


def masked(logits: Tensor, labels: Tensor) -> Tensor:
    keep = labels >= 0
    losses = F.cross_entropy(rows(logits), each(counted(labels)), reduction="none")
    return (losses * keep.view(-1)).sum() / keep.sum()


def smoothed(logits: Tensor, labels: Tensor) -> Tensor:
    return LabelSmoother(0.1)({"logits": logits}, labels, shift_labels=True)


CLASS_WEIGHT = numbers(VOCAB).abs()

# Each operation that a model puts between its head and its loss, and each option of the loss.
FUSED: dict[str, Loss] = {
    "rows": lambda x, y: F.cross_entropy(rows(x), each(y)),
    "module": lambda x, y: nn.CrossEntropyLoss()(rows(x), each(y)),
    "reshape": lambda x, y: F.cross_entropy(x.reshape(-1, x.size(-1)), each(y)),
    "flatten": lambda x, y: F.cross_entropy(x.flatten(0, 1), each(y)),
    "float": lambda x, y: F.cross_entropy(x.float().view(-1, VOCAB), each(y)),
    "to": lambda x, y: F.cross_entropy(rows(x.to(torch.float32)), each(y)),
    "shifted": shifted,
    "shifted, reshape": lambda x, y: F.cross_entropy(x[:, :-1].reshape(-1, VOCAB), each(y[:, 1:])),
    "causal LM": causal_lm,
    "last positions": lambda x, y: F.cross_entropy(
        x[:, -8:, :].reshape(-1, VOCAB), each(y[:, -8:])
    ),
    "one sequence": lambda x, y: F.cross_entropy(x[1], y[1]),
    "mask of positions": lambda x, y: F.cross_entropy(x[y >= 0], y[y >= 0]),
    "squeezed": lambda x, y: F.cross_entropy(x[1:2].squeeze(0), y[1]),
    "scaled": lambda x, y: F.cross_entropy(rows(x / 0.7), each(y)),
    "multiplied": lambda x, y: F.cross_entropy(rows(0.25 * x), each(y)),
    "softcapped": lambda x, y: F.cross_entropy(rows(torch.tanh(x / 5.0) * 5.0), each(y)),
    "softcapped in steps": lambda x, y: F.cross_entropy(rows((x / 5.0).tanh().mul(5.0)), each(y)),
    "bias": lambda x, y: F.cross_entropy(rows(x + CLASS_WEIGHT), each(y)),
    "sum": lambda x, y: F.cross_entropy(rows(x), each(y), reduction="sum"),
    "none": lambda x, y: F.cross_entropy(rows(x), each(y), reduction="none"),
    "masked": masked,
    "ignore_index": lambda x, y: F.cross_entropy(rows(x), each(counted(y)), ignore_index=0),
    "weight": lambda x, y: F.cross_entropy(rows(x), each(y), CLASS_WEIGHT),
    "label_smoothing": lambda x, y: F.cross_entropy(rows(x), each(y), label_smoothing=0.1),
    "two losses": lambda x, y: F.cross_entropy(rows(x), each(y)) + shifted(x, y),
    "log_softmax, gather": lambda x, y: (
        x.log_softmax(-1).gather(-1, counted(y)[..., None]).squeeze(-1)
    ),
    "F.log_softmax, torch.gather": lambda x, y: torch.gather(
        F.log_softmax(x, dim=-1), -1, counted(y)[..., None]
    ),
    "log_softmax of float": lambda x, y: (
        x[:, :-1].float().log_softmax(-1).gather(2, counted(y)[:, 1:, None])
    ),
    "log_softmax at a temperature": lambda x, y: (
        (x / 0.7).log_softmax(-1).gather(2, counted(y).unsqueeze(2))
    ),
    "nll_loss": lambda x, y: F.nll_loss(F.log_softmax(rows(x), dim=-1), each(y)),
    "selective_log_softmax": lambda x, y: selective_log_softmax(x[:, :-1], counted(y)[:, 1:]),
    "selective_log_softmax at a temperature": lambda x, y: selective_log_softmax(
        x, counted(y), temperature=0.7
    ),
    "LabelSmoother": smoothed,
}


def tolerance(dtype: torch.dtype, expected: Tensor) -> dict[str, float]:
    """Real logits of 16 bits are rounded, those inside of a fused loss are not."""
    if dtype == torch.float32:
        return {"rtol": 1e-4, "atol": 1e-5 * max(1.0, expected.abs().max().item())}
    return {"rtol": 5e-2, "atol": 3e-2 * max(0.1, expected.abs().max().item())}


@pytest.mark.parametrize("loss", FUSED.values(), ids=FUSED.keys())
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_fused(loss, bias, monkeypatch):
    """Nothing as large as the logits is asked for, and the numbers are those of real ones."""
    monkeypatch.setenv("NEGLOG_WORKSPACE_MB", "1")
    expected = with_gradients(linear(bias), loss)
    head = defer(linear(bias))
    with dispatch.record() as ran:
        got = with_gradients(head, loss)
    assert ran, "no kernel of neglog ran"
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, **tolerance(torch.float32, other))
    assert largest_allocation(lambda: with_gradients(head, loss)) < BATCH * LENGTH * VOCAB * 4 * 0.8


@pytest.mark.parametrize(
    "name",
    ["causal LM", "shifted", "nll_loss", "selective_log_softmax", "LabelSmoother"],
)
def test_fused_in_16_bits(name):
    expected = with_gradients(linear(dtype=torch.bfloat16), FUSED[name])
    with dispatch.record() as ran:
        got = with_gradients(defer(linear(dtype=torch.bfloat16)), FUSED[name])
    assert ran, "no kernel of neglog ran"
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, **tolerance(torch.bfloat16, other))


def test_loss_of_float_logits_is_not_rounded_to_16_bits():
    got = with_gradients(defer(linear(dtype=torch.bfloat16)), causal_lm)[0]
    assert got.dtype == torch.float32
    assert got != got.bfloat16().float()


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_made_logits_are_bits_of_linear(bias, dtype):
    hidden, _ = inputs(dtype)
    head = linear(bias, dtype)
    expected = F.linear(hidden, head.weight, head.bias)
    logits = defer(head)(hidden)
    assert isinstance(logits, DeferredLogits)
    assert torch.equal(logits[:, 1:] * 1.0, expected[:, 1:])
    assert torch.equal(logits, expected)
    upstream = numbers(*logits.shape).to(dtype)
    leaves = [hidden, *head.parameters()]
    for one, other in zip(
        torch.autograd.grad(logits, leaves, upstream),
        torch.autograd.grad(expected, leaves, upstream), strict=True,
    ):  # fmt: skip
        assert torch.equal(one, other)


@pytest.mark.parametrize("wanted", ["no_grad", "inference_mode"])
def test_nothing_is_deferred_without_gradients(wanted):
    head, (hidden, _) = defer(linear()), inputs()
    with getattr(torch, wanted)():
        assert type(head(hidden)) is Tensor


def test_report_counts_what_was_fused_and_what_made_logits():
    head, (hidden, labels) = defer(linear()), inputs()
    before = str(head.neglog_report)
    F.cross_entropy(rows(head(hidden)), each(labels))
    fused = str(head.neglog_report)
    assert fused != before
    head(hidden).sum()
    assert str(head.neglog_report) not in (before, fused)


def test_read_after_a_step_raises():
    """The weight of the logits is gone: new numbers would be a lie."""
    head, (hidden, labels) = defer(linear()), inputs()
    optimizer = torch.optim.AdamW(head.parameters())
    logits = head(hidden)
    F.cross_entropy(rows(logits), each(labels)).backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="logits"):
        logits.argmax(-1)
    with pytest.raises(RuntimeError, match="logits"):
        F.cross_entropy(rows(logits), each(labels))


def test_read_after_the_input_changed_raises():
    head, (hidden, _) = defer(linear()), inputs()
    hidden = hidden * 1
    logits = head(hidden)
    hidden.mul_(2)
    with pytest.raises(RuntimeError, match="logits"):
        logits.sum()


def test_logits_read_before_a_step_stay():
    head, (hidden, _) = defer(linear()), inputs()
    logits = head(hidden)
    before = logits.detach().clone()
    with torch.no_grad():
        head.weight.zero_()
    assert torch.equal(logits.detach(), before)


@pytest.mark.parametrize(
    "method", ["t_", "squeeze_", "unsqueeze_", "transpose_", "swapaxes_", "resize_"]
)
def test_shape_changed_in_place_raises(method):
    logits = defer(linear())(inputs()[0][0].detach()).detach()
    arguments = {
        "unsqueeze_": (0,),
        "transpose_": (0, 1),
        "swapaxes_": (0, 1),
        "resize_": (1,),
    }.get(method, ())
    with pytest.raises(RuntimeError, match=r"logits: .* changes their shape in place"):
        getattr(logits, method)(*arguments)


def test_written_through_as_strided_raises():
    logits = defer(linear())(inputs()[0])
    view = logits.as_strided((2, 2), (VOCAB, 1))
    assert torch.equal(view, logits.flatten(0, 1)[:2, :2])
    with pytest.raises(RuntimeError, match="logits: written through as_strided"):
        view.mul_(2)


def test_other_numbers_of_the_same_shape():
    logits = defer(linear())(inputs()[0])
    logits.data = torch.ones(BATCH, LENGTH, VOCAB)
    assert torch.equal(logits, torch.ones(BATCH, LENGTH, VOCAB))
    with pytest.raises(RuntimeError, match=r"logits.data: expected a tensor \[4, 64, 3001\]"):
        logits.data = torch.ones(3)


def test_memory_that_is_not_there_is_not_read():
    """torch._C._to_dlpack asks no class: an error, no crash."""
    logits = defer(linear())(inputs()[0])
    with pytest.raises(RuntimeError):
        torch.utils.dlpack.to_dlpack(logits)


def test_undefer_gives_the_class_back():
    head, (hidden, _) = linear(), inputs()
    kept = type(head)
    assert undefer(defer(defer(head))) is head
    assert type(head) is kept
    assert type(head(hidden)) is Tensor


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_head_can_be_copied(copied):
    head, (hidden, labels) = defer(linear()), inputs()
    other = copied(head)
    assert list(other.state_dict()) == list(linear().state_dict())
    F.cross_entropy(rows(other(hidden)), each(labels)).backward()
    assert head.weight.grad is None
    assert other.weight.grad is not None


@pytest.mark.parametrize("head", [nn.Conv1d(2, 3, 1), nn.Bilinear(2, 2, 3), None, numbers(3, 2)])
def test_no_linear(head):
    with pytest.raises(TypeError):
        defer(head)


def hooked(head: nn.Linear) -> Any:
    head.register_forward_hook(lambda module, args, output: output * 2)
    head.register_forward_hook(lambda module, args, output: output[:, 1:], prepend=False)


def looking(head: nn.Linear) -> Any:
    seen: list[Tensor] = []
    head.register_forward_hook(lambda module, args, output: seen.append(output.mean()))
    head.register_forward_pre_hook(lambda module, args: (args[0] * 3,))
    head.register_full_backward_hook(lambda module, grads, outputs: (grads[0] * 2,))


WRAPPED: dict[str, Callable[[nn.Linear], Any]] = {
    "hooks that change": hooked,
    "hooks that look": looking,
    "backward pre-hook": lambda head: head.register_full_backward_pre_hook(
        lambda m, g: (g[0] * 2,)
    ),
    "weight_norm": lambda head: nn.utils.parametrizations.weight_norm(head),
    "old weight_norm": lambda head: torch.nn.utils.weight_norm(head),
    "spectral_norm": lambda head: nn.utils.parametrizations.spectral_norm(head.eval()),
    "parametrization": lambda head: nn.utils.parametrize.register_parametrization(
        head, "weight", nn.Tanh()
    ),
    "pruning": lambda head: prune.l1_unstructured(head, "weight", 0.5),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("order", ["deferred first", "deferred last"])
@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED.keys())
def test_hooks_and_parametrizations_of_the_head(wrap, order):
    def found(deferred: bool) -> list[Tensor]:
        torch.manual_seed(0)
        head = linear()
        for step in (defer, wrap) if order == "deferred first" else (wrap, defer):
            if deferred or step is wrap:
                step(head)
        return with_gradients(
            head,
            lambda x, y: F.cross_entropy(rows(x.reshape(-1, VOCAB)), each(y)[: x[..., 0].numel()]),
        )

    for one, other in zip(found(True), found(False), strict=True):
        torch.testing.assert_close(one, other, **tolerance(torch.float32, other))


def test_peak_memory():
    """1024 rows of 32000: none of what is asked for is as large as a quarter of the logits."""
    rows_, vocab, width = 1024, 32000, 64
    head = defer(nn.Linear(width, vocab, bias=False))
    hidden, target = numbers(rows_, width).requires_grad_(), torch.arange(rows_)
    step = lambda: F.cross_entropy(head(hidden).float(), target).backward()  # noqa: E731
    assert largest_allocation(step) < rows_ * vocab * 4 / 4


def test_nothing_is_kept_alive():
    """Logits without a name die at once, not when the garbage collector runs: with them what their
    recipe holds."""
    head, (hidden, labels) = defer(linear()), inputs()
    gc.disable()
    try:
        logits = head(hidden)
        F.cross_entropy(rows(logits), each(labels)).backward()
        died = weakref.ref(logits)
        del logits
        assert died() is None
    finally:
        gc.enable()
