"""Scenes: a visual-reasoning data set made by rule, pairs of pictures with a statement that is true or false.

Start with :class:`SceneDataset`. ``objects.py`` holds the attributes, ``layout.py`` decides what is in the pictures,
``drawing.py`` draws them, ``statements.py`` says something about them, ``single.py`` captions one of the pictures and asks
about it, ``tokens.py`` turns words into ids, and ``bias.py`` measures what can be guessed without looking or without reading.
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
