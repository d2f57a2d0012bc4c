"""Everything that knows a particular architecture, checkpoint format or data set.

Start with :func:`list_models` and :func:`create`. To add a model, decorate its builder with :func:`register`;
:func:`register_adapter` teaches the zoo example inputs of a family. :func:`data` opens data sets, :func:`list_data` lists them.
"""

from __future__ import annotations

import zoo.blip
import zoo.clip
import zoo.inputs.families
import zoo.llava  # noqa: F401  (these register models and adapters)
from zoo.adapters import Adapter, find_adapter, list_adapters, register_adapter
from zoo.checkpoints.loading import LoadReport, load_checkpoint, save_checkpoint
from zoo.datasets import DataEntry, data, describe_data, list_data, register_data
from zoo.examples import example_inputs, example_inputs_of, find_model
from zoo.registry import ModelEntry, checkpoint_path, create, describe, list_models, register

__all__ = [
    "list_models",
    "create",
    "load_checkpoint",
    "save_checkpoint",
    "LoadReport",
    "register",
    "describe",
    "checkpoint_path",
    "ModelEntry",
    "Adapter",
    "register_adapter",
    "find_adapter",
    "list_adapters",
    "example_inputs",
    "example_inputs_of",
    "find_model",
    "data",
    "list_data",
    "describe_data",
    "register_data",
    "DataEntry",
]
