"""Tensors for tests of the ops of nll, and the losses of them that say the same."""

import torch
import torch.utils.checkpoint

import neglog

LOSSES = ("cross_entropy", "masked_cross_entropy", "linear_cross_entropy")


def loss_of(name, logits, target, **options):
    """By each loss the same; linear_cross_entropy gets logits as hidden states of unit weights."""
    if name == "cross_entropy":
        return neglog.cross_entropy(logits, target, **options)
    if name == "masked_cross_entropy":
        return neglog.masked_cross_entropy(logits, target.clamp(min=0), target != -100, **options)
    weight = torch.eye(logits.shape[1], dtype=logits.dtype)
    return neglog.linear_cross_entropy(logits, weight, target, **options)


def large(dtype=torch.float32, rows=200, vocab=1000, seed=3):
    """Logits that fill several threads."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocab, generator=generator, dtype=dtype).mul_(2)
    target = torch.randint(0, vocab, (rows,), generator=generator)
    target[7] = -100
    return logits.requires_grad_(), target


def forward_arguments(requires_grad=True, probabilities=False, **changes):
    """Arguments of the op neglog::nll, in the order of its schema."""
    logits = torch.randn(6, 40, requires_grad=requires_grad)
    target = torch.rand(6, 40) if probabilities else torch.randint(0, 40, (6,))
    arguments = {
        "logits": logits, "target": target, "weight": None, "token_weight": None, "num_items": None,
        "reduction": 1, "ignore_index": -100, "label_smoothing": 0.1, "logit_scale": 1.0,
        "softcap": 0.0, "z_loss": 0.0, "stats": True, "backend": "",
    }  # fmt: skip
    return tuple({**arguments, **changes}.values())


def in_checkpoint(loss_of, logits):
    """The gradient of an eager loss under activation checkpointing, and what each of its forwards
    had formed."""
    formed = []

    def checkpointed(x):
        loss = loss_of(x)
        formed.append(loss.grad_fn.formed)
        return loss

    loss = torch.utils.checkpoint.checkpoint(checkpointed, logits, use_reentrant=False)
    return torch.autograd.grad(loss, logits)[0], formed
