"""Autograd's own tools on the logits, the head under transforms, and what walks over outputs."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.support.deferred.given import VOCAB, Case, Given


def loss_of(x: Tensor, s: Given) -> Tensor:
    return F.cross_entropy(x.reshape(-1, VOCAB), s.target.view(-1))


def loss_of_head(s: Given) -> Callable[[Tensor], Tensor]:
    """The loss as a function of the hidden states."""
    target = s.target.view(-1)
    return lambda hidden: F.cross_entropy(
        s.head(hidden).reshape(-1, VOCAB)[: len(target)], target, reduction="sum"
    )


class Double(torch.autograd.Function):
    """A user's own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * 2 + 0 * x


class Same(torch.autograd.Function):
    """A user's own, that hands its input on and changes the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return -grad


class OwnLoss(torch.autograd.Function):
    """A user's own loss, that writes its gradient over the logits, as Liger's does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, target: Tensor) -> Tensor:
        loss = F.cross_entropy(x, target)
        x.copy_((x.softmax(-1) - F.one_hot(target, VOCAB)) / len(target))
        ctx.save_for_backward(x.detach())
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return grad * x, None


def recorded(hook: Callable[[Tensor], Tensor | None], where: str, loss: Case) -> Case:
    """A hook on the logits, or on what came before: what it sees, and what it changes."""

    def case(x: Tensor, s: Given) -> Any:
        seen: list[Tensor] = []

        def called(grad: Tensor) -> Tensor | None:
            seen.append(grad.clone())
            return hook(grad)

        {"logits": x, "base": s.base, "hidden": s.hidden}[where].register_hook(called)
        loss(x, s).sum().backward()
        return seen

    return case


HOOKED_LOSSES: dict[str, Case] = {
    "loss": loss_of,
    "loss of a view": lambda x, s: loss_of(x.view(x.shape), s),
    "log-probabilities": lambda x, s: x.log_softmax(-1).gather(-1, s.target[..., None]),
    "sum": lambda x, s: x.square().sum(),
    "loss and sum": lambda x, s: loss_of(x, s) + x.square().sum(),
}


def removed_hook(x: Tensor, s: Given) -> Any:
    handle = x.register_hook(lambda grad: grad * 100)
    handle.remove()
    return loss_of(x, s)


def kept_gradient(loss: Case) -> Case:
    def case(x: Tensor, s: Given) -> Any:
        x.retain_grad()
        s.base.retain_grad()
        loss(x, s).sum().backward()
        return x.grad, s.base.grad, x.retains_grad

    return case


def of_logits(loss: Case) -> Case:
    """The gradient for the logits themselves."""
    return lambda x, s: torch.autograd.grad(loss(x, s).sum(), x)


def of_several(x: Tensor, s: Given) -> Any:
    return torch.autograd.grad(loss_of(x, s), [x, s.base, *s.head.parameters()], retain_graph=True)


def after_hooks(x: Tensor, s: Given) -> Any:
    seen: list[Any] = []
    handle = torch.autograd.graph.register_multi_grad_hook([x], lambda grads: seen.append(grads[0]))
    loss_of(x, s).backward()
    handle.remove()
    return seen


def parameter_hooks(x: Tensor, s: Given) -> Any:
    seen: list[Any] = []
    for leaf in s.leaves:
        leaf.register_hook(lambda grad: seen.append(grad.sum()))
        leaf.register_post_accumulate_grad_hook(lambda leaf: seen.append(leaf.grad.sum()))
    (loss_of(x, s) + x.mean()).backward()
    return sorted(value.item() for value in seen)


def backward_twice(x: Tensor, s: Given) -> Any:
    loss = loss_of(x, s)
    loss.backward()
    loss.backward()


def retained(x: Tensor, s: Given) -> Any:
    loss = loss_of(x, s)
    loss.backward(retain_graph=True)
    loss.backward(torch.tensor(2.0, dtype=loss.dtype))


def two_losses_in_turn(x: Tensor, s: Given) -> Any:
    loss_of(x, s).backward(retain_graph=True)
    x.square().mean().backward()


