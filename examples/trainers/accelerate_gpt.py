"""A loop of one's own with accelerate, and gradients accumulated: one line is another.

python examples/trainers/accelerate_gpt.py [--quick]
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from transformers import GPT2Config, GPT2LMHeadModel

from neglog.examples.trainers import text
from neglog.examples.trainers.measure import Clock, compare
from neglog.integrations.transformers import fuse

LENGTH, PARTS = 128, 2


def train(ours: bool, clock: Clock, steps: int) -> None:
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=text.VOCAB, n_positions=LENGTH, n_embd=128, n_layer=2, n_head=4,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip
    if ours:
        model = fuse(model)  # the line

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=PARTS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loader = torch.utils.data.DataLoader(
        text.batches(LENGTH, PARTS * steps), batch_size=None, shuffle=False
    )
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    clock.start()
    for ids in loader:
        with accelerator.accumulate(model):
            loss = model(input_ids=ids, labels=ids).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            clock.step(loss.detach())


if __name__ == "__main__":
    compare(train, steps=6)
