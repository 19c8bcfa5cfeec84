"""Losses of logits, and what trainers compute beside them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import neglog
from tests.support.deferred.given import VOCAB, Case, Given


def rows(x: Tensor) -> Tensor:
    return x.view(-1, VOCAB) if x.is_contiguous() else x.reshape(-1, VOCAB)


def weights(s: Given, dtype: torch.dtype = torch.float32) -> Tensor:
    return s.normal(VOCAB).abs().to(dtype)


def loss_with(**options: Any) -> Case:
    """cross_entropy of rows, some ignored. An option that is a function makes its value."""

    def case(x: Tensor, s: Given) -> Any:
        made = {name: value(x, s) if callable(value) else value for name, value in options.items()}
        return F.cross_entropy(rows(x), s.labels.view(-1), **made)

    return case


def own_weights(x: Tensor, s: Given) -> Tensor:
    return weights(s, x.dtype)


def probabilities(x: Tensor, s: Given) -> Tensor:
    return s.normal(*x.shape).softmax(-1).to(x.dtype)


def soft_loss(**options: Any) -> Case:
    def case(x: Tensor, s: Given) -> Any:
        made = {name: value(x, s) if callable(value) else value for name, value in options.items()}
        return F.cross_entropy(rows(x), rows(probabilities(x, s)), **made)

    return case


def target_that_trains(x: Tensor, s: Given) -> Any:
    target = rows(probabilities(x, s)).requires_grad_()
    return torch.autograd.grad(F.cross_entropy(rows(x), target), target, retain_graph=True)


def causal_lm(x: Tensor, s: Given) -> Any:
    """As transformers' ForCausalLMLoss."""
    labels = F.pad(s.labels, (0, 1), value=-100)[..., 1:].contiguous()
    return (
        F.cross_entropy(
            x.float().view(-1, VOCAB), labels.view(-1), ignore_index=-100, reduction="sum"
        )
        / 7
    )


def old_causal_lm(x: Tensor, s: Given) -> Any:
    shift_logits, shift_labels = x[..., :-1, :].contiguous(), s.labels[..., 1:].contiguous()
    return nn.CrossEntropyLoss()(shift_logits.view(-1, VOCAB), shift_labels.view(-1))


def masked_mean(x: Tensor, s: Given) -> Any:
    """A mask over positions, as supervised fine-tuning of completions has."""
    mask = s.mask.float().view(-1)
    each = F.cross_entropy(rows(x), s.target.view(-1), reduction="none")
    return (each * mask).sum() / mask.sum()


def focal(x: Tensor, s: Given) -> Any:
    each = F.cross_entropy(rows(x), s.target.view(-1), reduction="none")
    return ((1 - torch.exp(-each)) ** 2 * each).mean()


def z_loss(x: Tensor, s: Given) -> Any:
    return F.cross_entropy(rows(x), s.target.view(-1)) + 0.1 * x.logsumexp(-1).square().mean()


def manual_smoothing(x: Tensor, s: Given) -> Any:
    log_probabilities = F.log_softmax(x, dim=-1)
    nll = -log_probabilities.gather(-1, s.target[..., None]).squeeze(-1)
    return 0.9 * nll.mean() - 0.1 * log_probabilities.mean(-1).mean()


def distilled(x: Tensor, s: Given) -> Any:
    """x the student. Logits of both sides are at a temperature."""
    teacher = s.like
    return F.kl_div(F.log_softmax(x / 2, -1), F.softmax(teacher / 2, -1), reduction="batchmean") * 4


def teaching(x: Tensor, s: Given) -> Any:
    student = s.like.requires_grad_()
    loss = F.kl_div(F.log_softmax(student, -1), F.softmax(x.detach(), -1), reduction="sum")
    return torch.autograd.grad(loss, student)


def teaching_with_gradient(x: Tensor, s: Given) -> Any:
    return F.kl_div(
        F.log_softmax(s.like, -1), F.log_softmax(x, -1), log_target=True, reduction="sum"
    )


