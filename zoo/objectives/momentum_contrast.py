"""Contrastive training of retrieval models with momentum copies and queues (as in MoCo, ALBEF and BLIP).

Start with :class:`MomentumContrast`. Images and texts are compared not only within a batch but with the features of
the batches before, which a slowly following copy of the model computes; the copy's own similarities soften the targets.
Several processes compare with the batches of all of them, as one process would with the whole batch.
Axes: B samples, Q places of the queues, E width of the features.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from madtp.errors import ConfigError
from zoo.checkpoints.key_table import KeyTable

QUEUE = 57_600
DECAY = 0.995
EMPTY = -100


class Features(Protocol):
    """What a retrieval model returns: features [B, E] of length 1, and the factor on their products."""

    image_features: Tensor
    text_features: Tensor
    scale: Tensor


class Compared(NamedTuple):
    """Targets and what they are compared with: features of the copy for all processes' batches (A samples), its queues behind
    them [E, A + Q]; targets [B, A + Q]."""

    images: Tensor
    texts: Tensor
    to_texts: Tensor
    to_images: Tensor


Gathered = tuple[Tensor, Tensor, Tensor]
"""Features of images and texts [A, E], and which image each pair is of [A]."""


class MomentumContrast(nn.Module):
    """A model, its slowly following copy, and queues of the copy's features.

    The model is called with `images` or with the arguments of a text, and returns :class:`Features`; it may be a pruned
    one, and the copy then is, too.
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
            model: is trained.
            embedding: E.
            follower: another model of the same kind, which becomes the copy; None copies the model.
            queue: Q.
            decay: share of its own weights that the copy keeps in a step.

        Raises:
            ConfigError: a size is out of range, or the follower is of another kind.
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
        """How files of training map to the model, its copy and the queues: what the model's class says."""
        return (self.model.momentum_table,) if hasattr(self.model, "momentum_table") else ()  # type: ignore[return-value]

    def forward(
        self, found: Features, images: Tensor, texts: Mapping[str, Tensor], samples: Tensor, alpha: float
    ) -> Tensor:
        """The contrastive loss of a batch, a scalar; moves the copy and the queues one step on.

        Args:
            found: what the model returned for the batch.
            images: normalised, [B, 3, H, W].
            texts: arguments of the texts.
            samples: [B] long, which image each pair is of; pairs of one image count as matches.
            alpha: weight of the copy's similarities in the targets; the rest falls on the matches.
        """
        with torch.no_grad():
            self._follow(self.decay)
            image, text = self.follower(images=images).image_features, self.follower(**texts).text_features
            everywhere = gathered(image), gathered(text), gathered(samples)
            compared = self._compare(image, text, samples, everywhere, found.scale.detach(), alpha)
        to_texts = found.scale * found.image_features @ compared.texts
        to_images = found.scale * found.text_features @ compared.images
        losses = [
            -(targets * similarities.log_softmax(dim=1)).sum(dim=1).mean()
            for similarities, targets in ((to_texts, compared.to_texts), (to_images, compared.to_images))
        ]
        with torch.no_grad():
            self._enqueue(*everywhere)
        return (losses[0] + losses[1]) / 2

    def _compare(
        self, image: Tensor, text: Tensor, samples: Tensor, everywhere: Gathered, scale: Tensor, alpha: float
    ) -> Compared:
        images = torch.cat([everywhere[0].T, self.image_queue], dim=1)
        texts = torch.cat([everywhere[1].T, self.text_queue], dim=1)
        matches = (samples[:, None] == torch.cat([everywhere[2][None], self.idx_queue], dim=1)).to(image.dtype)
        matches = (1 - alpha) * matches / matches.sum(dim=1, keepdim=True)
        to_texts = alpha * (scale * image @ texts).softmax(dim=1) + matches
        to_images = alpha * (scale * text @ images).softmax(dim=1) + matches
        return Compared(images, texts, to_texts, to_images)

    def _follow(self, decay: float) -> None:
        with torch.no_grad():
            for own, following in zip(self.model.parameters(), self.follower.parameters(), strict=True):
                following.lerp_(own.to(following.dtype), 1 - decay)
            for buffer, copied in zip(self.model.buffers(), self.follower.buffers(), strict=True):
                copied.copy_(buffer)

    def _enqueue(self, image: Tensor, text: Tensor, samples: Tensor) -> None:
        """Replace the oldest features by those of a batch; it may wrap around the queue's end."""
        size = self.idx_queue.shape[1]
        image, text, samples = image[-size:], text[-size:], samples[-size:]
        places = (self.ptr_queue + torch.arange(len(samples), device=samples.device)) % size
        self.image_queue[:, places] = image.T.to(self.image_queue.dtype)
        self.text_queue[:, places] = text.T.to(self.text_queue.dtype)
        self.idx_queue[0, places] = samples
        self.ptr_queue.copy_((self.ptr_queue + len(samples)) % size)


def gathered(values: Tensor) -> Tensor:
    """The values [B, ...] of all processes, one after the other; without gradient. Alone: the values."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return values
    parts = [torch.empty_like(values) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, values.contiguous())
    return torch.cat(parts)
