"""Students, teachers, and losses of distillation as trainers write them in torch."""

import torch
import torch.nn.functional as F

INF = float("inf")


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def taught(kind, shape, dtype=torch.float64, seed=1, count=5):
    """A teacher of logits (..., C), and the arguments that say what it is."""
    logits = normal(*shape, seed=seed) * 2
    if kind == "logits":
        return {"teacher": logits.to(dtype)}
    if kind == "probabilities":
        return {"teacher": logits.softmax(-1).to(dtype), "teacher_probabilities": True}
    found = logits.log_softmax(-1).topk(min(count, shape[-1]), -1)
    return {"teacher": found.values.to(dtype), "teacher_ids": found.indices}


def case(*shape, dtype=torch.float64, seed=0):
    """A student's logits, a target of which some do not count, and weights of positions."""
    logits = (normal(*shape, seed=seed) * 2).to(dtype).requires_grad_()
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(shape[-1], shape[:-1], generator=generator)
    target.view(-1)[1::4] = -100
    weight = normal(*shape[:-1], seed=seed + 7)
    weight.view(-1)[2::5] = 0
    return logits, target, weight


def divergence(log_p, log_q, beta):
    """As trainers write it in torch."""
    if beta == 0:
        return F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)
    if beta == 1:
        return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    share = torch.tensor(beta, dtype=log_p.dtype)
    mixture = torch.logsumexp(
        torch.stack([log_p + torch.log1p(-share), log_q + torch.log(share)]), dim=0
    )
    of_teacher = F.kl_div(mixture, log_q, reduction="none", log_target=True).sum(-1)
    of_student = F.kl_div(mixture, log_p, reduction="none", log_target=True).sum(-1)
    return share * of_teacher + (1 - share) * of_student


def in_bins(logits, teacher, ids):
    """Log-probabilities of the named classes, and of all others as one."""
    log_p = logits.log_softmax(-1)
    others = log_p.scatter(-1, ids, -INF).logsumexp(-1, keepdim=True)
    rest = torch.log1p(-teacher.exp().sum(-1, keepdim=True))
    return torch.cat([log_p.gather(-1, ids), others], -1), torch.cat([teacher, rest], -1)


def plain(logits, given, beta, temperature=1.0):
    teacher = given["teacher"].to(logits.dtype)
    if "teacher_ids" in given:
        return divergence(*in_bins(logits / temperature, teacher, given["teacher_ids"]), beta)
    teacher = teacher.log() if "teacher_probabilities" in given else teacher
    log_p, log_q = ((x / temperature).log_softmax(-1) for x in (logits, teacher))
    return divergence(log_p, log_q, beta)


def head_case(dtype=torch.float64, rows=(4, 9), features=6, vocab=53, of_teacher=4):
    hidden, weight, bias = normal(*rows, features), normal(vocab, features, seed=2), normal(vocab)
    student = [x.to(dtype).requires_grad_() for x in (hidden, weight, bias)]
    states, head, shift = normal(*rows, of_teacher, seed=3), normal(vocab, of_teacher, seed=4), 0.1
    teacher = (states.to(dtype), head.to(dtype), (normal(vocab, seed=5) + shift).to(dtype))
    target = torch.randint(vocab, rows, generator=torch.Generator().manual_seed(0))
    target.view(-1)[::5] = -100
    return student, teacher, target


def linear_given(kind, teacher):
    """The arguments of each form, and those of kl_div_loss that say the same."""
    states, head, bias = teacher
    scores = F.linear(states, head, bias)
    if kind == "hidden states":
        return {"teacher": states, "teacher_weight": head, "teacher_bias": bias}, {
            "teacher": scores
        }
    if kind == "named":
        found = scores.double().log_softmax(-1).topk(4, -1)
        given = {"teacher": found.values.to(states.dtype), "teacher_ids": found.indices}
    elif kind == "probabilities":
        given = {"teacher": scores.softmax(-1), "teacher_probabilities": True}
    else:
        given = {"teacher": scores}
    return given, given