def jensen_shannon(x: Tensor, s: Given) -> Any:
    own, other = x.log_softmax(-1), s.like.log_softmax(-1)
    mixture = torch.logsumexp(torch.stack([own, other]), 0) - torch.log(torch.tensor(2.0))
    divergence = [
        F.kl_div(mixture, one, log_target=True, reduction="none").sum(-1) for one in (own, other)
    ]
    return sum(divergence).mean() / 2


def selective(x: Tensor, s: Given) -> Any:
    """TRL's log-probabilities of the labels, in its own words for float32."""
    selected = torch.gather(x, -1, s.target[..., None]).squeeze(-1)
    return selected - torch.stack([torch.logsumexp(part, -1) for part in x])


def selective_row_by_row(x: Tensor, s: Given) -> Any:
    found = []
    for part, labels in zip(x, s.target, strict=True):
        found.append(F.log_softmax(part, dim=-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1))
    return torch.stack(found)


def preference(x: Tensor, s: Given) -> Any:
    """DPO's loss of one pair: the first sequence is chosen, the last rejected."""
    each = x.log_softmax(-1).gather(2, s.target.unsqueeze(2)).squeeze(2)
    total = (each * s.mask).sum(-1)
    return -F.logsigmoid(0.1 * (total[0] - total[-1]))


def policy(x: Tensor, s: Given) -> Any:
    each = x.log_softmax(-1).gather(-1, s.target[..., None]).squeeze(-1)
    ratio = torch.exp(each - each.detach() * 0.9)
    return -torch.min(ratio, ratio.clamp(0.8, 1.2)).mean()


def policy_entropy(x: Tensor, s: Given) -> Any:
    probabilities = F.softmax(x, -1)
    return torch.logsumexp(x, -1) - (probabilities * x).sum(-1)


def accuracy(x: Tensor, s: Given) -> Any:
    with torch.no_grad():
        best = x.argmax(-1)
        right = (best == s.target).float().mean().item()
    return F.cross_entropy(rows(x), s.target.view(-1)), right, x.topk(2).indices


def in_chunks(x: Tensor, s: Given) -> Any:
    parts = zip(rows(x).chunk(3), s.target.view(-1).chunk(3), strict=True)
    return sum(F.cross_entropy(one, target, reduction="sum") for one, target in parts)


def one_row_at_a_time(x: Tensor, s: Given) -> Any:
    return torch.stack(
        [F.cross_entropy(r, t) for r, t in zip(rows(x), s.target.view(-1), strict=True)]
    )


def cast_by_autocast(x: Tensor, s: Given) -> Any:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return F.cross_entropy(rows(x), s.target.view(-1)), x.log_softmax(-1)


def without_gradient(x: Tensor, s: Given) -> Any:
    with torch.no_grad():
        return F.cross_entropy(rows(x), s.target.view(-1)), rows(x)


def in_inference_mode(x: Tensor, s: Given) -> Any:
    with torch.inference_mode():
        return F.cross_entropy(rows(x), s.target.view(-1)).item(), x.argmax(-1).tolist()


def nested_modes(x: Tensor, s: Given) -> Any:
    with torch.no_grad():
        view = x[..., :-1, :]
        with torch.enable_grad():
            inner = F.cross_entropy(view.reshape(-1, VOCAB), s.target[..., 1:].reshape(-1))
            outer = F.cross_entropy(rows(x), s.target.view(-1))
    return inner, outer, view.requires_grad


def under_patch(x: Tensor, s: Given) -> Any:
    with neglog.patch_torch():
        return F.cross_entropy(rows(x), s.labels.view(-1)), nn.CrossEntropyLoss()(
            rows(x), s.target.view(-1)
        )


def connectionist(x: Tensor, s: Given) -> Any:
    lengths = torch.full((x.shape[0],), x.shape[1]), torch.full((x.shape[0],), 2)
    return F.ctc_loss(x.log_softmax(-1).transpose(0, 1), s.target[:, :2].clamp(min=1), *lengths)


