"""Evaluation of a model, dense or pruned, on a data set, batch by batch, so that it can be interrupted and resumed.

Start with :func:`evaluate`. `task.py` says what a task is, `meter.py` records compute and tokens, `parts.py` keeps what is
done.
"""

from __future__ import annotations

from madtp.evaluation.parts import Parts
from madtp.evaluation.run import Evaluation, evaluate
from madtp.evaluation.task import Result, Stage, Task

__all__ = ["evaluate", "Evaluation", "Parts", "Task", "Stage", "Result"]
