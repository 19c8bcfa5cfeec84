"""Masked language modelling of a small BERT by transformers' Trainer: one line is another.

python examples/trainers/bert_mlm_trainer.py [--quick]
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from neglog.examples.trainers import text
from neglog.examples.trainers.gpt_trainer import Timed
from neglog.examples.trainers.measure import Clock, compare
from neglog.integrations.transformers import explain, fuse

LENGTH, BATCH, MASK, SHARE = 128, 8, 1, 0.15


def masked(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A data collator: 15% of the tokens are hidden, and asked for."""
    ids = torch.tensor([row["input_ids"] for row in rows])
    generator = torch.Generator().manual_seed(int(ids[0, 0]))
    hidden = torch.rand(ids.shape, generator=generator) < SHARE
    return {"input_ids": ids.masked_fill(hidden, MASK), "labels": ids.masked_fill(~hidden, -100)}


def train(ours: bool, clock: Clock, steps: int) -> None:
    config = BertConfig(
        vocab_size=text.VOCAB, hidden_size=128, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=512, max_position_embeddings=LENGTH, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = BertForMaskedLM(config)
    if ours:
        model = fuse(model)  # the line

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=BATCH,
            learning_rate=1e-3, logging_steps=1, report_to=[], save_strategy="no", use_cpu=True,
            disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = Trainer(
            model, arguments, train_dataset=text.rows(LENGTH), data_collator=masked,
            callbacks=[Timed(clock)],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)  # of each log
        trainer.train()
    if ours:
        print(explain(model))


if __name__ == "__main__":
    compare(train, steps=12)