CASES: dict[str, Case] = {
    # cross_entropy, argument by argument
    "mean": loss_with(),
    "sum": loss_with(reduction="sum"),
    "none": loss_with(reduction="none"),
    "ignore_index": lambda x, s: F.cross_entropy(rows(x), s.target.view(-1), ignore_index=2),
    "ignore_index, sum": loss_with(ignore_index=-100, reduction="sum"),
    "label_smoothing": loss_with(label_smoothing=0.1),
    "label_smoothing, none": loss_with(label_smoothing=0.3, reduction="none"),
    "label_smoothing of all": loss_with(label_smoothing=1.0),
    "weight": loss_with(weight=own_weights),
    "weight, none": loss_with(weight=own_weights, reduction="none"),
    "weight, sum, label_smoothing": loss_with(
        weight=own_weights, reduction="sum", label_smoothing=0.2
    ),
    "weight, label_smoothing": loss_with(weight=own_weights, label_smoothing=0.2),
    "weight of zeros": loss_with(weight=lambda x, s: torch.zeros(VOCAB, dtype=x.dtype)),
    "size_average": loss_with(size_average=False),
    "reduce": loss_with(reduce=False),
    "weight of the wrong size": loss_with(weight=lambda x, s: torch.ones(VOCAB + 1, dtype=x.dtype)),
    "weight of the wrong dtype": loss_with(
        weight=lambda x, s: torch.ones(VOCAB, dtype=torch.float16)
    ),
    "weight of a list": loss_with(weight=[1.0] * VOCAB),
    "reduction of no name": loss_with(reduction="median"),
    "reduction of None": loss_with(reduction=None),
    "label_smoothing of 2": loss_with(label_smoothing=2.0),
    "label_smoothing below 0": loss_with(label_smoothing=-0.1),
    "ignore_index of float": loss_with(ignore_index=1.5),
    "unknown argument": loss_with(softcap=3.0),
    "by keyword": lambda x, s: F.cross_entropy(
        input=rows(x), target=s.labels.view(-1), reduction="sum"
    ),
    "by position": lambda x, s: F.cross_entropy(
        rows(x), s.target.view(-1), own_weights(x, s), None, 1, None, "mean", 0.1
    ),
    "module": lambda x, s: nn.CrossEntropyLoss(
        own_weights(x, s), ignore_index=3, label_smoothing=0.1
    )(rows(x), s.target.view(-1)),
    "module, none": lambda x, s: nn.CrossEntropyLoss(reduction="none")(rows(x), s.labels.view(-1)),
    "all ignored": lambda x, s: F.cross_entropy(rows(x), torch.full_like(s.target.view(-1), -100)),
    "all ignored, sum": lambda x, s: F.cross_entropy(
        rows(x), torch.full_like(s.target.view(-1), -100), reduction="sum"
    ),
    "no rows": lambda x, s: F.cross_entropy(rows(x)[:0], s.target.view(-1)[:0]),
    "one row": lambda x, s: F.cross_entropy(rows(x)[0], s.target.view(-1)[0]),
    "one row at a time": one_row_at_a_time,
    "int32 target": lambda x, s: F.cross_entropy(rows(x), s.target.view(-1).int()),
    "uint8 target": lambda x, s: F.cross_entropy(rows(x), s.target.view(-1).byte()),
    "float target": lambda x, s: F.cross_entropy(rows(x), s.target.view(-1).float()),
    "target of a list": lambda x, s: F.cross_entropy(rows(x), s.target.view(-1).tolist()),
    "target of the wrong size": lambda x, s: F.cross_entropy(rows(x), s.target.view(-1)[:-1]),
    "target of two axes": lambda x, s: F.cross_entropy(rows(x), s.target),
    "target out of range": lambda x, s: F.cross_entropy(rows(x), s.target.view(-1) + VOCAB),
    "target below zero": lambda x, s: F.cross_entropy(rows(x), s.target.view(-1) - VOCAB),
    "target not contiguous": lambda x, s: F.cross_entropy(
        rows(x), torch.stack([s.target.view(-1)] * 2, 1)[:, 0]
    ),
    "target shifted in a view": lambda x, s: F.cross_entropy(
        x[..., :-1, :].reshape(-1, VOCAB), s.labels[..., 1:].reshape(-1)
    ),
    "three axes": lambda x, s: F.cross_entropy(x, s.target),
    "classes second": lambda x, s: F.cross_entropy(x.transpose(1, 2), s.labels),
    "classes second, none": lambda x, s: F.cross_entropy(
        x.transpose(1, 2), s.labels, reduction="none"
    ),
    "classes second, permuted": lambda x, s: F.cross_entropy(
        x.permute(0, 2, 1), s.labels, label_smoothing=0.1
    ),
    "classes second, contiguous": lambda x, s: F.cross_entropy(x.mT.contiguous(), s.labels),
    "classes second, moved": lambda x, s: F.cross_entropy(x.movedim(-1, 1), s.labels),
    "classes second, shifted": lambda x, s: F.cross_entropy(
        x[:, :-1].transpose(-1, -2), s.target[:, 1:]
    ),
    "tokens of each as classes": lambda x, s: F.cross_entropy(
        x[:, :, :5].transpose(0, 1), s.target[:1, :5].expand(5, 5) % 2
    ),
    "probabilities": soft_loss(),
    "probabilities, none": soft_loss(reduction="none"),
    "probabilities, weight, label_smoothing": soft_loss(weight=own_weights, label_smoothing=0.1),
    "probabilities that train": target_that_trains,
    "probabilities from the logits": lambda x, s: F.cross_entropy(rows(x), rows(x).softmax(-1)),
    "probabilities from detached": lambda x, s: F.cross_entropy(
        rows(x), rows(x).detach().softmax(-1)
    ),
    "probabilities, classes second": lambda x, s: F.cross_entropy(
        x.transpose(1, 2), probabilities(x, s).transpose(1, 2)
    ),
    "logits as the target": lambda x, s: F.cross_entropy(s.like.view(-1, VOCAB), rows(x)),
    # neglog's own
    "neglog": lambda x, s: neglog.cross_entropy(rows(x), s.labels.view(-1)),
    "neglog, z_loss": lambda x, s: neglog.cross_entropy(
        rows(x), s.labels.view(-1), z_loss=0.1, softcap=5.0, logit_scale=2.0
    ),
    "neglog, stats": lambda x, s: list(
        neglog.cross_entropy(rows(x), s.labels.view(-1), return_stats=True)
    ),
    "neglog, in place": lambda x, s: neglog.cross_entropy(
        rows(x * 1.5), s.labels.view(-1), inplace_backward=True
    ),
    "neglog, masked": lambda x, s: neglog.masked_cross_entropy(
        rows(x), s.target.view(-1), s.mask.view(-1)
    ),
    "neglog, module": lambda x, s: neglog.nn.CrossEntropyLoss(label_smoothing=0.1)(
        rows(x), s.labels.view(-1)
    ),
    "neglog, logits as hidden": lambda x, s: neglog.linear_cross_entropy(
        x, s.normal(9, VOCAB).to(x.dtype), s.labels
    ),
    "neglog, contrastive": lambda x, s: neglog.info_nce(rows(x), s.like.view(-1, VOCAB)),
    "neglog under torch": under_patch,
    # In pieces
    "nll_loss": lambda x, s: F.nll_loss(F.log_softmax(rows(x), -1), s.labels.view(-1)),
    "nll_loss, weight": lambda x, s: F.nll_loss(
        rows(x).log_softmax(1), s.labels.view(-1), own_weights(x, s), reduction="sum"
    ),
    "nll_loss, none": lambda x, s: F.nll_loss(
        rows(x).log_softmax(-1), s.labels.view(-1), reduction="none"
    ),
    "nll_loss, classes second": lambda x, s: F.nll_loss(
        x.log_softmax(-1).transpose(1, 2), s.labels
    ),
    "nll_loss of logits": lambda x, s: F.nll_loss(rows(x), s.labels.view(-1)),
    "NLLLoss": lambda x, s: nn.NLLLoss(ignore_index=1)(
        nn.LogSoftmax(-1)(rows(x)), s.target.view(-1)
    ),
    "nll_loss, over the wrong axis": lambda x, s: F.nll_loss(
        rows(x).log_softmax(0), s.labels.view(-1)
    ),
    "nll_loss, out of range": lambda x, s: F.nll_loss(
        rows(x).log_softmax(-1), s.target.view(-1) + VOCAB
    ),
    "log_softmax, gather": lambda x, s: (
        x.log_softmax(-1).gather(-1, s.target[..., None]).squeeze(-1)
    ),
    "log_softmax, torch.gather": lambda x, s: torch.gather(
        torch.log_softmax(x, dim=-1), dim=-1, index=s.target.unsqueeze(-1)
    ),
    "log_softmax in float32": lambda x, s: F.log_softmax(x, -1, dtype=torch.float32).gather(
        -1, s.target[..., None]
    ),
    "log_softmax, several": lambda x, s: x.log_softmax(-1).gather(
        -1, torch.stack([s.target, s.target], -1)
    ),
    "log_softmax, indexed": lambda x, s: rows(x).log_softmax(-1)[
        torch.arange(len(rows(x))), s.target.view(-1)
    ],
    "log_softmax, gather out of range": lambda x, s: x.log_softmax(-1).gather(
        -1, s.target[..., None] + VOCAB
    ),
    "log_softmax, gather below zero": lambda x, s: x.log_softmax(-1).gather(
        -1, s.labels[..., None]
    ),
    "log_softmax, gather of rows": lambda x, s: x.log_softmax(-1).gather(
        0, s.target[:1, ..., None] % 2
    ),
    "log_softmax, gather of fewer": lambda x, s: x.log_softmax(-1).gather(
        -1, s.target[:1, ..., None]
    ),
    "log_softmax, twice": lambda x, s: x.log_softmax(-1).log_softmax(-1),
    "log_softmax, in place": lambda x, s: x.log_softmax(-1).mul_(2).gather(-1, s.target[..., None]),
    "log_softmax, exp": lambda x, s: x.log_softmax(-1).exp(),
    "log_softmax, views": lambda x, s: (
        x.log_softmax(-1)[..., :-1, :]
        .reshape(-1, VOCAB)
        .gather(1, s.target[..., 1:].reshape(-1, 1))
    ),
    "log_softmax, sum": lambda x, s: (-x.log_softmax(-1)).sum(-1, keepdim=True),
    "gather and logsumexp": selective,
    "row by row": selective_row_by_row,
    "logsumexp, then gather": lambda x, s: (
        x.logsumexp(-1) - x.gather(-1, s.target[..., None]).squeeze(-1)
    ),
    "logsumexp of a part": lambda x, s: x[..., 1:].logsumexp(-1) - x[..., :-1].logsumexp(-1),
    "log of softmax": lambda x, s: -torch.log(x.softmax(-1)).gather(-1, s.target[..., None]).mean(),
    # Other losses
    "causal LM": causal_lm,
    "old causal LM": old_causal_lm,
    "masked mean": masked_mean,
    "focal": focal,
    "z loss": z_loss,
    "manual smoothing": manual_smoothing,
    "distilled": distilled,
    "teaching": teaching,
    "teaching with gradient": teaching_with_gradient,
    "Jensen-Shannon": jensen_shannon,
    "preference": preference,
    "policy": policy,
    "policy's entropy": policy_entropy,
    "accuracy": accuracy,
    "in chunks": in_chunks,
    "of some positions": lambda x, s: F.cross_entropy(x[s.mask], s.target[s.mask]),
    "of some sequences": lambda x, s: F.cross_entropy(
        x[torch.tensor([1, 1])].reshape(-1, VOCAB), s.target[torch.tensor([1, 1])].view(-1)
    ),
    "of repeated logits": lambda x, s: F.cross_entropy(
        x.expand(3, *x.shape).reshape(-1, VOCAB), s.target.expand(3, *s.target.shape).reshape(-1)
    ),
    "of some classes": lambda x, s: F.cross_entropy(
        x[..., :4].reshape(-1, 4), s.target.view(-1) % 4
    ),
    "of logits with infinity": lambda x, s: F.cross_entropy(
        rows(x).masked_fill(torch.arange(VOCAB) == 6, float("-inf")), s.target.view(-1) % 6
    ),
    "of a sum of logits": lambda x, s: F.cross_entropy(rows(x + s.like), s.target.view(-1)),
    "twice": lambda x, s: (
        F.cross_entropy(rows(x), s.target.view(-1)) + F.cross_entropy(rows(x), s.labels.view(-1))
    ),
    "at two temperatures": lambda x, s: (
        F.cross_entropy(rows(x) / 0.5, s.target.view(-1))
        * F.cross_entropy(rows(x) * 2, s.labels.view(-1))
    ),
    "beside a mean": lambda x, s: (
        F.cross_entropy(rows(x), s.target.view(-1))
        + x.mean()
        + s.hidden.sum()
        + s.head.weight.square().sum()
    ),
    "scaled and softcapped": lambda x, s: F.cross_entropy(
        rows(torch.tanh(x * 2 / 5) * 5 * 0.5), s.target.view(-1)
    ),
    "softcapped twice": lambda x, s: F.cross_entropy(
        rows(torch.tanh(torch.tanh(x) * 2) * 3), s.target.view(-1)
    ),
    "scaled by zero": lambda x, s: F.cross_entropy(rows(x) * 0, s.target.view(-1)),
    "scaled below zero": lambda x, s: F.cross_entropy(-rows(x), s.target.view(-1)),
    "scaled by a parameter": lambda x, s: F.cross_entropy(
        rows(x) * s.head.weight.square().mean(), s.target.view(-1)
    ),
    "bias added": lambda x, s: F.cross_entropy(rows(x) + s.head.weight.sum(1), s.target.view(-1)),
    "bias added to scaled": lambda x, s: F.cross_entropy(
        rows(x) * 3 + torch.arange(VOCAB), s.target.view(-1)
    ),
    "bias added twice": lambda x, s: F.cross_entropy(
        rows(x) + s.normal(VOCAB) + s.normal(VOCAB), s.target.view(-1)
    ),
    "under autocast": cast_by_autocast,
    "without gradient": without_gradient,
    "in inference mode": in_inference_mode,
    "nested modes": nested_modes,
    "mse": lambda x, s: F.mse_loss(x, s.like),
    "l1": lambda x, s: (F.l1_loss(x, s.like), F.smooth_l1_loss(x, s.like), F.huber_loss(s.like, x)),
    "binary": lambda x, s: F.binary_cross_entropy_with_logits(x, probabilities(x, s)),
    "binary of probabilities": lambda x, s: nn.BCELoss()(x.sigmoid(), probabilities(x, s)),
    "margin": lambda x, s: F.multi_margin_loss(rows(x), s.target.view(-1)),
    "several labels": lambda x, s: F.multilabel_soft_margin_loss(
        rows(x), (s.like > 0).to(x.dtype).view(-1, VOCAB)
    ),
    "soft margin": lambda x, s: F.soft_margin_loss(x, s.like.sign()),
    "Poisson": lambda x, s: F.poisson_nll_loss(x, s.like.abs()),
    "connectionist": connectionist,
}
