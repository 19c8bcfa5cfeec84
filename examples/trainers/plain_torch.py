"""A model and a loop in plain torch: the class of its last layer is another.

python examples/trainers/plain_torch.py [--quick]
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from neglog.examples.trainers import text
from neglog.examples.trainers.measure import Clock, compare
from neglog.integrations.deferred import defer

LENGTH, WIDTH = 128, 128


class Model(nn.Module):
    """Causal: embeddings, two blocks, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(text.VOCAB, WIDTH)
        self.position = nn.Embedding(LENGTH, WIDTH)
        layer = nn.TransformerEncoderLayer(
            WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, text.VOCAB)

    def forward(self, ids: Tensor) -> Any:
        length = ids.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        hidden = self.token(ids) + self.position(torch.arange(length))
        return self.head(self.blocks(hidden, mask, is_causal=True))


def train(ours: bool, clock: Clock, steps: int) -> None:
    model = Model()
    if ours:
        defer(model.head)  # the line
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batches = text.batches(LENGTH, steps)
    clock.start()
    for ids in batches:
        logits = model(ids)
        loss = criterion(logits[:, :-1].reshape(-1, text.VOCAB), ids[:, 1:].reshape(-1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        clock.step(loss.detach())


if __name__ == "__main__":
    compare(train, steps=12)
