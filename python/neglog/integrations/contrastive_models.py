"""transformers' dual encoders, such as CLIP and SigLIP: their own loss by neglog's kernels.

    fuse_contrastive(model)      # model(..., return_loss=True).loss is neglog's from here on
    unfuse_contrastive(model)
    explain_contrastive(model)   # a sentence: what is fused, or why not

No forward is copied or replaced. A hook before it takes the request for a loss away, and a hook
after it puts neglog's loss of the embeddings into the output. The logits stay as the forward makes
them; only the loss, with the matrices that torch makes for it and its gradient, comes from here.

This module imports nothing of transformers: it knows its classes by their names.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from neglog.losses.clip import clip_loss, siglip_loss
from neglog.losses.info_nce import info_nce

__all__ = ["explain_contrastive", "fuse_contrastive", "unfuse_contrastive"]

# What `return_loss` is while a fused model runs: false, so that the forward makes no loss, and what
# no caller passes, so that the hook after it knows that one was asked for. A constant of a builtin
# type, which torch.compile follows.
ASKED = ""
# Outputs of a tuple, where both embeddings are: before the outputs of both towers.
TEXT_IN_TUPLE, OTHER_IN_TUPLE = -4, -3
OUTPUTS = 6  # the least of a tuple with both embeddings: two of logits, two of them, two of towers
_INDEX = "_neglog_return_loss"  # a fused module's attribute: which argument return_loss is


def _by_logit_scale(model: Any, text: Tensor, image: Tensor) -> Tensor:
    return clip_loss(image, text, model.logit_scale.exp())


def _by_temperature(model: Any, text: Tensor, image: Tensor) -> Tensor:
    return clip_loss(image, text, model.temperature.reciprocal())


def _sigmoid(model: Any, text: Tensor, image: Tensor) -> Tensor:
    return siglip_loss(image, text, model.logit_scale.exp(), model.logit_bias)


def _by_two_scales(model: Any, text: Tensor, audio: Tensor) -> Tensor:
    """Clap's: it transposes the logits of audio, so both scales are of texts against audio."""
    losses = [
        info_nce(text, audio, temperature=(-scale).exp(), normalize=False)
        for scale in (model.logit_scale_t, model.logit_scale_a)
    ]
    return torch.stack(losses).mean()


class Formula(NamedTuple):
    """A model's loss of (model, text, other), and the name of the other embeddings."""

    loss: Callable[[Any, Tensor, Tensor], Tensor]
    other: str = "image_embeds"


# All have normalised embeddings in their outputs. Read in transformers 5.24.
FORMULAS = {
    "AlignModel": Formula(_by_temperature),
    "AltCLIPModel": Formula(_by_logit_scale),
    "BlipModel": Formula(_by_logit_scale),
    "ChineseCLIPModel": Formula(_by_logit_scale),
    "ClapModel": Formula(_by_two_scales, "audio_embeds"),
    "CLIPModel": Formula(_by_logit_scale),
    "CLIPSegModel": Formula(_by_logit_scale),
    "GroupViTModel": Formula(_by_logit_scale),
    "MetaClip2Model": Formula(_by_logit_scale),
    "Owlv2Model": Formula(_by_logit_scale),
    "OwlViTModel": Formula(_by_logit_scale),
    "Siglip2Model": Formula(_sigmoid),
    "SiglipModel": Formula(_sigmoid),
    "Tipsv2Model": Formula(_by_temperature),
    "VisionTextDualEncoderModel": Formula(_by_logit_scale),
}
# Models with return_loss whose loss is another.
LABELS = "its loss is no contrastive one: labels of 0 take negatives out of it"
REASONS = {
    "BridgeTowerForContrastiveLearning": "its loss compares three embeddings in one direction each",
    "ClvpModelForConditionalGeneration": "where its embeddings are depends on the call",
    "FlavaForPreTraining": "its loss is a sum of several, made inside its forward",
    "PeAudioFrameLevelModel": LABELS,
    "PeAudioModel": LABELS,
    "PeAudioVideoModel": LABELS,
    "PeVideoModel": LABELS,
    "VideoPrismClipModel": "its loss is of logits that are exponentials and normalised",
    "XCLIPModel": "each of its videos has texts of its own, so its logits are no product of two "
    "matrices",
}


