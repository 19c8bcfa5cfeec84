"""Training a fused model and an unfused one: the same losses, step by step.

Four models, by where their loss comes from: Llama (transformers' loss functions, a head of its
own), GPT-2 (the same, tied), BERT (nn.CrossEntropyLoss in its forward, a bias) and T5 (hidden
states scaled before the head).
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neglog import dispatch
from tests.support import tiny_models
from tests.support.fused_models import fuse, logits_made

CLASSES, STEPS, PARTS = 4096, 6, 2
MODELS = ["llama", "gpt2", "bert", "t5"]
DECODERS = ["llama", "gpt2"]  # they take num_items_in_batch, logits_to_keep and shift_labels
FLOAT32 = 1e-4  # relative, of losses
# Unfused logits are rounded to bfloat16, fused ones are not: 2**-9 of a logit. A loss that is a
# bfloat16 itself, as BERT's and T5's are, has steps of 2**-8.
# Six steps of AdamW in bfloat16 multiply it.
BFLOAT16 = {"llama": 2e-3, "gpt2": 2e-3, "bert": 3e-2, "t5": 1e-2}

Loss = Callable[[nn.Module, dict[str, Any]], Tensor]


def own_loss(model: nn.Module, given: dict[str, Any]) -> Tensor:
    return model(**given).loss


def build(name: str, *, fused: bool, **changes: Any) -> nn.Module:
    model, _ = tiny_models.build(name, vocab_size=CLASSES, **changes)
    return fuse(model) if fused else model


def batch(name: str, seed: int = 1) -> dict[str, Any]:
    ids, labels = tiny_models.tokens(CLASSES, masked=name == "bert", seed=seed)
    return {"input_ids": ids, "labels": labels}


def losses(name: str, model: nn.Module, loss_of: Loss = own_loss, context: Any = None) -> Tensor:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    found = []
    for step in range(STEPS):
        for part in range(PARTS):  # gradients accumulate
            with context or nullcontext():
                loss = loss_of(model, batch(name, seed=PARTS * step + part))
            (loss / PARTS).backward()
            found.append(loss.detach().double())
        optimizer.step()
        optimizer.zero_grad()
    return torch.stack(found)


def assert_alike(
    name: str,
    loss_of: Loss = own_loss,
    *,
    tolerance: float = FLOAT32,
    prepare: Callable[[nn.Module], Any] = lambda model: None,
    context: Any = None,
    **changes: Any,
) -> None:
    plain, fused = (build(name, fused=fused, **changes) for fused in (False, True))
    prepare(plain), prepare(fused)
    expected = losses(name, plain, loss_of, context)
    with dispatch.record() as ran, logits_made(fused) as made:
        found = losses(name, fused, loss_of, context)
    assert sum(op.startswith("linear_nll:") for op in ran) >= STEPS * PARTS
    assert made == []
    assert not torch.equal(expected[:PARTS], expected[-PARTS:])
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=0)


@pytest.mark.parametrize("name", MODELS)
def test_float32(name):
    assert_alike(name)


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16(name):
    assert_alike(name, prepare=lambda model: model.bfloat16(), tolerance=BFLOAT16[name])


@pytest.mark.parametrize("name", MODELS)
def test_autocast(name):
    context = torch.autocast("cpu", dtype=torch.bfloat16)
    assert_alike(name, context=context, tolerance=BFLOAT16[name])


@pytest.mark.parametrize("name", MODELS)
def test_gradient_checkpointing(name):
    assert_alike(name, prepare=lambda model: model.gradient_checkpointing_enable())


def test_tied_weights():
    assert_alike("llama", tie_word_embeddings=True)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("count", [int, torch.tensor])
def test_num_items_in_batch(name, count):
    def loss_of(model, given):
        items = int((given["labels"][:, 1:] != -100).sum())
        return model(**given, num_items_in_batch=count(items)).loss

    assert_alike(name, loss_of)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("kept", ["number", "indices", "mask"])
def test_logits_to_keep(name, kept):
    mask = torch.arange(tiny_models.LENGTH) >= tiny_models.LENGTH - 40
    keep = {"number": 40, "indices": mask.nonzero()[:, 0], "mask": mask}[kept]

    def loss_of(model, given):
        labels = given.pop("labels")
        logits = model(**given, logits_to_keep=keep).logits
        assert logits.shape == (tiny_models.BATCH, 40, CLASSES)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, -39:].flatten())

    assert_alike(name, loss_of)


@pytest.mark.parametrize("name", DECODERS)
def test_shift_labels(name):
    def loss_of(model, given):
        shifted = F.pad(given["labels"], (0, 1), value=-100)[:, 1:]
        return model(**given, shift_labels=shifted.contiguous()).loss

    assert_alike(name, loss_of)


@pytest.mark.parametrize("name", MODELS)
def test_own_loss_of_logits(name):
    """As a user writes it: shift, contiguous, view, and a criterion with an option."""
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)

    def loss_of(model, given):
        labels = given.pop("labels")
        if name == "t5":
            given["decoder_input_ids"] = given["input_ids"]
        logits = model(**given).logits[..., :-1, :].contiguous()
        target = labels[..., 1:].contiguous()
        return criterion(logits.view(-1, logits.size(-1)), target.view(-1))

    assert_alike(name, loss_of)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_generation_and_evaluation_beside_training(name):
    """Both between two trainings, of equal models: the same tokens; logits are a Tensor."""
    results = []
    for fused in (False, True):
        model = build(name, fused=fused)
        found = []
        for _ in range(2):
            model.eval()
            prompt = batch(name)["input_ids"][:, :8]
            found.append(model.generate(prompt, max_new_tokens=6, do_sample=False))
            with torch.no_grad():
                out = model(**batch(name))
            assert type(out.logits) is Tensor
            found += [out.loss, out.logits.softmax(-1).amax(-1)]
            losses(name, model.train())
        results.append(found)
    for plain, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-5)


def assert_fused(name: str, model: nn.Module) -> Tensor:
    given = batch(name)
    given = {key: value.clamp(max=model.config.vocab_size - 1) for key, value in given.items()}
    with dispatch.record() as ran, logits_made(model) as made:
        loss = model(**given).loss
        loss.backward()
    assert any(op.startswith("linear_nll:") for op in ran)
    assert made == []
    return loss.detach()


def saved(copied: nn.Module, path: Any) -> nn.Module:
    torch.save(copied, path / "model.pt")
    return torch.load(path / "model.pt", weights_only=False)


COPIES = {
    "deepcopy": lambda model, path: copy.deepcopy(model),
    "pickle": lambda model, path: pickle.loads(pickle.dumps(model)),
    "torch.save": saved,
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", MODELS)
def test_a_copy_is_fused_too(name, how, tmp_path):
    model = build(name, fused=True)
    made = COPIES[how](model, tmp_path)
    assert torch.equal(assert_fused(name, made), assert_fused(name, model))


@pytest.mark.parametrize("name", MODELS)
def test_pretrained_files_are_those_of_an_unfused_model(name, tmp_path):
    plain, model = (build(name, fused=fused) for fused in (False, True))
    assert list(model.state_dict()) == list(plain.state_dict())
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation="eager").train()
    expected = loaded(**batch(name)).loss.detach()
    torch.testing.assert_close(assert_fused(name, fuse(loaded)), expected, rtol=FLOAT32, atol=0)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("classes", [CLASSES + 64, CLASSES - 64])
def test_resized_embeddings_stay_fused(name, classes):
    results = []
    for fused in (False, True):
        model = build(name, fused=fused)
        torch.manual_seed(3)  # of new rows
        model.resize_token_embeddings(classes, mean_resizing=False)
        assert model.get_output_embeddings().weight.shape[0] == classes
        if fused:
            results.append(assert_fused(name, model))
        else:
            given = {k: v.clamp(max=classes - 1) for k, v in batch(name).items()}
            results.append(model(**given).loss.detach())
    torch.testing.assert_close(results[1], results[0], rtol=FLOAT32, atol=0)


@pytest.mark.parametrize("name", MODELS)
def test_compiled(name):
    """In one graph, where the unfused model is one, by a backend that keeps torch's own kernels.

    BERT and T5 call nn.CrossEntropyLoss, which Dynamo gives to nothing but a Tensor: their heads
    may make logits when they are compiled, and the loss is the same.
    """
    found = []
    for fused in (False, True):
        torch._dynamo.reset()
        model = build(name, fused=fused)
        model.loss_type = model.loss_type or "ForCausalLM"  # a default that is logged: no graph
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        with dispatch.record() as ran:
            found.append(losses(name, compiled))
        ours = any(op.startswith("linear_nll:") for op in ran)
        assert ours == (fused and name in DECODERS)
    torch.testing.assert_close(found[1], found[0], rtol=FLOAT32, atol=0)
