"""Data sets under one interface. Start with :func:`data` and :func:`list_data`.

``records.py`` says what a sample is, ``registry.py`` holds the names. ``nlvr.py``, ``captions.py`` and ``questions.py`` read
the files that the field uses, and ``files.py`` refuses those that are damaged. ``scenes.py`` draws pictures by rule.
"""

from __future__ import annotations

import zoo.datasets.captions
import zoo.datasets.nlvr
import zoo.datasets.questions
import zoo.datasets.scenes  # noqa: F401  (these register what they hold)
from zoo.datasets.questions import answer_list
from zoo.datasets.records import CaptionedImage, DataSet, PairStatement, Question, Sample, one_caption_each
from zoo.datasets.registry import DataEntry, data, describe_data, list_data, register_data

__all__ = [
    "data",
    "list_data",
    "describe_data",
    "register_data",
    "DataEntry",
    "DataSet",
    "Sample",
    "PairStatement",
    "CaptionedImage",
    "Question",
    "one_caption_each",
    "answer_list",
]