def fuse_contrastive(model: nn.Module) -> bool:
    """Let the dual encoders in `model` make their loss by neglog. Whether there is one.

    The model itself, or one that a wrapper holds, such as PEFT's or DistributedDataParallel's. A
    second call changes nothing. Loss and gradients are those of the unfused model, to rounding;
    `loss` is the first of a tuple (return_dict=False) too.
    """
    found = list(_dual_encoders(model))
    for outer, inner in found:
        if hasattr(outer, _INDEX):
            continue
        arguments = list(inspect.signature(inner.forward).parameters)
        setattr(outer, _INDEX, arguments.index("return_loss"))
        outer.register_forward_pre_hook(_take_request, with_kwargs=True)
        # First of all hooks: FSDP's, which shards the scale again, comes later.
        outer.register_forward_hook(_put_loss, with_kwargs=True, prepend=True)
    return bool(found)


def unfuse_contrastive(model: nn.Module) -> None:
    """Undo fuse_contrastive."""
    for outer, _ in _dual_encoders(model):
        if not hasattr(outer, _INDEX):
            continue
        delattr(outer, _INDEX)
        for hooks, with_kwargs, ours in (
            (outer._forward_pre_hooks, outer._forward_pre_hooks_with_kwargs, _take_request),
            (outer._forward_hooks, outer._forward_hooks_with_kwargs, _put_loss),
        ):
            for number in [number for number, hook in hooks.items() if hook is ours]:
                del hooks[number]
                with_kwargs.pop(number, None)


def explain_contrastive(model: nn.Module) -> str | None:
    """What is fused, or why nothing is; None of a model without a contrastive loss."""
    for outer, inner in _dual_encoders(model):
        name = type(inner).__name__
        if hasattr(outer, _INDEX):
            return f"{name}: its contrastive loss is made of its embeddings by neglog"
        return f"{name}: its contrastive loss can be fused, and is not"
    for module in model.modules():
        for name in _names(module):
            if name in REASONS:
                return f"{name}: not fused: {REASONS[name]}"
    return None


def _dual_encoders(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Each with the module whose hooks are called.

    A tuner of PEFT calls forward of the model that it holds, past its hooks, so its own are taken.
    """
    held = {}
    for module in model.modules():
        if any(base.__name__ == "BaseTuner" for base in type(module).__mro__):
            held[module.model] = module
    for module in model.modules():
        if _formula(module) is not None:
            yield held.get(module, module), module


def _formula(module: nn.Module) -> Formula | None:
    return next((FORMULAS[name] for name in _names(module) if name in FORMULAS), None)


def _names(module: nn.Module) -> list[str]:
    """Of its classes that transformers defines."""
    kinds = type(module).__mro__
    return [kind.__name__ for kind in kinds if kind.__module__.startswith("transformers.")]


def _take_request(module: Any, arguments: Any, options: Any) -> Any:
    """Before forward: return_loss=True becomes ASKED, by position too."""
    index = getattr(module, _INDEX)
    if options.get("return_loss"):
        return arguments, {**options, "return_loss": ASKED}
    if len(arguments) > index and arguments[index]:
        return (*arguments[:index], ASKED, *arguments[index + 1 :]), options
    return None


def _put_loss(module: Any, arguments: Any, options: Any, output: Any) -> Any:
    """After forward: the loss that was asked for."""
    index = getattr(module, _INDEX)
    asked = arguments[index] if len(arguments) > index else options.get("return_loss")
    if not (isinstance(asked, str) and asked == ASKED):
        return None
    inner: Any = module
    formula = _formula(inner)
    if formula is None:  # PEFT's
        inner = module.model
        formula = _formula(inner)
    assert formula is not None
    if isinstance(output, tuple):
        if len(output) < OUTPUTS:
            return None
        return _loss_of(formula, inner, output[TEXT_IN_TUPLE], output[OTHER_IN_TUPLE]), *output
    text, other = output.text_embeds, output[formula.other]
    if text is None or other is None:  # a call of one tower, which has no loss
        return None
    # Made anew, so that the loss is the first, as transformers has it.
    return type(output)(**{**output, "loss": _loss_of(formula, inner, text, other)})


def _loss_of(formula: Formula, model: Any, text: Tensor, other: Tensor) -> Tensor:
    return formula.loss(model, text, other.to(text.device))
