"""Scenes: a data set for visual reasoning that is drawn by rule, pairs of pictures with a statement that is true or false.

Start with :class:`SceneDataset` in ``dataset.py``. A seed, a split and an index give an item: ``objects.py`` has its attributes
and random numbers, ``layout.py`` decides what the pictures hold, ``drawing.py`` draws them with the shapes of ``sprites.py``,
``statements.py`` makes statements from the noun phrases of ``phrases.py`` and the relations of ``spatial.py``. ``single.py``
captions one of the pictures and asks about it, ``tokens.py`` turns words into ids, and ``bias.py`` measures what can be guessed
without looking or without reading.
"""

from __future__ import annotations

from zoo.scenes.dataset import Batch, Item, Sample, SceneDataset, collate, draw_sample, normalise, resize
from zoo.scenes.tokens import VOCABULARY, encode, tokenizer

__all__ = [
    "SceneDataset",
    "collate",
    "draw_sample",
    "normalise",
    "resize",
    "encode",
    "tokenizer",
    "VOCABULARY",
    "Item",
    "Batch",
    "Sample",
]
