"""Recall of retrieval: :func:`recalls`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from madtp.errors import DataError

DEPTHS = (1, 5, 10)


def recalls(image_to_text: Tensor, text_to_image: Tensor, owners: Sequence[int]) -> dict[str, float]:
    """How often the right text is among the best 1, 5 and 10 for an image, and the right image for a text.

    An image with several captions is found right where any of them is. What scores as high as the best right one counts as
    before it, so that a model that tells nothing apart gets nothing for it.

    Args:
        image_to_text: scores [I, J] of the texts for each image, higher is better.
        text_to_image: scores [J, I] of the images for each text.
        owners: the image that each text belongs to; every image has one text at least.

    Returns:
        `text_r1`, `text_r5`, `text_r10` (a text was looked for), `image_r1` ... (an image was), and `mean_recall` of the
        six, in [0, 1].

    Raises:
        DataError: shapes do not fit, a score is NaN, or an image has no text.
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
    """How many wrong ones stand before the best right one, of each row."""
    best = scores.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
    return ((scores >= best) & ~right).sum(1)
