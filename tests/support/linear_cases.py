"""Inputs of linear_cross_entropy, and the same loss with all logits in memory."""

import torch
import torch.nn.functional as F

import neglog


def draw(rows=300, features=24, vocab=1000, dtype=torch.float64, seed=0):
    """Input, weight and bias that require grad; a target with a third of its rows ignored."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    head = (normal(rows, features), normal(vocab, features) / 3, normal(vocab))
    head = tuple(part.to(dtype).requires_grad_() for part in head)
    target = torch.randint(vocab, (rows,), generator=generator)
    target[::3] = -100
    return *head, target


def in_memory(input, linear_weight, target, *, linear_bias=None, **options):
    return neglog.cross_entropy(F.linear(input, linear_weight, linear_bias), target, **options)


def gradients(loss, inputs):
    upstream = torch.linspace(0.5, 2, loss.numel(), dtype=loss.dtype).view(loss.shape)
    return torch.autograd.grad(loss, inputs, upstream)


def trained(rows=2048, features=32, vocab=4096, dtype=torch.float64):
    """A head that is sure of a few classes for each row, as a trained one is."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(vocab, features, generator=generator, dtype=torch.float64)
    target = torch.randint(vocab // 4, (rows,), generator=generator)  # most classes never occur
    input = weight[target] + 0.1 * torch.randn(rows, features, generator=generator).double()
    bias = torch.zeros(vocab, dtype=torch.float64)
    head = tuple(part.to(dtype).requires_grad_() for part in (input, weight, bias))
    return *head, target


def loss_and_gradients(x, w, b, target, upstream=None, **options):
    loss = neglog.linear_cross_entropy(x, w, target, linear_bias=b, **options)
    return loss, *torch.autograd.grad(loss, (x, w, b), upstream)
