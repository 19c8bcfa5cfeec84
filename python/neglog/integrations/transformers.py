"""Models of Hugging Face's transformers, trained without their logits: one line.

    model = neglog.integrations.transformers.fuse(model)

The class of the model's output layer is changed, and nothing else: no forward is copied, no loss
function is replaced. While gradients are recorded the layer answers with logits that are not made
yet (neglog.integrations.deferred). The model's own loss, Trainer's or yours does without them;
whatever else reads them gets them. `explain(model)` says what happened.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import nn

from neglog.integrations.contrastive_models import (
    explain_contrastive,
    fuse_contrastive,
    unfuse_contrastive,
)
from neglog.integrations.deferred import DeferredLinear, defer, refusal, undefer

__all__ = ["explain", "fuse", "patch", "unfuse"]

Model = TypeVar("Model", bound=nn.Module)

# Smaller logits are made at once: on 2 cores a loss without them takes longer than torch's below 2
# to 8 MB, and saves as little memory (docs/trainers/README.md).
MIN_BYTES = 4 * 2**20
# What the models for classification call their last layer.
CLASSIFIERS = ("classifier", "score", "qa_outputs", "out_proj", "logits_proj", "seq_relationship")
_FUSED = "_neglog_fused"  # a fused model's attribute: min_bytes, and the hook that keeps it so


def fuse(model: Model, strict: bool = True, *, min_bytes: int = MIN_BYTES) -> Model:
    """Makes a model do without its logits where its loss can, and returns it.

    Models with an output layer (for causal, masked or sequence-to-sequence language modelling, with
    vision or speech before it or not), with a classifier, and dual encoders such as CLIP. PEFT,
    torch.compile, DistributedDataParallel or FSDP may wrap the model, before or after. It stays
    fused when its embeddings are resized, an adapter is added, it is copied or pickled.

    Args:
        model: a torch.nn.Module, as transformers' from_pretrained or from_config returns it.
        strict: raise where an output layer has to stay as it is. If not, `explain` says why.
        min_bytes: logits that would take less memory are made as before.

    Raises:
        TypeError: the model is no Module; with strict, an output layer cannot be deferred.
        ValueError: with strict, the model has neither output layer nor loss of its own.

    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> from neglog.integrations.transformers import explain, fuse
    >>> config = GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=50257)
    >>> model = fuse(GPT2LMHeadModel(config))
    >>> ids = torch.arange(64).view(1, 64)
    >>> model(input_ids=ids, labels=ids).loss.backward()
    >>> print(explain(model))
    GPT2LMHeadModel
      lm_head (16 -> 50257): deferred; cross_entropy (1x) without logits; logits made by nothing
    """
    inner = _unwrapped(model)
    if fuse_contrastive(inner):
        return model
    heads = dict(_heads(inner))
    if strict:
        _check(inner, heads)
    _defer_all(inner, heads, min_bytes)
    if not hasattr(inner, _FUSED):
        inner.register_forward_pre_hook(_keep_fused)
    setattr(inner, _FUSED, min_bytes)
    return model


patch = fuse


def unfuse(model: Model) -> Model:
    """Gives a model its own output layer back, and returns it."""
    inner = _unwrapped(model)
    unfuse_contrastive(inner)
    for head in dict(_heads(inner)).values():
        undefer(head)
    if hasattr(inner, _FUSED):
        delattr(inner, _FUSED)
        for key, hook in list(inner._forward_pre_hooks.items()):
            if hook is _keep_fused:
                del inner._forward_pre_hooks[key]
    return model


def explain(model: nn.Module) -> str:
    """What is fused in a model and what is not, why, and what read its logits since.

    A line for the model and one for each output layer: whether its logits are deferred or why not,
    the losses that did without logits, and the functions that had logits made.
    """
    inner = _unwrapped(model)
    lines = [type(inner).__name__]
    contrastive = explain_contrastive(inner)
    if contrastive is not None:
        lines.append(f"  {contrastive}")
    heads = dict(_heads(inner))
    lines += [f"  {name} ({_size(head)}): {_state(head)}" for name, head in heads.items()]
    if not heads and contrastive is None:
        lines.append("  no output layer and no loss of its own that neglog knows: left as it is")
    owners = _with_module_loss(inner, heads)
    if owners:
        lines.append(
            f"  under torch.compile logits are made: {', '.join(owners)} calls "
            "torch.nn.CrossEntropyLoss, which a graph gives nothing but a Tensor"
        )
    return "\n".join(lines)


def _size(head: nn.Module) -> str:
    if isinstance(head, nn.Linear):
        return f"{head.in_features} -> {head.out_features}"
    return type(head).__name__


def _state(head: nn.Module) -> str:
    if isinstance(head, DeferredLinear):
        return f"deferred; {head.neglog_report}"
    reason = refusal(head)
    return "not fused: fuse(model) was not called" if reason is None else f"not fused: {reason}"


# Models


def _unwrapped(model: Any) -> Any:
    """Without torch.compile's, DistributedDataParallel's, FSDP's and PEFT's wrapper."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    return _without_wrappers(model)