def second_loss_after(x: Tensor, s: Given) -> Any:
    loss_of(x, s).backward()
    loss_of(x, s).backward()


def penalty(x: Tensor, s: Given) -> Any:
    grads = torch.autograd.grad(loss_of(x, s), s.leaves[:1], create_graph=True)
    return grads[0].square().sum()


def penalty_of_logits(x: Tensor, s: Given) -> Any:
    (grad,) = torch.autograd.grad(loss_of(x, s), x, create_graph=True)
    return grad.square().sum()


def created_graph(x: Tensor, s: Given) -> Any:
    loss_of(x, s).backward(create_graph=True)
    return [leaf.grad.square().sum().item() for leaf in s.leaves if leaf.grad is not None]


def leaf_of(x: Tensor, s: Given) -> Any:
    """Detached, made a leaf: the gradient is the user's to pass on."""
    leaf = x.detach().requires_grad_()
    loss_of(leaf, s).backward()
    x.backward(leaf.grad)
    return leaf.grad, leaf.is_leaf


def detached_parts(x: Tensor, s: Given) -> Any:
    return loss_of(x.detach(), s), x.detach().requires_grad, loss_of(x, s) * x.detach().mean()


def stepped(x: Tensor, s: Given) -> Any:
    """Read before an optimizer's step, which is in place."""
    optimizer = torch.optim.SGD(s.head.parameters(), lr=0.1)
    loss_of(x, s).backward()
    values = x.detach().clone()
    optimizer.step()
    return values, loss_of(s.head(s.hidden.detach()), s)


def accumulated(x: Tensor, s: Given) -> Any:
    for _ in range(3):
        (loss_of(s.head(s.hidden), s) / 3).backward()
    return [leaf.grad.clone() for leaf in s.leaves if leaf.grad is not None]


def checkpointed(reentrant: bool, with_loss: bool) -> Case:
    def case(x: Tensor, s: Given) -> Any:
        function = loss_of_head(s) if with_loss else s.head
        return checkpoint(function, s.hidden, use_reentrant=reentrant)

    return case


def checkpointed_loss(reentrant: bool) -> Case:
    def case(x: Tensor, s: Given) -> Any:
        target = s.target.view(-1)
        return checkpoint(
            lambda y: F.cross_entropy(y.reshape(-1, VOCAB), target), x, use_reentrant=reentrant
        )

    return case


def packed(x: Tensor, s: Given) -> Any:
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        return loss_of(s.head(s.hidden)[: len(x)], s), s.head(s.hidden).square()


def saved_on_cpu(x: Tensor, s: Given) -> Any:
    with torch.autograd.graph.save_on_cpu():
        loss_of(s.head(s.hidden)[: len(x)], s).backward()


def anomalies(x: Tensor, s: Given) -> Any:
    with torch.autograd.detect_anomaly():
        loss_of(x, s).backward()


def head_in(context: Callable[[], Any]) -> Case:
    """The head is asked within a mode, its logits are used outside."""

    def case(x: Tensor, s: Given) -> Any:
        with context():
            logits = s.head(s.hidden)
        return logits, loss_of(logits, s), logits.requires_grad, logits.is_inference()

    return case


def loss_in(context: Callable[[], Any]) -> Case:
    def case(x: Tensor, s: Given) -> Any:
        with context():
            return loss_of(x, s), x.softmax(-1), x[..., :1]

    return case


def toggled(x: Tensor, s: Given) -> Any:
    torch.set_grad_enabled(False)
    try:
        first = s.head(s.hidden)
        torch.set_grad_enabled(True)
        second = s.head(s.hidden)
    finally:
        torch.set_grad_enabled(True)
    return first, loss_of(second, s)


def autocast(dtype: torch.dtype = torch.bfloat16, enabled: bool = True) -> Any:
    return torch.autocast("cpu", dtype=dtype, enabled=enabled)


