"""Contrastive training of retrieval models with a momentum copy and queues, as in MoCo, ALBEF and BLIP.

Start with :class:`MomentumContrast`. Images and texts are compared within a batch, and with the features of earlier batches,
which a copy of the model computes that slowly follows it. The copy's own similarities soften the targets. Several processes
compare with the batches of all of them, as one process would with the whole batch. Axes: A samples of all processes, B of this
one, Q places of the queues, E width of the features.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from madtp.errors import ConfigError
from zoo.checkpoints.key_table import KeyTable

QUEUE = 57_600
DECAY = 0.995
EMPTY = -100


class Features(Protocol):
    """What a retrieval model returns: features ``[B, E]`` of length 1, and the factor on their products."""

    @property
    def image_features(self) -> Tensor: ...

    @property
    def text_features(self) -> Tensor: ...

    @property
    def scale(self) -> Tensor: ...


@dataclass(frozen=True)
class SampleFeatures:
    """Samples with the features that the momentum copy gives them.

    Attributes:
        image: Features of images, ``[B, E]``.
        text: Features of texts, ``[B, E]``.
        ids: Which image each pair is of, ``[B]``.
    """

    image: Tensor
    text: Tensor
    ids: Tensor

    def of_all_processes(self) -> SampleFeatures:
        """Return the samples of all processes, ``[A]``, one process after the other; without gradient."""
        return SampleFeatures(all_gather(self.image), all_gather(self.text), all_gather(self.ids))


@dataclass(frozen=True)
class Comparison:
    """What a batch is compared with, and the targets.

    Attributes:
        images: Features of images of all processes, then of the queue, ``[E, A + Q]``.
        texts: Features of texts, likewise.
        to_texts: Targets for each image, ``[B, A + Q]``.
        to_images: Targets for each text, ``[B, A + Q]``.
    """

    images: Tensor
    texts: Tensor
    to_texts: Tensor
    to_images: Tensor


class MomentumContrast(nn.Module):
    """A model, the copy that slowly follows it, and queues of the copy's features.

    The model is called with ``images`` or with the arguments of a text, and returns :class:`Features`. If it is pruned, so is
    the copy.
    """

    image_queue: Tensor
    text_queue: Tensor
    idx_queue: Tensor
    ptr_queue: Tensor

    def __init__(
        self,
        model: nn.Module,
        embedding: int,
        *,
        follower: nn.Module | None = None,
        queue: int = QUEUE,
        decay: float = DECAY,
    ) -> None:
        """Start with equal weights and random queues.

        Args:
            model: The model that is trained.
            embedding: E.
            follower: Another model of the same kind, which becomes the copy. None copies the model.
            queue: Q.
            decay: Share of its own weights that the copy keeps in a step.

        Raises:
            ConfigError: A size is out of range, or the follower is of another kind.
        """
        super().__init__()
        if embedding < 1 or queue < 1 or not 0 <= decay < 1:
            raise ConfigError(
                f"embedding {embedding}, queue {queue}, decay {decay}: at least 1, at least 1, in [0, 1)."
            )
        self.model = model
        self.follower = copy.deepcopy(model) if follower is None else follower
        self.decay = decay
        shapes = [[p.shape for p in part.parameters()] for part in (self.model, self.follower)]
        if shapes[0] != shapes[1] or self.follower is model:
            raise ConfigError("the follower has to be another model of the same architecture and size as the model.")
        self._follow(0.0)
        self.follower.requires_grad_(False)
        for name in ("image_queue", "text_queue"):
            self.register_buffer(name, nn.functional.normalize(torch.randn(embedding, queue), dim=0))
        self.register_buffer("idx_queue", torch.full((1, queue), EMPTY))
        self.register_buffer("ptr_queue", torch.zeros(1, dtype=torch.long))

    @property
    def checkpoint_tables(self) -> tuple[KeyTable, ...]:
        """How training checkpoints map to the model, its copy and the queues; the model's class says so."""
        table: KeyTable | None = getattr(self.model, "momentum_table", None)
        return () if table is None else (table,)

    def forward(
        self, found: Features, images: Tensor, texts: Mapping[str, Tensor], samples: Tensor, alpha: float
    ) -> Tensor:
        """Return the contrastive loss of a batch, a scalar; move the copy and the queues one step on.

        Args:
            found: What the model returned for the batch.
            images: Normalised images, ``[B, 3, H, W]``.
            texts: Arguments of the texts.
            samples: Which image each pair is of, ``[B]`` long. Pairs of one image count as matches.
            alpha: Weight of the copy's similarities in the targets; the rest falls on the matches.
        """
        with torch.no_grad():
            self._follow(self.decay)
            own = SampleFeatures(
                self.follower(images=images).image_features, self.follower(**texts).text_features, samples
            )
            everywhere = own.of_all_processes()
            compared = self._compare(own, everywhere, found.scale.detach(), alpha)
        to_texts = found.scale * found.image_features @ compared.texts
        to_images = found.scale * found.text_features @ compared.images
        losses = [
            -(targets * similarities.log_softmax(dim=1)).sum(dim=1).mean()
            for similarities, targets in ((to_texts, compared.to_texts), (to_images, compared.to_images))
        ]
        with torch.no_grad():
            self._enqueue(everywhere)
        return (losses[0] + losses[1]) / 2

    def _compare(self, own: SampleFeatures, everywhere: SampleFeatures, scale: Tensor, alpha: float) -> Comparison:
        images = torch.cat([everywhere.image.T, self.image_queue], dim=1)
        texts = torch.cat([everywhere.text.T, self.text_queue], dim=1)
        ids = torch.cat([everywhere.ids[None], self.idx_queue], dim=1)
        matches = (own.ids[:, None] == ids).to(own.image.dtype)
        matches = (1 - alpha) * matches / matches.sum(dim=1, keepdim=True)
        to_texts = alpha * (scale * own.image @ texts).softmax(dim=1) + matches
        to_images = alpha * (scale * own.text @ images).softmax(dim=1) + matches
        return Comparison(images, texts, to_texts, to_images)

    def _follow(self, decay: float) -> None:
        with torch.no_grad():
            for own, following in zip(self.model.parameters(), self.follower.parameters(), strict=True):
                following.lerp_(own.to(following.dtype), 1 - decay)
            for buffer, copied in zip(self.model.buffers(), self.follower.buffers(), strict=True):
                copied.copy_(buffer)

    def _enqueue(self, batch: SampleFeatures) -> None:
        """Replace the oldest features by those of a batch, which may wrap around the queue's end."""
        size = self.idx_queue.shape[1]
        image, text, ids = batch.image[-size:], batch.text[-size:], batch.ids[-size:]
        places = (self.ptr_queue + torch.arange(len(ids), device=ids.device)) % size
        self.image_queue[:, places] = image.T.to(self.image_queue.dtype)
        self.text_queue[:, places] = text.T.to(self.text_queue.dtype)
        self.idx_queue[0, places] = ids
        self.ptr_queue.copy_((self.ptr_queue + len(ids)) % size)


def all_gather(values: Tensor) -> Tensor:
    """Return the values ``[B, ...]`` of all processes, one after the other, without gradient; in one process, the values."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return values
    parts = [torch.empty_like(values) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, values.contiguous())
    return torch.cat(parts)