def _without_wrappers(model: Any) -> Any:
    while True:
        inner = getattr(model, "_orig_mod", None)  # torch.compile
        if inner is None and not hasattr(type(model), "get_output_embeddings"):
            inner = getattr(model, "module", None)
        if inner is None and hasattr(model, "get_base_model"):
            inner = model.get_base_model()
        if not isinstance(inner, nn.Module) or inner is model:
            return model
        model = inner


def _check(model: nn.Module, heads: dict[str, nn.Module]) -> None:
    if not heads:
        why = explain_contrastive(model) or "it has none that neglog knows"
        raise ValueError(
            f"model: expected one with an output layer or a contrastive loss, got "
            f"{type(model).__name__}: {why}; strict=False leaves it as it is"
        )
    for name, head in heads.items():
        reason = refusal(head)
        if reason is not None and not isinstance(head, DeferredLinear):
            raise TypeError(
                f"model: {type(model).__name__}.{name} cannot be fused: {reason}; strict=False "
                "leaves it as it is"
            )


def _defer_all(model: nn.Module, heads: dict[str, nn.Module], min_bytes: int) -> None:
    traced = not _with_module_loss(model, heads)
    for head in heads.values():
        if isinstance(head, DeferredLinear) or refusal(head) is None:
            defer(head, min_bytes=min_bytes, traced=traced)  # type: ignore[arg-type]


def _keep_fused(model: nn.Module, args: Any) -> None:
    """Before each forward: an output layer may be new, after resize_token_embeddings say."""
    if torch.compiler.is_compiling() or not hasattr(model, _FUSED):
        return
    head = _embeddings(model)
    if type(head) is DeferredLinear:
        return
    heads = dict(_heads(model))
    if not all(isinstance(head, DeferredLinear) for head in heads.values()):
        _defer_all(model, heads, getattr(model, _FUSED))


# Their output layers


def _embeddings(model: Any) -> Any:
    get: Any = getattr(model, "get_output_embeddings", None)
    try:
        return None if get is None else get()
    except (NotImplementedError, AttributeError):
        return None


def _heads(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The layers that make logits, by name."""
    names = {id(module): name for name, module in model.named_modules()}
    found = _embeddings(model)
    heads = list(found) if isinstance(found, (list, tuple, nn.ModuleList)) else [found]
    heads = [head for head in heads if isinstance(head, nn.Module)]
    for head in heads or _classifiers(model):
        for part in _parts(head):
            yield names.get(id(part), type(part).__name__), part


def _classifiers(model: nn.Module) -> list[nn.Module]:
    config: Any = getattr(model, "config", None)
    classes = getattr(config, "num_labels", None)
    return [
        module
        for name, module in model.named_modules()
        if name.rsplit(".", 1)[-1] in CLASSIFIERS
        and isinstance(module, nn.Linear)
        and module.out_features == classes
    ]


def _parts(head: Any) -> list[nn.Module]:
    """A layer itself, or what PEFT put in its place: copies that train, or a low-rank adapter.

    An adapter's output is added to the layer's: both are deferred, and so is their sum.
    """
    copies = getattr(head, "modules_to_save", None)
    if isinstance(copies, nn.ModuleDict):
        return [part for copy in copies.values() for part in _parts(copy)]
    base = getattr(head, "base_layer", None)
    adapters = getattr(head, "lora_B", None)
    if isinstance(base, nn.Module) and isinstance(adapters, nn.ModuleDict):
        return [base, *adapters.values()]
    return [head]


def _with_module_loss(model: nn.Module, heads: dict[str, nn.Module]) -> list[str]:
    """Classes around the heads whose forward calls torch.nn.CrossEntropyLoss."""
    around = {id(model): model}
    for name in heads:
        path = name.split(".")
        for end in range(1, len(path)):
            module = model.get_submodule(".".join(path[:end]))
            around[id(module)] = module
    return [
        type(module).__name__
        for module in around.values()
        if "CrossEntropyLoss" in inspect.unwrap(type(module).forward).__code__.co_names
    ]
