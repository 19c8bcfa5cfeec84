"""transformers' dual encoders: their own loss by neglog, beside the loss that they make."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from neglog import dispatch
from neglog.integrations import contrastive_models
from neglog.integrations.transformers import explain, fuse, unfuse

ROWS, LENGTH, SIZE = 6, 8, 32
TEXT = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
VISION = {
    "image_size": SIZE, "patch_size": 8, "hidden_size": 32, "intermediate_size": 37,
    "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
BOTH: dict[str, Any] = {"text_config": TEXT, "vision_config": VISION, "projection_dim": 16}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "CLIPModel": ("CLIPConfig", BOTH),
    "MetaClip2Model": ("MetaClip2Config", BOTH),
    "SiglipModel": ("SiglipConfig", BOTH),
    "ChineseCLIPModel": ("ChineseCLIPConfig", BOTH),
    "AltCLIPModel": ("AltCLIPConfig", {**BOTH, "text_config": {**TEXT, "project_dim": 32}}),
    "BlipModel": ("BlipConfig", BOTH),
    "CLIPSegModel": ("CLIPSegConfig", BOTH),
    "OwlViTModel": ("OwlViTConfig", BOTH),
}


def built(name: str) -> nn.Module:
    config, options = CONFIGS[name]
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, config)(**copy.deepcopy(options)))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train()


def inputs() -> dict[str, Any]:
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 99, (ROWS, LENGTH), generator=random)
    ids[:, -1] = 2
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(ROWS, 3, SIZE, SIZE, generator=random),
    }


def step(model: nn.Module, **options: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    torch.manual_seed(2)  # of dropout
    out = model(**inputs(), return_loss=True, **options)
    loss = out[0] if isinstance(out, tuple) else out.loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)
    assert found[1].keys() == expected[1].keys()
    largest = max(float(g.abs().max()) for g in expected[1].values())
    for name, gradient in expected[1].items():
        assert (found[1][name] - gradient).abs().max() <= 1e-5 * largest, name


@pytest.mark.parametrize("options", [{}, {"return_dict": False}], ids=["dict", "tuple"])
@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_gradients(name, options):
    model = built(name)
    expected = step(model, **options)
    assert fuse(model) is model
    assert "by neglog" in explain(model)
    with dispatch.record() as ran:
        found = step(model, **options)
    assert ran
    assert_same(found, expected)
    assert_same(step(unfuse(model), **options), expected)
    assert "can be fused, and is not" in explain(model)


def test_outputs_are_the_same_but_for_the_loss():
    model = built("CLIPModel")
    expected = model(**inputs(), return_loss=True)
    found = fuse(model)(**inputs(), return_loss=True)
    assert type(found) is type(expected)
    assert list(found) == list(expected)
    for name in ("logits_per_image", "logits_per_text", "text_embeds", "image_embeds"):
        assert torch.equal(found[name], expected[name])
    assert model(**inputs()).loss is None
    assert model(**inputs(), return_loss=False).loss is None


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_is_fused_too(copied):
    model = copied(fuse(built("SiglipModel")))
    with dispatch.record() as ran:
        step(model)
    assert ran


def test_saved_files_are_those_of_an_unfused_model(tmp_path):
    model = fuse(built("CLIPModel"))
    model.save_pretrained(tmp_path)
    loaded = transformers.CLIPModel.from_pretrained(tmp_path).train()
    assert_same(step(loaded), step(unfuse(model)))


def test_compiled():
    expected = step(built("CLIPModel"))
    model = fuse(built("CLIPModel"))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    with dispatch.record() as ran:
        loss = compiled(**inputs(), return_loss=True).loss
    assert ran
    torch.testing.assert_close(loss, expected[0], rtol=1e-5, atol=1e-6)


def test_autocast():
    model = built("CLIPModel")
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(**inputs(), return_loss=True).loss
        found = fuse(model)(**inputs(), return_loss=True).loss
    torch.testing.assert_close(found.float(), expected.float(), rtol=1e-2, atol=1e-2)


def test_a_loss_that_is_another_is_refused_with_a_reason():
    name, reason = next(iter(contrastive_models.REASONS.items()))
    kind = getattr(transformers, name)
    model = kind.__new__(kind)
    nn.Module.__init__(model)
    assert explain(model) == f"{name}\n  {name}: not fused: {reason}"
    with pytest.raises(ValueError, match="not fused"):
        fuse(model)
    assert fuse(model, strict=False) is model


def test_every_formula_is_of_a_class_that_transformers_has():
    for name in [*contrastive_models.FORMULAS, *contrastive_models.REASONS]:
        assert hasattr(transformers, name), name
