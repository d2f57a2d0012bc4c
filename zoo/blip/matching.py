"""BLIP's matching head in training and evaluation. Start with `matching_loss` and `rerank`.

Axes: B pairs, T tokens of a text, N image tokens, V their width; I images and J texts of a data set.
"""

from __future__ import annotations

from typing import Protocol, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from madtp.errors import DataError
from madtp.training.attention_kernels import inference_kernels
from zoo.blip.retrieval import RetrievalOutput
from zoo.blip.surviving_tokens import aside, gathered, survivors

# What pairs score that are not among the candidates; the published code has the same number.
LEFT_OUT = -100.0
# In training, encoded images are matched in lengths that are multiples of this, so that few calls are captured.
LENGTHS = 16


class Matcher(Protocol):
    """A `BlipRetrieval`, dense or rewritten."""

    def __call__(
        self, *, image_tokens: Tensor, input_ids: Tensor, attention_mask: Tensor, image_mask: Tensor | None = None
    ) -> RetrievalOutput:
        """Match encoded images [B, N, V] with texts [B, T]; masks [B, N], [B, T], 1 for a token."""


def matching_loss(
    model: Matcher, found: RetrievalOutput, input_ids: Tensor, attention_mask: Tensor, samples: Tensor
) -> Tensor:
    """Cross-entropy of the batch's pairs and of as many wrong images and wrong texts, the likelier the more similar.

    Args:
        model: is trained.
        found: what it returned for the pairs.
        input_ids: [B, T].
        attention_mask: [B, T].
        samples: [B] long, which image each pair is of; of one image, none is a wrong one.

    Raises:
        DataError: all pairs are of one image, or the model was not asked for pairs.
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
    tokens, left = survivors(model, "visual_encoder", found.image_tokens, LENGTHS)
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
    """Logits [B, 2] of encoded images [B, N, V] with texts [B, T]; masks [B, N] (None: all are tokens) and [B, T].

    A rewritten model's record stays that of the forward before, see :meth:`madtp.PrunedModel.aside`.
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
    """One less the cosine between what the matching heads of two models read: of the batch's pairs, and of each image with a
    text that the dense model finds similar.

    Args:
        model: is trained to follow; its last call made `found`.
        dense: is followed.
        found: what the one returned for the pairs.
        wanted: what the other did.
        input_ids: [B, T].
        attention_mask: [B, T].

    Raises:
        DataError: the models were not asked for pairs.
    """
    if found.image_tokens is None or wanted.image_tokens is None or wanted.match_features is None:
        raise DataError("the distance of matching needs calls of both models with images and texts.")
    every = torch.arange(len(input_ids), device=input_ids.device)
    wrong = _draw(_similar(wanted), every[:, None] == every)
    with inference_kernels():
        told = _matched(dense, wanted.image_tokens, input_ids[wrong], attention_mask[wrong], None)
    texts, images = torch.cat([every, wrong]), torch.cat([every, every])
    tokens, left = survivors(model, "visual_encoder", found.image_tokens, LENGTHS)
    image_mask = None if left is None else left[images]
    followed = _matched(model, tokens[images], input_ids[texts], attention_mask[texts], image_mask)
    pairs = torch.cat([wanted.match_features, cast(Tensor, told.match_features)])
    return (1 - F.cosine_similarity(cast(Tensor, followed.match_features), pairs, dim=-1)).mean()


@torch.no_grad()
def _similar(found: RetrievalOutput) -> Tensor:
    """Similarities [B, B] of the images of a call with its texts, as logits."""
    return found.scale * cast(Tensor, found.image_features) @ cast(Tensor, found.text_features).T


def _draw(similar: Tensor, forbidden: Tensor) -> Tensor:
    """For each row one column [B] that is not forbidden, by the softmax of the similarities [B, B]."""
    likely = similar.float().masked_fill(forbidden, -torch.inf).softmax(dim=1)
    return torch.multinomial(likely, 1)[:, 0]


@torch.no_grad()
def rerank(
    model: Matcher,
    similar: Tensor,
    image_tokens: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    image_mask: Tensor | None = None,
    candidates: int = 256,
    batch: int = 64,
) -> tuple[Tensor, Tensor]:
    """Scores of texts for each image and of images for each text; the most similar are matched, the others left out.

    Args:
        model: matches.
        similar: products of features, [I, J].
        image_tokens: [I, N, V], on any device.
        input_ids: [J, T].
        attention_mask: [J, T].
        image_mask: what survives of `image_tokens` in a rewritten model, [I, N]
            (:func:`zoo.blip.surviving_tokens.seen`); None: all. Texts attend to as many tokens as the fullest image has.
        candidates: how many are matched for each image, and for each text.
        batch: pairs that are matched at a time.

    Returns:
        [I, J] and [J, I]: similarity plus the logit of a match.
    """
    device = input_ids.device
    if image_mask is not None:
        image_tokens, image_mask = gathered(image_tokens, image_mask.to(image_tokens.device))

    def scores(similar: Tensor, images_first: bool) -> Tensor:
        best, columns = similar.topk(min(candidates, similar.shape[1]), dim=1)
        rows = torch.arange(len(similar), device=device).repeat_interleave(columns.shape[1])
        images, texts = (rows, columns.flatten()) if images_first else (columns.flatten(), rows)
        result = torch.full_like(similar, LEFT_OUT)
        every = torch.arange(len(rows), device=device)
        for pairs, values in zip(torch.split(every, batch), torch.split(best.flatten(), batch), strict=True):
            places = images[pairs].to(image_tokens.device)
            tokens = image_tokens[places].to(device)
            left = None if image_mask is None else image_mask[places].to(device)
            ids, mask = input_ids[texts[pairs]], attention_mask[texts[pairs]]
            result[rows[pairs], columns.flatten()[pairs]] = values + match(model, tokens, ids, mask, left)[:, 1]
        return result

    return scores(similar, True), scores(similar.T, False)
