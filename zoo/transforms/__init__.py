"""Images and texts as models take them. Start with :func:`evaluation` and :func:`training`.

`images.py` holds these two, `augment.py` the random augmentation of training, `texts.py` how captions and questions are
cleaned, `pairs.py` how statements about two images are turned round.
"""

from __future__ import annotations

from zoo.transforms.augment import PUBLISHED_OPERATIONS, RandomAugment
from zoo.transforms.images import evaluation, for_model, training
from zoo.transforms.pairs import turned_round
from zoo.transforms.texts import clean_caption, clean_question

__all__ = [
    "evaluation",
    "training",
    "for_model",
    "RandomAugment",
    "PUBLISHED_OPERATIONS",
    "clean_caption",
    "clean_question",
    "turned_round",
]
