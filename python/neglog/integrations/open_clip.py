"""open_clip's losses by neglog's kernels: no matrix of all similarities is in memory.

`ClipLoss`, `SigLipLoss` and `CoCaLoss` have the constructors, `forward` and answers of open_clip's.
They take their place in a training loop and in a task, `CLIPTask(model, loss=ClipLoss())`.
Nothing of open_clip is imported: torch alone is needed.

Source: open_clip/loss.py of open_clip 3.3, and of its main branch (4.2.0.dev0) where they differ.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, distributed, nn

from neglog import route
from neglog.checks_of_pairs import check_embeddings, check_finite, check_scalar
from neglog.distributed.exchange import gather_rows, with_others
from neglog.distributed.groups import Ranks, meet
from neglog.losses._pairs import compare, embeddings, number, workspace_of
from neglog.losses._result import reduce_and_cast
from neglog.losses.clip import beside_bias, clip_loss, siglip_loss
from neglog.losses.cross_entropy import cross_entropy

__all__ = ["ClipLoss", "CoCaLoss", "SigLipLoss"]

DIST_IMPLS = ("bidir", "shift", "reduce", "gather")


class _OverProcesses(nn.Module):
    """A loss of this process's features and those of `world_size` processes."""

    rank: int
    world_size: int
    # Of open_clip's, they are steps of forward; here forward needs no logits and would not call
    # them.
    _steps: ClassVar[tuple[str, ...]] = ("get_logits", "get_ground_truth")

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name in cls._steps:
            if name in vars(cls) and cls.__module__ != __name__:
                raise TypeError(
                    f"{cls.__name__}.{name}: expected no other one, as forward makes no logits and "
                    "does not call it; override forward, or extend open_clip's own class"
                )

    def _group(self) -> Any:
        """The process group of `world_size` processes; None for this process alone."""
        if self.world_size <= 1:
            return None
        if not (distributed.is_available() and distributed.is_initialized()):
            raise RuntimeError(
                f"world_size: expected torch.distributed with {self.world_size} processes, got no "
                "process group; call init_process_group first"
            )
        found = {"world_size": distributed.get_world_size(), "rank": distributed.get_rank()}
        for name, expected in found.items():
            if getattr(self, name) != expected:
                raise ValueError(
                    f"{name}: expected {expected}, that of the process group, "
                    f"got {getattr(self, name)}"
                )
        return distributed.group.WORLD


