"""Metrics of the field: functions of a model's answers and the truth, without models or tensors of inputs.

Each file has one: ``accuracy.py`` for right or wrong, ``recall.py`` for retrieval, ``captions.py`` for BLEU and CIDEr (over the
tokens of ``tokens.py``), ``answers.py`` for VQA's accuracy with its normalisation of answers.
"""

from __future__ import annotations

from zoo.metrics.accuracy import accuracy, accuracy_by_kind
from zoo.metrics.answers import answer_score, normalise_answer, vqa_accuracy
from zoo.metrics.captions import bleu, caption_metrics, cider
from zoo.metrics.recall import recalls
from zoo.metrics.tokens import caption_tokens

__all__ = [
    "accuracy",
    "accuracy_by_kind",
    "recalls",
    "bleu",
    "cider",
    "caption_metrics",
    "caption_tokens",
    "vqa_accuracy",
    "answer_score",
    "normalise_answer",
]
