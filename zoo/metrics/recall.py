"""Recall in retrieval: :func:`recalls`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from madtp.errors import DataError

DEPTHS = (1, 5, 10)


def recalls(image_to_text: Tensor, text_to_image: Tensor, owners: Sequence[int]) -> dict[str, float]:
    """Return how often a right text is among the best 1, 5 and 10 for an image, and the right image for a text.

    For an image with several captions, any of them is right. Wrong ones that score as high as the best right one are ranked
    before it: a model that gives everything the same score recalls nothing.

    Args:
        image_to_text: Scores of the J texts for each of I images, ``[I, J]``; higher is better.
        text_to_image: Scores of the images for each text, ``[J, I]``.
        owners: The image that each text belongs to. Every image has at least one text.

    Returns:
        Fractions: ``text_r1``, ``text_r5`` and ``text_r10`` of images for which a text is sought, ``image_r1`` and so on of
        texts for which an image is sought, and ``mean_recall``, the mean of the six.

    Raises:
        DataError: Shapes do not fit, a score is NaN, or an image has no text.
    """
    images, texts = image_to_text.shape
    if text_to_image.shape != (texts, images) or len(owners) != texts:
        raise DataError(
            f"scores are {list(image_to_text.shape)} and {list(text_to_image.shape)} for {len(owners)} texts; the second has "
            "to be the other way round."
        )
    if bool(image_to_text.isnan().any() | text_to_image.isnan().any()):
        raise DataError("a score is NaN; check the weights.")
    belongs = torch.zeros(images, texts, dtype=torch.bool)
    belongs[torch.as_tensor(owners), torch.arange(texts)] = True
    if not bool(belongs.any(1).all()):
        raise DataError("an image has no text; recall needs one for each.")
    found = {
        f"{what}_r{depth}": float((rank < depth).double().mean())
        for what, rank in (
            ("text", _ranks(image_to_text.cpu(), belongs)),
            ("image", _ranks(text_to_image.cpu(), belongs.T)),
        )
        for depth in DEPTHS
    }
    return {**found, "mean_recall": sum(found.values()) / len(found)}


def _ranks(scores: Tensor, right: Tensor) -> Tensor:
    """Return for each row how many wrong ones are ranked before the best right one."""
    best = scores.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
    return ((scores >= best) & ~right).sum(1)
