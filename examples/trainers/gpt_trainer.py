"""transformers' Trainer on a small GPT-2: one line is another.

python examples/trainers/gpt_trainer.py [--quick]
"""

from __future__ import annotations

import tempfile
from typing import Any

from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from neglog.examples.trainers import text
from neglog.examples.trainers.measure import Clock, compare
from neglog.integrations.transformers import explain, fuse

LENGTH, BATCH = 128, 8


class Timed(TrainerCallback):
    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_train_begin(self, *given: Any, **more: Any) -> None:
        self.clock.start()

    def on_step_end(self, *given: Any, **more: Any) -> None:
        self.clock.step()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
        if "loss" in logs:
            self.clock.losses.append(float(logs["loss"]))


def train(ours: bool, clock: Clock, steps: int) -> None:
    config = GPT2Config(
        vocab_size=text.VOCAB, n_positions=LENGTH, n_embd=128, n_layer=2, n_head=4,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    if ours:
        model = fuse(model)  # the line

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=BATCH,
            learning_rate=1e-3, logging_steps=1, report_to=[], save_strategy="no", use_cpu=True,
            disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = Trainer(
            model, arguments, train_dataset=text.rows(LENGTH), callbacks=[Timed(clock)]
        )
        trainer.remove_callback(PrinterCallback)  # of each log
        trainer.train()
    if ours:
        print(explain(model))


if __name__ == "__main__":
    compare(train, steps=12)
