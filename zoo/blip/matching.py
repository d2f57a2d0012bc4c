"""BLIP's matching head in training and evaluation. Start with :func:`matching_loss`.

Axes: B pairs, T tokens of a text, N image tokens, V their width.
"""

from __future__ import annotations

from typing import Protocol, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from madtp.errors import DataError
from madtp.training.attention_kernels import inference_kernels
from zoo.blip.retrieval import RetrievalOutput
from zoo.blip.surviving_tokens import aside, surviving_tokens

# The score of pairs that are not among the candidates, as in the published code.
LEFT_OUT = -100.0
# In training, the lengths of encoded images are rounded up to multiples of this, so that few calls are captured.
LENGTHS = 16


class Matcher(Protocol):
    """A :class:`~zoo.blip.retrieval.BlipRetrieval`, dense or rewritten."""

    def __call__(
        self, *, image_tokens: Tensor, input_ids: Tensor, attention_mask: Tensor, image_mask: Tensor | None = None
    ) -> RetrievalOutput:
        """Match encoded images ``[B, N, V]`` with texts ``[B, T]``; masks ``[B, N]``, ``[B, T]``, 1 for a token."""


def matching_loss(
    model: Matcher, found: RetrievalOutput, input_ids: Tensor, attention_mask: Tensor, samples: Tensor
) -> Tensor:
    """Return the cross-entropy of matching the batch's pairs, and each image and text with a wrong one.

    Wrong images and texts are drawn from the batch, the likelier the more similar they are.

    Args:
        model: The model that is trained.
        found: What it returned for the pairs.
        input_ids: ``[B, T]``.
        attention_mask: ``[B, T]``.
        samples: ``[B]`` long, the image of each pair. Other pairs of the same image are not drawn as wrong ones.

    Raises:
        DataError: All pairs are of one image, or the model was not asked for pairs.
    """
    if found.match_logits is None or found.image_tokens is None:
        raise DataError("the matching loss needs a call of the model with images and texts.")
    if found.image_features is None or found.text_features is None:
        raise DataError("the matching loss needs a call of the model with images, not with image_tokens.")
    same = samples[:, None] == samples[None]
    if bool(same.all(dim=1).any()):
        raise DataError(f"all {len(samples)} pairs of the batch are of one image; matching needs at least two.")
    similar = _similar(found)
    wrong_texts, wrong_images = _draw(similar, same), _draw(similar.T, same)
    tokens, left = surviving_tokens(model, "visual_encoder", found.image_tokens, LENGTHS)
    every = torch.arange(len(samples), device=samples.device)
    # A rewritten model sees merged tokens inside the call that made `found`, which would tell right pairs from wrong ones.
    right = every if left is not None else every[:0]
    images, texts = torch.cat([right, wrong_images, every]), torch.cat([right, every, wrong_texts])
    image_mask = None if left is None else left[images]
    matched = match(model, tokens[images], input_ids[texts], attention_mask[texts], image_mask)
    logits = matched if left is not None else torch.cat([found.match_logits, matched])
    labels = torch.zeros(3 * len(samples), dtype=torch.long, device=samples.device)
    labels[: len(samples)] = 1
    return F.cross_entropy(logits, labels)


def match(
    model: Matcher,
    image_tokens: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor,
    image_mask: Tensor | None = None,
) -> Tensor:
    """Return logits ``[B, 2]`` of encoded images ``[B, N, V]`` with texts ``[B, T]``.

    Masks are ``[B, N]`` (None: all are tokens) and ``[B, T]``.

    What a rewritten model recorded of the call before stays; see :meth:`madtp.PrunedModel.aside`.
    """
    logits = _matched(model, image_tokens, input_ids, attention_mask, image_mask).match_logits
    if logits is None:
        raise DataError(f"{type(model).__name__} returned no match_logits for image_tokens and texts.")
    return logits


def _matched(
    model: Matcher, image_tokens: Tensor, input_ids: Tensor, attention_mask: Tensor, image_mask: Tensor | None
) -> RetrievalOutput:
    masked = {} if image_mask is None else {"image_mask": image_mask}
    with aside(model):
        return model(image_tokens=image_tokens, input_ids=input_ids, attention_mask=attention_mask, **masked)


def matching_distance(
    model: Matcher,
    dense: Matcher,
    found: RetrievalOutput,
    wanted: RetrievalOutput,
    input_ids: Tensor,
    attention_mask: Tensor,
) -> Tensor:
    """Return 1 minus the cosine between what the matching heads of two models read.

    It is the mean over the batch's pairs, and over each image with a text that the dense model finds similar.

    Args:
        model: The student; its last call made ``found``.
        dense: The teacher.
        found: What the student returned for the pairs.
        wanted: What the teacher returned for them.
        input_ids: ``[B, T]``.
        attention_mask: ``[B, T]``.

    Raises:
        DataError: The models were not asked for pairs.
    """
    if found.image_tokens is None or wanted.image_tokens is None or wanted.match_features is None:
        raise DataError("the distance of matching needs calls of both models with images and texts.")
    every = torch.arange(len(input_ids), device=input_ids.device)
    wrong = _draw(_similar(wanted), every[:, None] == every)
    with inference_kernels():
        told = _matched(dense, wanted.image_tokens, input_ids[wrong], attention_mask[wrong], None)
    texts, images = torch.cat([every, wrong]), torch.cat([every, every])
    tokens, left = surviving_tokens(model, "visual_encoder", found.image_tokens, LENGTHS)
    image_mask = None if left is None else left[images]
    followed = _matched(model, tokens[images], input_ids[texts], attention_mask[texts], image_mask)
    pairs = torch.cat([wanted.match_features, cast(Tensor, told.match_features)])
    return (1 - F.cosine_similarity(cast(Tensor, followed.match_features), pairs, dim=-1)).mean()


@torch.no_grad()
def _similar(found: RetrievalOutput) -> Tensor:
    """Similarities ``[B, B]`` of the images of a call with its texts, as logits."""
    return found.scale * cast(Tensor, found.image_features) @ cast(Tensor, found.text_features).T


def _draw(similar: Tensor, forbidden: Tensor) -> Tensor:
    """For each row one column ``[B]`` that is not forbidden, by the softmax of the similarities ``[B, B]``."""
    likely = similar.float().masked_fill(forbidden, -torch.inf).softmax(dim=1)
    return torch.multinomial(likely, 1)[:, 0]
