"""A LightningModule whose loss is its own, of its model's logits: one line is another.

python examples/trainers/lightning_gpt.py [--quick]
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from typing import Any

import lightning
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from neglog.examples.trainers import text
from neglog.examples.trainers.measure import Clock, compare
from neglog.integrations.transformers import fuse

LENGTH = 128


class Model(lightning.LightningModule):
    def __init__(self, ours: bool, clock: Clock) -> None:
        super().__init__()
        self.clock = clock
        self.model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=text.VOCAB, hidden_size=128, intermediate_size=256,
                num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=LENGTH,
            )
        )  # fmt: skip
        if ours:
            self.model = fuse(self.model)  # the line

    def training_step(self, ids: Tensor, index: int) -> Tensor:
        logits = self.model(input_ids=ids).logits[:, :-1]
        return F.cross_entropy(logits.reshape(-1, text.VOCAB), ids[:, 1:].reshape(-1))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)

    def on_train_start(self) -> None:
        self.clock.start()

    def on_train_batch_end(self, outputs: Any, batch: Any, index: int) -> None:
        self.clock.step(outputs["loss"])


def train(ours: bool, clock: Clock, steps: int) -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        trainer = lightning.Trainer(
            max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        )  # fmt: skip
        loader = torch.utils.data.DataLoader(text.batches(LENGTH, steps), batch_size=None)
        trainer.fit(Model(ours, clock), loader)


if __name__ == "__main__":
    compare(train, steps=12)
