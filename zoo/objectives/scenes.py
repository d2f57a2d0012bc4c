"""The objective on scenes of a model: :func:`scene_objective`, and :func:`dense_scene_objective` to train from scratch.

Both dense training and compression learn by them; the model that learns may be pruned.
"""

from __future__ import annotations

from typing import Any, TypeAlias

from torch import nn

from madtp.errors import ConfigError
from zoo.blip.caption import BlipCaption
from zoo.blip.nlvr import BlipNlvr
from zoo.blip.retrieval import BlipRetrieval
from zoo.blip.vqa import BlipVqa
from zoo.clip.model import Clip
from zoo.objectives.scene_base import PADDING, DenseSceneObjective, SceneObjective
from zoo.objectives.scene_conversations import ConversationObjective
from zoo.objectives.scene_decoders import CaptionObjective, QuestionObjective
from zoo.objectives.scene_pairs import BlipPairObjective, ClipPairObjective
from zoo.objectives.scene_statements import DenseStatementObjective, StatementObjective

__all__ = ["AnySceneObjective", "PADDING", "dense_scene_objective", "scene_objective"]

AnySceneObjective: TypeAlias = SceneObjective[Any, Any]
AnyDenseObjective: TypeAlias = DenseSceneObjective[Any, Any]

_MODELS: tuple[type[nn.Module], ...] = (BlipNlvr, BlipCaption, BlipVqa, BlipRetrieval, Clip)
_LLAVA = "LlavaForConditionalGeneration"


def scene_objective(model: nn.Module, texts: int) -> AnySceneObjective:
    """Return the objective of a model of the zoo.

    Args:
        model: The model.
        texts: Texts about each picture or pair; models that compare pictures with captions have one.

    Raises:
        ConfigError: There is no objective for such a model.
    """
    return StatementObjective(model, texts) if isinstance(model, BlipNlvr) else dense_scene_objective(model, texts)


def dense_scene_objective(model: nn.Module, texts: int) -> AnyDenseObjective:
    """Return the objective of :func:`scene_objective`, in the form that trains a model from scratch."""
    match model:
        case BlipNlvr():
            return DenseStatementObjective(model, texts)
        case BlipCaption():
            return CaptionObjective(model, texts)
        case BlipVqa():
            return QuestionObjective(model, texts)
        case BlipRetrieval():
            return BlipPairObjective(model)
        case Clip():
            return ClipPairObjective(model)
    if type(model).__name__ == _LLAVA:  # transformers need not be installed
        return ConversationObjective(model, texts)
    known = ", ".join([*(kind.__name__ for kind in _MODELS), _LLAVA])
    raise ConfigError(f"scenes have no objective for {type(model).__name__}; there are some for {known}")
