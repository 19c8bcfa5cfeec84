"""logits_dtype: logits of a head in 16 bits that are not rounded to them."""

import pytest
import torch
import torch.nn.functional as F

import neglog

ROWS, WIDTH, VOCAB = 64, 32, 700
FORMS = ["index", "probabilities", "many dimensions", "token_logprobs", "kl"]


def case(dtype, seed=0):
    """A head whose logits are large, so that 16 bits round them much."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(ROWS, WIDTH, generator=generator) * 4
    weight, bias = torch.randn(VOCAB, WIDTH, generator=generator), torch.randn(VOCAB)
    target = torch.randint(VOCAB, (ROWS,), generator=generator)
    return [x.to(dtype).requires_grad_() for x in (hidden, weight, bias)], target


def ours(form, head, target, **options):
    """A loss of each form, float32, that is a number."""
    hidden, weight, bias = head
    if form == "token_logprobs":
        found = neglog.linear_token_logprobs(hidden, weight, target, linear_bias=bias, **options)
        return found.logprob.mean() + 0.1 * found.entropy.mean()
    options["loss_dtype"] = torch.float32
    if form == "kl":
        teacher = {"teacher_weight": weight.detach().flip(0), "beta": 0.5}
        states = hidden.detach().flip(0)
        return neglog.linear_kl_div_loss(
            hidden, weight, states, linear_bias=bias, **teacher, **options
        )
    if form == "many dimensions":
        shape = (VOCAB // 7, 7)
        return neglog.linear_cross_entropy(
            hidden, weight.view(*shape, WIDTH), target[:, None] % shape[0] + torch.zeros(7).long(),
            linear_bias=bias.view(shape), **options,
        )  # fmt: skip
    if form == "probabilities":
        target = F.one_hot(target, VOCAB).to(hidden.dtype)
    return neglog.linear_cross_entropy(hidden, weight, target, linear_bias=bias, **options)


def gradients(loss, head):
    return torch.autograd.grad(loss, head)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_the_product_of_16_bit_numbers_is_not_rounded(backend, form, dtype):
    head, target = case(dtype)
    wide = [x.detach().double().requires_grad_() for x in head]
    exact = ours(form, wide, target)
    for logits_dtype in (torch.float32, "float32"):
        loss = ours(form, head, target, logits_dtype=logits_dtype, backend=backend)
        torch.testing.assert_close(loss.double(), exact.double(), rtol=2e-6, atol=2e-6)
    info = torch.finfo(dtype)
    rounded = [
        info.eps * g.norm() + info.smallest_normal * info.eps * g.numel() ** 0.5
        for g in gradients(exact, wide)
    ]
    for found, truth, budget in zip(
        gradients(loss, head), gradients(ours(form, wide, target), wide), rounded, strict=True
    ):
        assert found.dtype == dtype
        assert (found.double() - truth).norm() < budget


def test_the_tile_that_it_asks_for():
    head, target = case(torch.bfloat16)
    where = neglog.explain(neglog.linear_cross_entropy, head[0], head[1], target,
                           logits_dtype="float32")  # fmt: skip
    assert where.tile_dtype == torch.float32


@pytest.mark.parametrize("form", ["index", "token_logprobs"])
def test_under_autocast(backend, form):
    """The numbers are rounded to 16 bits, and their products are not."""
    head, target = case(torch.float32)
    exact = ours(form, [x.bfloat16().double() for x in head], target)
    with torch.autocast("cpu", torch.bfloat16):
        loss = ours(form, head, target, logits_dtype="float32", backend=backend)
    torch.testing.assert_close(loss.double(), exact.double(), rtol=2e-6, atol=2e-6)
    assert {g.dtype for g in gradients(loss, head)} == {torch.float32}


def test_the_loss_keeps_its_dtype(backend):
    head, target = case(torch.bfloat16)
    loss = neglog.linear_cross_entropy(*head[:2], target, logits_dtype="float32", backend=backend)
    assert loss.dtype == torch.bfloat16


WRONG = {
    "a name": (TypeError, "logits_dtype: expected a torch.dtype, 'float32' or None", "float64"),
    "wider": (ValueError, "logits_dtype: expected torch.bfloat16, that of", torch.float64),
    "other bits": (ValueError, "logits_dtype: expected torch.bfloat16, that of", torch.float16),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_errors(wrong):
    error, message, logits_dtype = wrong
    head, target = case(torch.bfloat16)
    with pytest.raises(error, match=message):
        neglog.linear_cross_entropy(*head[:2], target, logits_dtype=logits_dtype)
    wide, target = case(torch.float32)
    with pytest.raises(ValueError, match=r"logits_dtype: expected torch.float32, that of"):
        neglog.linear_cross_entropy(*wide[:2], target, logits_dtype=torch.float64)
