"""Pruned models of the zoo on a user's own images: :func:`open_pruned` and :func:`inputs_of_images`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import madtp
from madtp.errors import ConfigError, DataError, UnknownModelError
from madtp.files.images import read_upright
from madtp.pruned import PrunedModel
from zoo.examples import example_inputs
from zoo.registry import create, describe, list_models
from zoo.transforms import for_model


def open_pruned(model: str, checkpoints: Sequence[str] = ()) -> dict[str, PrunedModel]:
    """Open pruned models of one architecture of the zoo, by name.

    Args:
        model: A folder that :func:`madtp.save` wrote, or a name in the zoo.
        checkpoints: Pruned weights of the named model: shipped ones or folders. None takes all shipped ones.

    Raises:
        ConfigError: Checkpoints are given beside a folder, are dense, or none are given and none ship.
        UnknownModelError: It is neither a folder nor a name in the zoo.
        CheckpointError: A folder or checkpoint is missing, damaged, or of another model.
    """
    folder = Path(model)
    if folder.is_dir():
        if checkpoints:
            raise ConfigError(f"{model} is a folder with weights of its own; leave --checkpoint out.")
        return {folder.resolve().name: madtp.load(folder)}
    if model not in list_models():
        try:
            describe(model)
        except UnknownModelError as error:
            raise UnknownModelError(f"{model!r} is no folder, either. {error}") from error
    shipped = [name for name in describe(model).checkpoints if name.startswith("pruned")]
    if not checkpoints and not shipped:
        raise ConfigError(
            f"no pruned weights of {model} ship; make some with `madtp compress` and give the folder, or --checkpoint."
        )
    found: dict[str, PrunedModel] = {}
    for name in checkpoints or shipped:
        opened = create(model, name)
        if not isinstance(opened, PrunedModel):
            raise ConfigError(f"{name} holds a dense {model}, which keeps all tokens; give pruned weights.")
        found[Path(name).name] = opened
    return found


def inputs_of_images(model: nn.Module, images: Sequence[str | Path]) -> dict[str, Any]:
    """Return what a model of the zoo is called with for images in files.

    Images are resized to the model's size, whatever their shape. Texts are made up: the image towers of these models do not
    read them.

    Args:
        model: From :func:`zoo.create` or :func:`madtp.load`.
        images: Files; those of a sample follow each other.

    Raises:
        DataError: A file is no image, or a sample lacks one.
        UnknownModelError: The model does not come from the zoo.
    """
    name = getattr(model, "zoo_name", None)
    if name is None:
        raise UnknownModelError(
            f"this {type(model).__name__} does not come from the zoo, so its inputs are not known; call "
            "madtp.pictures.show(pruned, images, inputs) with those of your own."
        )
    transform = for_model(name)
    pixels = torch.stack([transform(read_upright(Path(image))) for image in images])
    for argument, value in example_inputs(model, 1).items():
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() >= 4:
            each = value[..., 0, 0, 0].numel()
            if len(pixels) % each:
                raise DataError(
                    f"{name} takes {each} images a sample, and {len(pixels)} are given; give {each} for each sample."
                )
            samples = len(pixels) // each
            return {**example_inputs(model, samples), argument: pixels.reshape(samples, *value.shape[1:])}
    raise DataError(f"{name} takes no images, so there is nothing to draw.")