def autocast_nested(x: Tensor, s: Given) -> Any:
    with autocast():
        logits = s.head(s.hidden)
        with autocast(enabled=False):
            loss = loss_of(logits.float(), s)
    return loss.dtype, logits.dtype, torch.isfinite(loss).item()


def wrong_inputs(make: Callable[[Given], Any]) -> Case:
    """The head's own errors come when it is asked."""
    return lambda x, s: (s.head(make(s)), None)[1]


def functional_call(x: Tensor, s: Given) -> Any:
    parameters = {name: value.detach() * 2 for name, value in s.head.named_parameters()}

    def loss(parameters: Any) -> Tensor:
        return loss_of(torch.func.functional_call(s.head, parameters, (s.hidden.detach(),)), s)

    return torch.func.functional_call(s.head, parameters, (s.hidden,)), torch.func.grad(loss)(
        parameters
    )


def per_sample(x: Tensor, s: Given) -> Any:
    target = s.target

    def loss(parameters: Any, hidden: Tensor, target: Tensor) -> Tensor:
        logits = torch.func.functional_call(s.head, parameters, (hidden,))
        return F.cross_entropy(logits, target)

    parameters = {name: value.detach() for name, value in s.head.named_parameters()}
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
    return each(parameters, s.hidden.detach()[:, : target.shape[1]], target)


def dual(x: Tensor, s: Given) -> Any:
    with forward_ad.dual_level():
        hidden = forward_ad.make_dual(s.hidden.detach(), torch.ones_like(s.hidden))
        return forward_ad.unpack_dual(s.head(hidden)).tangent


def dual_of_logits(x: Tensor, s: Given) -> Any:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(forward_ad.make_dual(x, torch.ones_like(x)).sum()).tangent


def in_threads(x: Tensor, s: Given) -> Any:
    with ThreadPoolExecutor(4) as pool:
        sums = list(pool.map(lambda i: x[..., i].sum(), range(VOCAB)))
        target = s.target.view(-1)
        losses = list(
            pool.map(lambda i: F.cross_entropy(x.reshape(-1, VOCAB) * i, target), range(1, 4))
        )
    return sums, losses


def profiled(x: Tensor, s: Given) -> Any:
    with torch.profiler.profile(record_shapes=True), torch.profiler.record_function("loss"):
        return loss_of(x, s), x.mean()


def traced_by_fx(x: Tensor, s: Given) -> Any:
    from torch.fx.experimental.proxy_tensor import make_fx

    return make_fx(lambda y: y.softmax(-1))(x)(x)


def scripted(x: Tensor, s: Given) -> Any:
    return torch.jit.trace(lambda y: torch.softmax(y * 2, -1), x, check_trace=False)(x)


def compiled(x: Tensor, s: Given) -> Any:
    function = torch.compile(lambda y: y.softmax(-1) * 2, backend="eager")
    return function(x)


def compiled_loss(x: Tensor, s: Given) -> Any:
    function = torch.compile(
        lambda y, t: F.cross_entropy(y.reshape(-1, VOCAB), t), backend="aot_eager"
    )
    return function(x, s.target.view(-1))


def state(x: Tensor, s: Given) -> Any:
    file = io.BytesIO()
    torch.save(s.head.state_dict(), file)
    file.seek(0)
    values = torch.load(file, weights_only=True)
    return sorted(values), s.head.extra_repr(), s.head.in_features


def cleared(x: Tensor, s: Given) -> Any:
    loss = loss_of(x, s)
    s.head.zero_grad()
    loss.backward()
    s.head.zero_grad(set_to_none=False)
    return [parameter.grad for parameter in s.head.parameters()]


def input_written(x: Tensor, s: Given) -> Any:
    """Real logits keep their values; their backward raises RuntimeError."""
    if not s.head.weight.requires_grad:  # then real logits need no hidden states
        return
    hidden = s.hidden * 1
    logits = s.head(hidden)
    loss = loss_of(logits, s)
    hidden.mul_(2)
    loss.backward()


