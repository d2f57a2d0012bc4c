"""What the models of the zoo are evaluated on: tasks take a model and a data set, and give metrics.

Start with :func:`build_task`. ``registry.py`` says which model is for which task; ``reasoning.py``, ``retrieval.py``,
``captioning.py`` and ``answering.py`` hold one task each. ``vocabulary.py`` and ``encode_text.py`` turn texts into ids.
``evaluation.py`` does all that ``madtp eval`` does. ``own_images.py`` runs models on images of the user's.
"""

from __future__ import annotations

from zoo.tasks.evaluation import EvaluationSettings, evaluate_settings
from zoo.tasks.registry import build_task, register_task, task_of

__all__ = ["build_task", "task_of", "register_task", "EvaluationSettings", "evaluate_settings"]
