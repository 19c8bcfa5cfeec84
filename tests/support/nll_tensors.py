"""Tensors for tests of the ops of nll."""

import torch


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
        "logits": logits, "target": target, "weight": None, "num_items": None, "reduction": 1,
        "ignore_index": -100, "label_smoothing": 0.1, "logit_scale": 1.0, "softcap": 0.0,
        "z_loss": 0.0, "stats": True, "backend": "",
    }  # fmt: skip
    return tuple({**arguments, **changes}.values())
