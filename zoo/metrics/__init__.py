"""Metrics of the field, as functions of plain answers and truths.

`accuracy.py` counts right answers, `recall.py` is for retrieval, `captions.py` has BLEU and CIDEr (over the tokens of
`tokens.py`), `answers.py` VQA's accuracy with its normalisation of answers.
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
