"""Matching of the most similar pairs of a whole data set at once, with which the task of retrieval is compared: :func:`rerank`.

Axes: I images, J texts, T tokens of a text, N image tokens, V their width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.blip.matching import LEFT_OUT, Matcher, match
from zoo.blip.surviving_tokens import compacted


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
    """Return scores of texts for each image, ``[I, J]``, and of images for each text, ``[J, I]``.

    The most similar pairs score their similarity plus the logit of a match; the others score ``LEFT_OUT``.

    Args:
        model: The model that matches.
        similar: Products of features, ``[I, J]``.
        image_tokens: ``[I, N, V]``, on any device.
        input_ids: ``[J, T]``.
        attention_mask: ``[J, T]``.
        image_mask: What survives of ``image_tokens`` in a rewritten model, ``[I, N]``
            (:func:`zoo.blip.surviving_tokens.surviving_mask`); None for all. Texts attend to as many tokens as the
            fullest image has.
        candidates: How many are matched for each image, and for each text.
        batch: Pairs that are matched at a time.
    """
    device = input_ids.device
    if image_mask is not None:
        image_tokens, image_mask = compacted(image_tokens, image_mask.to(image_tokens.device))

    def scores(similar: Tensor, images_first: bool) -> Tensor:
        best, columns = similar.topk(min(candidates, similar.shape[1]), dim=1)
        rows = torch.arange(len(similar), device=device).repeat_interleave(columns.shape[1])
        images, texts = (rows, columns.flatten()) if images_first else (columns.flatten(), rows)
        result = torch.full_like(similar, LEFT_OUT)
        for pairs, values in zip(
            torch.arange(len(rows), device=device).split(batch), best.flatten().split(batch), strict=True
        ):
            places = images[pairs].to(image_tokens.device)
            tokens = image_tokens[places].to(device)
            left = None if image_mask is None else image_mask[places].to(device)
            ids, mask = input_ids[texts[pairs]], attention_mask[texts[pairs]]
            result[rows[pairs], columns.flatten()[pairs]] = values + match(model, tokens, ids, mask, left)[:, 1]
        return result

    return scores(similar, True), scores(similar.T, False)
