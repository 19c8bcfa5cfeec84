"""A loop like open_clip's: the class of the loss is another.

    python examples/trainers/clip_loop.py [--quick]

Pictures are noise of eight brightnesses, captions name them. Beside neglog's ClipLoss stands
open_clip's own, or where open_clip is not installed its formula.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neglog.examples.trainers.measure import Clock, compare
from neglog.integrations import open_clip as ours_by_name

BATCH, WIDTH, WORDS, SIZE = 4096, 64, 32, 16

try:
    from open_clip.loss import ClipLoss as TheirLoss
except ImportError:

    class TheirLoss(nn.Module):  # type: ignore[no-redef]
        """The formula of open_clip's ClipLoss in one process."""

        def forward(self, image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
            per_image = logit_scale * image @ text.T
            labels = torch.arange(len(image))
            return (F.cross_entropy(per_image, labels) + F.cross_entropy(per_image.T, labels)) / 2


class Model(nn.Module):
    """Two towers and the scale."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = nn.Sequential(
            nn.Conv2d(1, 16, 4, 4), nn.GELU(), nn.Flatten(), nn.Linear(16 * 16, WIDTH)
        )
        self.words = nn.Embedding(WORDS * 8, WIDTH)
        self.text = nn.Sequential(nn.Flatten(), nn.Linear(8 * WIDTH, WIDTH))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, images: Tensor, captions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        image = F.normalize(self.visual(images), dim=-1)
        text = F.normalize(self.text(self.words(captions)), dim=-1)
        return image, text, self.logit_scale.exp()


def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images (N, 1, 16, 16) of eight bands, and captions (N, 8), a word for each band."""
    levels = torch.randint(WORDS, (BATCH, 8), generator=generator)
    bands = (levels / WORDS).repeat_interleave(SIZE // 8, 1)[:, None, :, None]
    images = bands + 0.1 * torch.randn(BATCH, 1, SIZE, SIZE, generator=generator)
    return images, levels + WORDS * torch.arange(8)


def train(ours: bool, clock: Clock, steps: int) -> None:
    model = Model()
    loss_of: Any = ours_by_name.ClipLoss() if ours else TheirLoss()  # the line
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(1)
    clock.start()
    for _ in range(steps):
        images, captions = batch(generator)
        loss = loss_of(*model(images, captions))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        clock.step(loss.detach())


if __name__ == "__main__":
    compare(train, steps=12)
