"""What the models of the zoo are evaluated on. Start with :func:`build_task`; `evaluation.py` does all that `madtp eval` does.

A file of each task holds its class, `vocabulary.py` turns texts into ids, `registry.py` says which model is for which task.
"""

from __future__ import annotations

from zoo.tasks.evaluation import EvaluationSettings, evaluate_settings
from zoo.tasks.registry import build_task, task_of

__all__ = ["build_task", "task_of", "EvaluationSettings", "evaluate_settings"]
