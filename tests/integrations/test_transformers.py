"""fuse, unfuse and explain: what they change, what they refuse, and what they say."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from neglog import dispatch
from neglog.integrations import transformers as integration
from neglog.integrations.deferred import DeferredLinear
from neglog.integrations.transformers import explain, fuse, patch, unfuse
from tests.support import tiny_models
from tests.support.allocations import largest_allocation

CLASSES = 4096
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 4, "vocab_size": 128}


def built(name: str = "llama", **changes: Any) -> nn.Module:
    return tiny_models.build(name, vocab_size=CLASSES, **changes)[0]


def batch(name: str = "llama") -> dict[str, Tensor]:
    ids, labels = tiny_models.tokens(CLASSES, masked=name == "bert", seed=1)
    return {"input_ids": ids, "labels": labels}


def step(model: nn.Module, given: dict[str, Any] | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    torch.manual_seed(2)
    loss = model(**(given or batch())).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)
    assert found[1].keys() == expected[1].keys()
    largest = max(float(g.abs().max()) for g in expected[1].values())
    for name, gradient in expected[1].items():
        error = (found[1][name] - gradient).abs().max()
        assert error <= 1e-5 * largest, name


def test_patch_is_fuse():
    assert patch is fuse


def test_small_logits_are_made_and_said_so():
    model = fuse(built())
    model.get_output_embeddings().neglog_min_bytes = 2**40
    step(model)
    assert "not deferred: logits below 1.04858e+06 MB, which save nothing (1x)" in explain(model)


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_unfuse_gives_everything_back(name):
    model = built(name)
    classes = [type(module) for module in model.modules()]
    hooks = len(model._forward_pre_hooks)
    assert unfuse(fuse(model, min_bytes=0)) is model
    assert [type(module) for module in model.modules()] == classes
    assert len(model._forward_pre_hooks) == hooks
    assert not any(name.startswith("neglog") for m in model.modules() for name in vars(m))


def test_fused_twice_has_one_hook():
    model = fuse(fuse(built()))
    assert len(model._forward_pre_hooks) == 1
    assert model.get_output_embeddings().neglog_min_bytes == integration.MIN_BYTES


def test_explain_of_each_state():
    model = built()
    assert "lm_head (64 -> 4096): not fused: fuse(model) was not called" in explain(model)
    fuse(model, min_bytes=0)
    model(**batch()).loss.backward()
    assert "deferred; cross_entropy (1x) without logits; logits made by nothing" in explain(model)
    model(**batch()).logits.argmax(-1)
    assert "logits made by argmax (1x)" in explain(model)
    assert "under torch.compile" not in explain(model)
    assert "BertForMaskedLM calls torch.nn.CrossEntropyLoss" in explain(fuse(built("bert")))


@pytest.mark.parametrize("model", [None, 3, "bert-base-uncased", torch.zeros(2)])
def test_no_model(model):
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got \w+"):
        fuse(model)


def with_layer(change: Any) -> nn.Module:
    model = built()
    change(model)
    return model


def of_own_forward(model: nn.Module) -> None:
    class Head(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    model.lm_head.__class__ = Head


def quantised(model: nn.Module) -> None:
    model.lm_head._parameters["weight"] = nn.Parameter(
        torch.zeros(CLASSES, 32, dtype=torch.int8), requires_grad=False
    )


def of_zero3(model: nn.Module) -> None:
    model.lm_head.weight.ds_id = 4


def replaced(model: nn.Module) -> None:
    model.lm_head.forward = lambda x: x


def of_subclass(model: nn.Module) -> None:
    class Weight(torch.Tensor):
        pass

    model.lm_head._parameters["weight"] = torch.zeros(CLASSES, 32).as_subclass(Weight)


REFUSED = {
    "has a forward of its own": of_own_forward,
    "its weight is quantised (torch.int8)": quantised,
    "a part of ZeRO-3": of_zero3,
    "its forward was replaced on the instance": replaced,
    "its weight is a Weight, no plain tensor": of_subclass,
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refused_with_a_reason(reason):
    model = with_layer(REFUSED[reason])
    with pytest.raises(TypeError, match="lm_head cannot be fused") as raised:
        fuse(model)
    assert reason in str(raised.value)
    assert fuse(model, strict=False) is model
    assert reason in explain(model)
    assert not any(isinstance(module, DeferredLinear) for module in model.modules())


def test_model_without_a_loss():
    model = BertModel(BertConfig(**SMALL))
    with pytest.raises(ValueError, match="expected one with an output layer"):
        fuse(model)
    assert "left as it is" in explain(fuse(model, strict=False))


@pytest.mark.parametrize("mean_resizing", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_resized_embeddings(tied, mean_resizing):
    model = fuse(built(tie_word_embeddings=tied), min_bytes=0)
    model.resize_token_embeddings(CLASSES + 8, mean_resizing=mean_resizing)
    plain = unfuse(copy.deepcopy(model))
    with dispatch.record() as ran:
        found = step(model)
    assert any(op.startswith("linear_nll:") for op in ran)
    assert_same(found, step(plain))


ADAPTERS = {
    "elsewhere": {"target_modules": ["q_proj"]},
    "on the head": {"target_modules": ["q_proj", "lm_head"]},
    "on the head alone, scaled": {"target_modules": ["lm_head"], "lora_alpha": 20},
    "on the head, rslora": {"target_modules": ["lm_head"], "use_rslora": True},
    "head saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


def adapted(model: nn.Module, options: dict[str, Any]) -> nn.Module:
    torch.manual_seed(5)
    wrapped = get_peft_model(model, LoraConfig(r=4, task_type="CAUSAL_LM", **options))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return wrapped


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("options", ADAPTERS.values(), ids=ADAPTERS.keys())
def test_peft(options, order, monkeypatch):
    monkeypatch.setenv("NEGLOG_WORKSPACE_MB", "1")
    expected = step(adapted(built(), options))
    model = built()
    model = (
        adapted(fuse(model, min_bytes=0), options)
        if order == "before"
        else fuse(adapted(model, options), min_bytes=0)
    )
    with dispatch.record() as ran:
        found = step(model)
    assert ran
    assert "logits made by nothing" in explain(model)
    assert_same(found, expected)


def test_adapter_of_the_head_forms_no_weight():
    """Neither logits (rows, V) at once nor (V, D): both are larger than a chunk of rows."""
    torch.manual_seed(0)
    model = built(hidden_size=256, num_hidden_layers=1)
    model = fuse(adapted(model, ADAPTERS["on the head"]), min_bytes=0)
    given = batch()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("neglog.integrations.deferred.chunks.CHUNK_BYTES", 2**17)
        largest = largest_allocation(lambda: model(**given).loss.backward())
    assert largest < CLASSES * 256 * 4 / 4
    assert largest < given["input_ids"].numel() * CLASSES * 4 / 4


def test_adapters_switched_and_merged():
    model = fuse(adapted(built(), ADAPTERS["on the head"]), min_bytes=0)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["lm_head"]))
    model.set_adapter("other")
    plain = unfuse(copy.deepcopy(model))
    assert_same(step(model), step(plain))
    merged = model.merge_and_unload()
    with dispatch.record() as ran:
        merged.get_output_embeddings().weight.requires_grad_()
        found = step(merged)
    assert any(op.startswith("linear_nll:") for op in ran)
    assert_same(found, step(unfuse(merged)))


def saved(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("copied", [copy.deepcopy, saved])
def test_copies_stay_fused_after_a_resize(copied):
    model = copied(fuse(built(), min_bytes=0))
    model.resize_token_embeddings(CLASSES + 8, mean_resizing=False)
    with dispatch.record() as ran:
        step(model)
    assert any(op.startswith("linear_nll:") for op in ran)


CLASSIFIERS = {
    "sequence": (BertForSequenceClassification, BertConfig, torch.tensor([1, 2])),
    "tokens": (BertForTokenClassification, BertConfig, torch.arange(32).view(2, 16) % 5),
    "decoder": (LlamaForSequenceClassification, LlamaConfig, torch.tensor([1, 2])),
}


@pytest.mark.parametrize("name", CLASSIFIERS)
@pytest.mark.parametrize("min_bytes", [0, integration.MIN_BYTES])
def test_classification(name, min_bytes):
    kind, config, labels = CLASSIFIERS[name]
    torch.manual_seed(0)
    model = kind(config(**SMALL, num_labels=5, pad_token_id=0))
    given = {"input_ids": torch.arange(1, 33).view(2, 16), "labels": labels}
    expected = step(model, given)
    with dispatch.record() as ran:
        found = step(fuse(model, min_bytes=min_bytes), given)
    assert any(op.startswith("linear_nll:") for op in ran) == (min_bytes == 0)
    assert_same(found, expected)


@pytest.mark.parametrize("labels", [torch.randn(2, 5), torch.tensor([[1.0, 0, 0, 1, 0]] * 2)])
def test_regression_and_many_labels(labels):
    """Their losses read the logits."""
    torch.manual_seed(0)
    kinds = {True: "multi_label_classification", False: "regression"}
    config = BertConfig(**SMALL, num_labels=5, problem_type=kinds[bool((labels >= 0).all())])
    model = BertForSequenceClassification(config)
    given = {"input_ids": torch.arange(1, 33).view(2, 16), "labels": labels}
    expected = step(model, given)
    assert_same(step(fuse(model, min_bytes=0), given), expected)
    assert "logits made by" in explain(model)
    assert "logits made by nothing" not in explain(model)


def test_own_loss_of_logits_that_were_read_first():
    """Made once, and used: no second product with the weight."""
    model = fuse(built(), min_bytes=0)
    given = batch()
    labels = given.pop("labels")
    logits = model(**given).logits
    accuracy = (logits.argmax(-1) == labels).float().mean()
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    loss.backward()
    expected = unfuse(model)(**given).logits
    assert accuracy == (expected.argmax(-1) == labels).float().mean()
    assert torch.equal(loss, F.cross_entropy(expected.flatten(0, 1), labels.flatten()))
