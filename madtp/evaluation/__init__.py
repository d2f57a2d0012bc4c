"""Evaluation of a model, dense or pruned, on a data set; it can be interrupted and resumed.

It takes a model and a task, and returns metrics, compute and the results of each sample. Start with :func:`evaluate`.
``task.py`` says what a task is, ``compute_meter.py`` records MACs and tokens, ``batch_result.py`` is what a batch gives, and
``partial_results.py`` stores it until the evaluation is complete.
"""

from __future__ import annotations

from madtp.evaluation.partial_results import PartialResults
from madtp.evaluation.run import Evaluation, evaluate
from madtp.evaluation.task import Result, Stage, Task

__all__ = ["evaluate", "Evaluation", "PartialResults", "Task", "Stage", "Result"]