class ClipLoss(_OverProcesses):
    """open_clip's ClipLoss: the mean of cross-entropy from images to texts and back.

    Args:
        local_loss: with several processes, the loss of this process's rows against those of all.
            Else each process computes the loss of the whole batch.
        gather_with_grad: gradients go back to the processes that the features came from. Else the
            features of others are constants and, with local_loss, this process's own gathered ones.
        cache_labels: `get_ground_truth` keeps its labels. The loss needs none.
        rank, world_size: of torch.distributed's default group; world_size 1: this process alone.
        use_horovod: False, as in open_clip's main branch, which has none.

    With local_loss and gather_with_grad a process does 1 / world_size of the work, and the mean of
    gradients over processes is the same as without both. Features (N, D), normalised, of float32,
    float64, bfloat16 or float16; the loss has shape () and their dtype, under autocast float32.

    Raises RuntimeError where world_size > 1 and there is no process group, ValueError where rank or
    world_size are not those of it, NotImplementedError for use_horovod.
    """

    def __init__(
        self, local_loss: bool = False, gather_with_grad: bool = False, cache_labels: bool = False,
        rank: int = 0, world_size: int = 1, use_horovod: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        if use_horovod:
            raise NotImplementedError(
                "use_horovod: expected False, got True; neglog gathers by torch.distributed alone"
            )
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.use_horovod = False
        self.labels: dict[tuple[torch.device, int], Tensor] = {}

    def forward(
        self, image_features: Tensor, text_features: Tensor, logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None, output_dict: bool = False,
    ) -> Any:  # fmt: skip
        """The loss (), or {"contrastive_loss": loss} with output_dict.

        logit_bias changes nothing: a number added to all logits leaves softmax. A tensor receives a
        gradient of 0.
        """
        loss = self._loss(image_features, text_features, logit_scale, logit_bias)
        return {"contrastive_loss": loss} if output_dict else loss

    def _loss(self, image: Tensor, text: Tensor, scale: Any, bias: Any) -> Tensor:
        group = self._group()
        if group is None or (self.local_loss and self.gather_with_grad):
            return clip_loss(image, text, scale, bias, group=group)
        if not (self.local_loss or self.gather_with_grad):
            return clip_loss(image, text, scale, bias, group=group, exchange="detached")
        check_embeddings(image_features=image, text_features=text)
        ranks = meet("ClipLoss", group, image, len(image), features=image.shape[1])
        all_image, all_text = self._gather(ranks, image, text)
        if not self.local_loss:
            return clip_loss(all_image, all_text, scale, bias)
        losses = [
            _against_constants(query, keys, scale, ranks.first)
            for query, keys in ((image, all_text), (text, all_image))
        ]
        # The mean over processes is that of all rows, of which each may have another number.
        loss = torch.stack(losses).sum() / 2 * (ranks.world / ranks.total)
        return reduce_and_cast(beside_bias(loss, bias, image), "none", image)

    def _gather(self, ranks: Ranks, image: Tensor, text: Tensor) -> list[Tensor]:
        """Both features of all processes, (world_size * N, D), with the gradients that the options
        ask for."""
        if not (self.gather_with_grad or self.local_loss):
            return [with_others(x, ranks) for x in (image, text)]
        sent = (x if self.gather_with_grad else x.detach() for x in (image, text))
        return [gather_rows(x, ranks.rows, ranks.name) for x in sent]

    def get_logits(
        self, image_features: Tensor, text_features: Tensor, logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Both matrices of logits, which the loss does not make: for what else needs them."""
        if self._group() is None:
            images, texts = image_features, text_features
        else:
            ranks = meet("ClipLoss", self._group(), image_features, len(image_features))
            images, texts = self._gather(ranks, image_features, text_features)
        if self.world_size > 1 and not self.local_loss:
            per_image = logit_scale * images @ texts.t()
            per_text = per_image.t()
        else:
            per_image = logit_scale * image_features @ texts.t()
            per_text = logit_scale * text_features @ images.t()
        if logit_bias is None:
            return per_image, per_text
        return per_image + logit_bias, per_text + logit_bias

    def get_ground_truth(self, device: torch.device, num_logits: int) -> Tensor:
        """The column (num_logits,) of each row's own pair."""
        key = (device, num_logits)
        if key in self.labels:
            return self.labels[key]
        first = num_logits * self.rank if self.world_size > 1 and self.local_loss else 0
        labels = torch.arange(first, first + num_logits, device=device)
        if self.cache_labels:
            self.labels = {key: labels}
        return labels


def _against_constants(query: Tensor, keys: Tensor, scale: Any, first: int) -> Tensor:
    """Losses (N,) of queries against keys without a gradient; the first query's own is `first`."""
    check_scalar("logit_scale", scale, query)
    check_finite("logit_scale", scale)
    query, keys = embeddings(query, False), embeddings(keys, False)
    where = route.choose(query, keys, workspace=workspace_of(None))
    own = torch.arange(first, first + len(query), device=query.device)
    return compare(where, query, keys, number(scale, query), positive=own).row_loss


class CoCaLoss(ClipLoss):
    """open_clip's CoCaLoss: ClipLoss, and cross-entropy of a caption's words.

    Args:
        caption_loss_weight, clip_loss_weight: what each is multiplied by. With clip_loss_weight 0
            the first is not computed.
        pad_id: the label of words that do not count.
        local_loss, ..., use_horovod: as ClipLoss.
    """

    def __init__(
        self, caption_loss_weight: float, clip_loss_weight: float, pad_id: int = 0,
        local_loss: bool = False, gather_with_grad: bool = False, cache_labels: bool = False,
        rank: int = 0, world_size: int = 1, use_horovod: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod)
        self.clip_loss_weight = clip_loss_weight
        self.caption_loss_weight = caption_loss_weight
        self.pad_id = pad_id

    def forward(  # type: ignore[override]  # the arguments are open_clip's
        self, image_features: Tensor, text_features: Tensor, logits: Tensor, labels: Tensor,
        logit_scale: float | Tensor, output_dict: bool = False,
    ) -> Any:  # fmt: skip
        """(contrastive loss, caption loss), () each, or a dict of them with output_dict.

        logits (N, T, V), labels (N, T).
        """
        if self.clip_loss_weight:
            clip = self._loss(image_features, text_features, logit_scale, None)
            clip = self.clip_loss_weight * clip
        else:
            clip = torch.tensor(0, device=logits.device)
        caption = cross_entropy(logits.permute(0, 2, 1), labels, ignore_index=self.pad_id)
        caption = caption * self.caption_loss_weight
        if output_dict:
            return {"contrastive_loss": clip, "caption_loss": caption}
        return clip, caption


class SigLipLoss(_OverProcesses):
    """open_clip's SigLipLoss: -log sigmoid of each pair's logit, negated where image and text do
    not belong; sum over N.

    Args:
        cache_labels: kept, and of no effect, as in open_clip.
        rank, world_size: of torch.distributed's default group; world_size 1: this process alone.
        dist_impl: "bidir" (as None), "shift", "reduce" or "gather": how open_clip brings the texts
            of other processes here. All have one answer; here each gathers them once.
        chunk_size: rows of logits that may be in memory at once; 0: neglog's own choice.

    Features as ClipLoss. The loss has their dtype; with chunk_size at least float32, as
    open_clip's.
    Raises as ClipLoss, and ValueError for another dist_impl.
    """

    def __init__(
        self, cache_labels: bool = False, rank: int = 0, world_size: int = 1,
        dist_impl: str | None = None, chunk_size: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.dist_impl = dist_impl or "bidir"
        if self.dist_impl not in DIST_IMPLS:
            raise ValueError(f"dist_impl: expected one of {DIST_IMPLS} or None, got {dist_impl!r}")
        self.chunk_size = chunk_size

    def forward(
        self, image_features: Tensor, text_features: Tensor, logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None, output_dict: bool = False,
    ) -> Any:  # fmt: skip
        """The loss (), or {"contrastive_loss": loss} with output_dict."""
        options: Any = None
        if self.chunk_size > 0:
            logits = self.chunk_size * max(1, len(text_features)) * self.world_size
            options = {"workspace_mb": 4 * logits / 2**20}
        loss = siglip_loss(
            image_features, text_features, logit_scale, logit_bias, group=self._group(),
            options=options,
        )  # fmt: skip
        if self.chunk_size > 0:
            loss = loss.to(torch.promote_types(loss.dtype, torch.float32))
        return {"contrastive_loss": loss} if output_dict else loss

    def get_logits(
        self, image_features: Tensor, text_features: Tensor, logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The logits of these features, which the loss does not make: for what else needs them."""
        logits = logit_scale * image_features @ text_features.t()
        return logits if logit_bias is None else logits + logit_bias

    def get_ground_truth(
        self, device: torch.device, dtype: torch.dtype, num_logits: int, negative_only: bool = False
    ) -> Tensor:
        """(num_logits, num_logits): 1 where image and text belong together, else -1."""
        labels = torch.full((num_logits, num_logits), -1, device=device, dtype=dtype)
        return labels if negative_only else labels.fill_diagonal_(1)