def weight_replaced(x: Tensor, s: Given) -> Any:
    """The logits are those of the weight of their time."""
    s.head.weight = torch.nn.Parameter(s.head.weight.detach() * 2)
    return loss_of(x, s).detach(), x.detach().clone()


def shared_weight(x: Tensor, s: Given) -> Any:
    """Embedding and head are one parameter."""
    hidden = F.embedding(s.target, s.head.weight)
    return loss_of(s.head(hidden), s)


CONTEXTS: dict[str, Callable[[], Any]] = {
    "nothing": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "inference_mode": torch.inference_mode,
    "inference_mode(False)": lambda: torch.inference_mode(False),
    "autocast off": lambda: autocast(enabled=False),
    "deterministic": lambda: torch.backends.mkldnn.flags(enabled=False),
    "multithreading off": lambda: torch.autograd.set_multithreading_enabled(False),
}

CASES: dict[str, Case] = {
    **{
        f"hook on {where}, {doing}: {name}": recorded(hook, where, loss)
        for where in ("logits", "base", "hidden")
        for doing, hook in (("looks", lambda grad: None), ("doubles", lambda grad: grad * 2))
        for name, loss in HOOKED_LOSSES.items()
    },
    **{f"retain_grad: {name}": kept_gradient(loss) for name, loss in HOOKED_LOSSES.items()},
    **{f"grad: {name}": of_logits(loss) for name, loss in HOOKED_LOSSES.items()},
    **{f"head in {name}": head_in(context) for name, context in CONTEXTS.items()},
    **{f"loss in {name}": loss_in(context) for name, context in CONTEXTS.items()},
    "hook, removed": removed_hook,
    "hook of no function": lambda x, s: (x.register_hook(3), None)[1],
    "post-accumulate hook": lambda x, s: x.register_post_accumulate_grad_hook(lambda t: None),
    "grad of several": of_several,
    "grad of no use": lambda x, s: torch.autograd.grad(s.head(s.hidden).sum(), x),
    "grad, allow_unused": lambda x, s: torch.autograd.grad(
        s.head(s.hidden).sum(), x, allow_unused=True
    ),
    "grad with grad_outputs": lambda x, s: torch.autograd.grad(x, s.leaves[:1], s.like),
    "grad_outputs of logits": lambda x, s: torch.autograd.grad(
        s.head(s.hidden), s.leaves[:1], s.head(s.hidden).detach()
    ),
    "grad, batched": lambda x, s: torch.autograd.grad(
        x, s.leaves[:1], torch.stack([s.like, s.like]), is_grads_batched=True
    ),
    "multi-grad hook": after_hooks,
    "parameter hooks": parameter_hooks,
    "backward of logits": lambda x, s: x.backward(s.like),
    "backward of logits and loss": lambda x, s: torch.autograd.backward(
        [x, loss_of(x, s)], [s.like, None]
    ),
    "backward with inputs": lambda x, s: loss_of(x, s).backward(inputs=s.leaves[:1]),
    "backward twice": backward_twice,
    "backward retained": retained,
    "two losses in turn": two_losses_in_turn,
    "second loss after backward": second_loss_after,
    "penalty": penalty,
    "penalty of logits": penalty_of_logits,
    "created graph": created_graph,
    "detached leaf": leaf_of,
    "detached parts": detached_parts,
    "stepped": stepped,
    "accumulated": accumulated,
    "cleared": cleared,
    "own function": lambda x, s: Double.apply(x),
    "own function of a view": lambda x, s: Double.apply(x.reshape(-1, VOCAB)),
    "own function, then loss": lambda x, s: loss_of(Same.apply(x), s),
    "own function of the loss": lambda x, s: Double.apply(loss_of(x, s)),
    "own loss in place": lambda x, s: OwnLoss.apply((x * 1).reshape(-1, VOCAB), s.target.view(-1)),
    "packed": packed,
    "saved on cpu": saved_on_cpu,
    "anomalies": anomalies,
    "toggled": toggled,
    "autocast, nested": autocast_nested,
    "threads": in_threads,
    "profiler": profiled,
    "make_fx": traced_by_fx,
    "jit.trace": scripted,
    # The head
    "head again": lambda x, s: (
        s.head(s.hidden),
        loss_of(s.head(s.hidden), s),
        s.head.forward(s.hidden),
    ),
    "head by keyword": lambda x, s: s.head(input=s.hidden),
    "head of expanded": lambda x, s: s.head(s.hidden.detach().expand(3, *s.hidden.shape)),
    "head of transposed": lambda x, s: s.head(s.hidden.transpose(0, -2)),
    "head of many axes": lambda x, s: s.head(s.hidden[None, None]),
    "head of nothing": lambda x, s: (
        s.head(s.hidden[:0]),
        F.cross_entropy(
            s.head(s.hidden[:0].reshape(-1, s.hidden.shape[-1])), s.target.view(-1)[:0]
        ),
    ),
    "head of a parameter": lambda x, s: loss_of(s.head(torch.nn.Parameter(s.hidden.detach())), s),
    "head of NaN": lambda x, s: F.cross_entropy(
        s.head(s.hidden.detach() * float("nan")).view(-1, VOCAB), s.target.view(-1)
    ),
    "wrong width": wrong_inputs(lambda s: torch.zeros(2, 9)),
    "wrong dtype": wrong_inputs(lambda s: s.hidden.detach().to(torch.float16)),
    "integers": wrong_inputs(lambda s: s.target),
    "list": wrong_inputs(lambda s: [1.0, 2.0]),
    "None": wrong_inputs(lambda s: None),
    "other device": wrong_inputs(lambda s: s.hidden.detach().to("meta")),
    "no argument": lambda x, s: s.head(),
    "state": state,
    "is Linear": lambda x, s: (
        isinstance(s.head, torch.nn.Linear),
        len(list(s.head.parameters())),
        s.head.training,
    ),
    "weight replaced": weight_replaced,
    "input written": input_written,
    "shared weight": shared_weight,
    # Transforms
    "checkpoint of logits": checkpointed(False, False),
    "checkpoint": checkpointed(False, True),
    "reentrant checkpoint of logits": checkpointed(True, False),
    "reentrant checkpoint": checkpointed(True, True),
    "checkpointed loss": checkpointed_loss(False),
    "reentrant checkpointed loss": checkpointed_loss(True),
    "jacobian": lambda x, s: torch.autograd.functional.jacobian(s.head, s.hidden),
    "jacobian of the loss": lambda x, s: torch.autograd.functional.jacobian(
        loss_of_head(s), s.hidden.detach()
    ),
    "hessian": lambda x, s: torch.autograd.functional.hessian(loss_of_head(s), s.hidden.detach()),
    "jvp": lambda x, s: torch.autograd.functional.jvp(
        loss_of_head(s), s.hidden.detach(), torch.ones_like(s.hidden)
    ),
    "vmap": lambda x, s: torch.func.vmap(s.head)(s.hidden),
    "vmap over logits": lambda x, s: torch.func.vmap(lambda y: y.softmax(-1))(x),
    "func.grad": lambda x, s: torch.func.grad(loss_of_head(s))(s.hidden.detach()),
    "func.grad of captured": lambda x, s: torch.func.grad(lambda y: (x.detach() * y).sum())(s.like),
    "func.grad over logits": lambda x, s: torch.func.grad(lambda y: loss_of(y, s))(x.detach()),
    "func.vjp": lambda x, s: (lambda out, pull: pull(torch.ones_like(out)))(
        *torch.func.vjp(s.head, s.hidden.detach())
    ),
    "jacrev": lambda x, s: torch.func.jacrev(s.head)(s.hidden.detach()),
    "jacfwd": lambda x, s: torch.func.jacfwd(loss_of_head(s))(s.hidden.detach()),
    "functional_call": functional_call,
    "per sample": per_sample,
    "forward mode": dual,
    "forward mode of logits": dual_of_logits,
}

SLOW: dict[str, Case] = {"torch.compile": compiled, "torch.compile of the loss": compiled_loss}
