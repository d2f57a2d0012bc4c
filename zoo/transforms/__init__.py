"""Transforms: turn images and texts of data sets into what models take.

Start with :func:`evaluation` and :func:`training` in ``images.py``. ``augment.py`` has the random augmentation of training,
``texts.py`` cleans captions and questions, ``pairs.py`` exchanges left and right in statements about two images.
"""

from __future__ import annotations

from zoo.transforms.augment import PUBLISHED_OPERATIONS, RandomAugment
from zoo.transforms.images import evaluation, for_model, training
from zoo.transforms.pairs import swap_sides
from zoo.transforms.texts import clean_caption, clean_question

__all__ = [
    "evaluation",
    "training",
    "for_model",
    "RandomAugment",
    "PUBLISHED_OPERATIONS",
    "clean_caption",
    "clean_question",
    "swap_sides",
]
