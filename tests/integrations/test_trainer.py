"""transformers' Trainer and TRL's: logs of a fused model and of an unfused one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from neglog import dispatch
from neglog.integrations.transformers import explain
from tests.support import tiny_models
from tests.support.fused_models import fuse

CLASSES, EXAMPLES, STEPS = 1024, 24, 6


def built(name: str, fused: bool) -> nn.Module:
    torch._dynamo.reset()
    model, _ = tiny_models.build(name, vocab_size=CLASSES)
    model.loss_type = model.loss_type or "ForCausalLM"  # what it falls back to, and logs
    return fuse(model) if fused else model


def examples(name: str) -> list[dict[str, Any]]:
    """Of unlike lengths, so that batches have unlike numbers of tokens that count."""
    random = np.random.default_rng(3)
    found = []
    for _ in range(EXAMPLES):
        ids = random.integers(3, CLASSES, 32)
        labels = ids.copy()
        labels[: random.integers(1, 28)] = -100
        found.append({"input_ids": ids, "labels": labels})
    return found


def accuracy(prediction: Any) -> dict[str, float]:
    hit = prediction.predictions == prediction.label_ids
    return {"accuracy": float(hit[prediction.label_ids != -100].mean())}


def logs(name: str, fused: bool, folder: Any, **options: Any) -> list[dict[str, float]]:
    arguments = TrainingArguments(
        output_dir=str(folder / str(fused)), max_steps=STEPS, per_device_train_batch_size=2,
        gradient_accumulation_steps=2, logging_steps=1, learning_rate=1e-3, report_to=[],
        save_strategy="no", use_cpu=True, seed=5, dataloader_num_workers=0, disable_tqdm=True,
        **{"eval_strategy": "steps", "eval_steps": 3, **options},
    )  # fmt: skip
    data = examples(name)
    trainer = Trainer(
        built(name, fused), arguments, train_dataset=data, eval_dataset=data[:4],
        compute_metrics=accuracy,
        preprocess_logits_for_metrics=lambda logits, labels: (
            logits[0] if isinstance(logits, tuple) else logits
        ).argmax(-1),
    )  # fmt: skip
    with dispatch.record() as ran:
        trainer.train()
    assert any(op.startswith("linear_nll:") for op in ran) == fused
    if fused and "torch_compile" not in options:
        assert "logits made by nothing" in explain(trainer.model)
    return [strip(log) for log in trainer.state.log_history]


def strip(log: dict[str, float]) -> dict[str, float]:
    return {k: v for k, v in log.items() if not k.endswith(("_runtime", "_per_second", "flos"))}


def assert_alike(found: list[dict[str, float]], expected: list[dict[str, float]], rtol: float):
    assert [log.keys() for log in found] == [log.keys() for log in expected]
    for one, other in zip(found, expected, strict=True):
        for key, value in other.items():
            wide = 50 if key == "grad_norm" and rtol > 1e-3 else 1
            assert one[key] == pytest.approx(value, rel=rtol * wide, abs=1e-6), key


RUNS: dict[str, tuple[str, dict[str, Any], float]] = {
    "Llama": ("llama", {}, 1e-4),
    "BERT": ("bert", {}, 1e-4),
    "T5": ("t5", {}, 1e-4),
    "label_smoothing_factor": ("llama", {"label_smoothing_factor": 0.1}, 1e-4),
    "label_smoothing_factor, BERT": ("bert", {"label_smoothing_factor": 0.1}, 1e-4),
    "gradient_checkpointing": ("llama", {"gradient_checkpointing": True}, 1e-4),
    "average_tokens_across_devices": ("gpt2", {"average_tokens_across_devices": False}, 1e-4),
    "bf16": ("llama", {"bf16": True}, 1e-2),
    "torch_compile": (
        "llama",
        {"torch_compile": True, "torch_compile_backend": "aot_eager", "eval_strategy": "no"},
        1e-4,
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("run", RUNS)
def test_trainer(run, tmp_path):
    name, options, tolerance = RUNS[run]
    expected = logs(name, False, tmp_path, **options)
    assert len(expected) >= STEPS
    assert_alike(logs(name, True, tmp_path, **options), expected, tolerance)


def tokenizer() -> Any:
    from tokenizers import Tokenizer as Fast
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(CLASSES)}
    fast = Fast(WordLevel(words, unk_token="w3"))
    return PreTrainedTokenizerFast(
        tokenizer_object=fast, pad_token="w0", bos_token="w1", eos_token="w2", unk_token="w3"
    )


def sft(fused: bool, folder: Any, **options: Any) -> list[dict[str, float]]:
    data = Dataset.from_list([{"input_ids": e["input_ids"].tolist()} for e in examples("llama")])
    config = SFTConfig(
        output_dir=str(folder / str(fused)), max_steps=2, per_device_train_batch_size=2,
        logging_steps=1, report_to=[], use_cpu=True, bf16=False, save_strategy="no",
        disable_tqdm=True, gradient_checkpointing=False, **options,
    )  # fmt: skip
    trainer = SFTTrainer(
        built("llama", fused), config, train_dataset=data, processing_class=tokenizer()
    )
    with dispatch.record() as ran:
        trainer.train()
    assert any(op.startswith("linear_nll:") for op in ran) == (fused and bool(options))
    return [strip(log) for log in trainer.state.log_history]


# Without an option TRL 1.16 makes no logits either: it has a chunked forward of its own, which does
# not call the head. With label smoothing it takes transformers' LabelSmoother.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [{}, {"label_smoothing_factor": 0.1}])
def test_sft(options, tmp_path):
    expected = sft(False, tmp_path, **options)
    assert_alike(sft(True, tmp_path, **options), expected, 1e-4)


def dpo(fused: bool, folder: Any) -> list[dict[str, float]]:
    random = np.random.default_rng(4)
    text = [
        [" ".join(f"w{i}" for i in random.integers(4, CLASSES, 8)) for _ in "pcr"] for _ in "1234"
    ]
    data = Dataset.from_list(
        [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in text]
    )  # fmt: skip
    config = DPOConfig(
        output_dir=str(folder / str(fused)), max_steps=2, per_device_train_batch_size=2,
        logging_steps=1, report_to=[], use_cpu=True, bf16=False, save_strategy="no",
        disable_tqdm=True, gradient_checkpointing=False,
    )  # fmt: skip
    trainer = DPOTrainer(
        built("llama", fused), ref_model=built("llama", False), args=config, train_dataset=data,
        processing_class=tokenizer(),
    )  # fmt: skip
    trainer.train()
    return [strip(log) for log in trainer.state.log_history]


@pytest.mark.filterwarnings("ignore")
def test_dpo(tmp_path):
    assert_alike(dpo(True, tmp_path), dpo(False, tmp_path), 1e-4)
