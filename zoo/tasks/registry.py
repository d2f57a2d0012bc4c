"""Which task a model of the zoo is for: :func:`build_task`. Models of others call :func:`register_task`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import nn

from madtp.errors import ConfigError, DataError, UnknownModelError
from madtp.evaluation.task import Task
from zoo.datasets.questions import answer_list
from zoo.datasets.records import DataSet
from zoo.datasets.registry import TASKS, describe_data
from zoo.tasks.answering import Answering
from zoo.tasks.captioning import Captioning
from zoo.tasks.conversing import Conversing
from zoo.tasks.encode_text import clip_texts
from zoo.tasks.reasoning import Reasoning
from zoo.tasks.retrieval import ClipRetrieval, Retrieval
from zoo.tasks.vocabulary import Words, words_for


@dataclass(frozen=True)
class TaskRequest:
    """What a task is built of.

    Attributes:
        model: The dense model.
        data: The data set.
        device: Device of the model.
        vocabulary: See :func:`zoo.tasks.vocabulary.words_for`.
        answers: Answers that a model for questions chooses from; None lets it write them.
    """

    model: Any
    data: DataSet[Any]
    device: torch.device
    vocabulary: Path | None = None
    answers: Sequence[str] | None = None

    @property
    def words(self) -> Words:
        """The words of a BLIP model."""
        return words_for(self.model.config.text.vocabulary, self.vocabulary)


Builder = Callable[[TaskRequest], Task]

_TASKS: dict[str, tuple[str, Builder]] = {
    "blip_nlvr*": ("reasoning", lambda request: Reasoning(request.data, request.words, request.device)),
    "blip_retrieval*": ("retrieval", lambda r: Retrieval(r.data, r.words, r.device, r.model)),
    "clip_*": ("retrieval", lambda r: ClipRetrieval(r.data, r.device, clip_texts(r.model.config, r.vocabulary))),
    "blip_caption*": ("captioning", lambda r: Captioning(r.data, r.words, r.device, r.model)),
    "blip_vqa*": ("questions", lambda r: Answering(r.data, r.words, r.device, r.model, r.answers)),
    "llava_*": ("questions", lambda request: Conversing(request.data, request.device, request.model)),
}
"""Task (one of :data:`zoo.datasets.registry.TASKS`) and its builder, by pattern of a model's name."""


def register_task(models: str, task: str, builder: Builder) -> None:
    """Say which task models are for, so that ``madtp eval`` takes them.

    Args:
        models: A name, or a shell-style pattern of names.
        task: One of :data:`zoo.datasets.registry.TASKS`.
        builder: Makes the task; ``lambda r: Reasoning(r.data, r.words, r.device)``, say.

    Raises:
        ConfigError: There is no such task, or the pattern has one already.
    """
    if task not in TASKS:
        raise ConfigError(f"{models!r} is for {task!r}; tasks are {', '.join(TASKS)}.")
    if models in _TASKS:
        raise ConfigError(f"The models {models!r} have a task already; choose another name.")
    _TASKS[models] = (task, builder)


def task_of(model: str) -> str:
    """Return the name of the task that a model of the zoo is for.

    Raises:
        UnknownModelError: The model is for no task that can be evaluated.
    """
    return _find(model)[0]


def build_task(
    name: str,
    model: nn.Module,
    data: DataSet[Any],
    device: torch.device,
    *,
    vocabulary: Path | None = None,
    answers: Path | None = None,
) -> Task:
    """Return the task of a model on a data set.

    Args:
        name: Name of the model in the zoo.
        model: The dense model; its configuration is read.
        data: The data set, with the transform of the model.
        device: Device of the model.
        vocabulary: See :func:`zoo.tasks.vocabulary.words_for`.
        answers: A JSON list of the answers that a model for questions chooses from. None lets it write them.

    Raises:
        DataError: The data set serves another task, or the vocabulary does not fit the model.
        UnknownModelError: The model is for no task that can be evaluated.
    """
    task, builder = _find(name)
    served = describe_data(data.name).tasks
    if task not in served:
        raise DataError(
            f"{name} is for {task} and {data.name} for {' and '.join(served)}; choose a data set for {task}."
        )
    listed = None if answers is None else answer_list(answers)
    return builder(TaskRequest(model, data, device, vocabulary, listed))


def _find(model: str) -> tuple[str, Builder]:
    for pattern, entry in _TASKS.items():
        if fnmatchcase(model, pattern):
            return entry
    raise UnknownModelError(
        f"{model!r} cannot be evaluated; models that can: {', '.join(_TASKS)}. zoo.tasks.register_task adds one."
    )
