"""Metrics of the field, as functions of plain answers and truths.

`accuracy.py` counts right answers.
"""

from __future__ import annotations

from zoo.metrics.accuracy import accuracy, accuracy_by_kind

__all__ = ["accuracy", "accuracy_by_kind"]
