"""Save a pruned model and load it again: :func:`save`, :func:`load`. Files are safetensors and JSON, never pickle.

Besides the tensors, a folder holds what :func:`madtp.rewrite` needs to do its work again: the configuration, the sites, and a
record of the example call. ``madtp/saving/model_folder.py`` knows the files.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from madtp.calls.call import Inputs
from madtp.calls.quantised import quantised_modules
from madtp.errors import ArgumentError, CheckpointError, ConfigError, UnknownModelError
from madtp.files.limits import shown
from madtp.files.tensors import COMPUTED, check_kinds, check_values, shorten
from madtp.pruned import PrunedModel
from madtp.pruned.arguments import check_model, check_pruned
from madtp.saving.host_folder import is_host_folder, load_host_folder
from madtp.saving.model_folder import CONFIG, narrowed, read_folder, write_folder
from madtp.saving.rewriting_again import Settings, check_claims, description_of, rewritten_as
from madtp.sites.additions import PREFIX


def save(pruned: PrunedModel, folder: str | Path, *, dtype: torch.dtype | None = None) -> Path:
    """Write a pruned model: all its tensors, its settings, and how to rewrite the original again.

    A saved model that the folder already holds is replaced in one step. Other files in the folder are left alone.

    Args:
        pruned: a model from :func:`madtp.rewrite` or :func:`load`.
        folder: is created if it does not exist.
        dtype: stores floating-point tensors in this type (``torch.float16`` halves the files, at its precision);
            :func:`load` casts back to the model's own type. None stores every tensor as it is, and loading reproduces outputs
            exactly.

    Returns:
        The folder.

    Raises:
        ArgumentError: ``pruned`` is no pruned model, or ``folder`` no path.
        CheckpointError: the folder cannot be written or belongs to something else, or a tensor holds NaN, is sparse or of a
            type such as float8, or does not fit ``dtype``.
        ConfigError: ``dtype`` is not a floating-point type.
    """
    check_pruned(pruned)
    folder = _folder(folder)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ConfigError(f"dtype is {dtype!r}; allowed: a floating-point torch.dtype such as torch.float16, or None")
    tensors: Mapping[str, Tensor] = pruned.state_dict()
    _refuse_quantised(pruned, tensors)
    unreal = [name for name, value in tensors.items() if value.is_meta]
    if unreal:
        raise CheckpointError(
            f"{shorten(unreal)} lie on the meta device and hold no values; load weights before saving."
        )
    check_kinds("the model", tensors)
    _refuse_nan("the model", tensors)
    description = description_of(pruned)
    write_folder(folder, tensors if dtype is None else narrowed(tensors, dtype), description)
    return folder


def load(folder: str | Path, model: nn.Module | None = None, *, example_inputs: Inputs | None = None) -> PrunedModel:
    """Read a pruned model that :func:`save` wrote, or ``save_pretrained`` of a pruned model.

    Args:
        folder: the folder with the saved model.
        model: an unmodified model of the saved architecture. The result shares its parameters, so its weights are replaced by
            the saved ones. None builds it through the zoo, if it came from there. For a folder of ``save_pretrained`` it is
            needed: what the host's ``from_pretrained`` reads from it.
        example_inputs: as for :func:`madtp.rewrite`. None makes inputs like those of the first rewrite.

    Returns:
        The pruned model with its temperature and gain, in the mode (train or eval) of ``model``.

    Raises:
        ArgumentError: ``folder`` is no path, or ``model`` no model.
        CheckpointError: the folder is missing, damaged, foreign, newer, or of another model. ``model`` is unchanged then.
        MadtpError: the model cannot be rewritten.
    """
    folder = _folder(folder)
    if model is not None:
        check_model(model)
    if is_host_folder(folder):
        return load_host_folder(folder, model, example_inputs)
    tensors, description = read_folder(folder)
    settings = Settings.of(description, str(folder / CONFIG))
    identity = settings.identity
    _refuse_nan(str(folder), tensors)
    host = _create(folder, identity) if model is None else model
    bare = {name: value for name, value in tensors.items() if not name.startswith(f"{PREFIX}.")}
    _check_fit(folder, identity, host, own=host.state_dict(), stored=bare)
    check_claims(str(folder), settings, tensors)
    pruned = rewritten_as(str(folder), host, settings, example_inputs)
    own = pruned.state_dict()
    _check_fit(folder, identity, host, own=own, stored=tensors)
    with torch.no_grad():
        for name, value in tensors.items():
            own[name].copy_(value)
    return pruned


def _folder(folder: object) -> Path:
    if not isinstance(folder, (str, os.PathLike)):
        raise ArgumentError(
            f"folder is of type {type(folder).__name__}; pass a path, as in madtp.save(pruned, folder) and "
            "madtp.load(folder, model)."
        )
    return Path(folder)


def _create(folder: Path, identity: Mapping[str, object]) -> nn.Module:
    import zoo

    name = identity.get("zoo_name")
    if name is None:
        raise CheckpointError(
            f"{folder} holds a pruned {identity.get('class')}, which the zoo did not make; build the unmodified model and "
            "pass it: madtp.load(folder, model)."
        )
    try:
        model = zoo.create(str(name))
    except UnknownModelError as error:
        raise CheckpointError(
            f"{folder} holds the zoo model {shown(name)}, which is not registered here ({error}); import what registers it, or "
            "pass model."
        ) from error
    if identity.get("dtype") is None:
        return model
    dtype = getattr(torch, str(identity["dtype"]), None)
    if dtype not in COMPUTED or not dtype.is_floating_point:
        raise CheckpointError(
            f"{folder} holds a model in {shown(identity['dtype'])}, which is no floating-point type of torch; save it again."
        )
    return model.to(dtype)


def _refuse_quantised(pruned: PrunedModel, tensors: Mapping[str, object]) -> None:
    """Refuse weights that safetensors cannot store: subclasses of tensors, and objects of other kinds."""
    packed = quantised_modules(pruned)
    kinds = [
        f"{name} ({type(value).__name__})"
        for name, value in tensors.items()
        if not isinstance(value, Tensor) or type(value.data) is not Tensor
    ]
    if packed or kinds:
        raise CheckpointError(
            f"safetensors cannot store quantised weights: {shorten(packed or kinds)}. Save the model before it is quantised, "
            "and quantise what madtp.load returns."
        )


def _refuse_nan(owner: str, tensors: Mapping[str, Tensor]) -> None:
    bad = [name for name, value in tensors.items() if value.is_floating_point() and bool(value.isnan().any())]
    if bad:
        raise CheckpointError(f"{owner} holds NaN in {len(bad)} tensors ({shorten(bad)}); its training diverged.")


def _check_fit(
    folder: Path,
    identity: Mapping[str, object],
    host: nn.Module,
    *,
    own: Mapping[str, Tensor],
    stored: Mapping[str, Tensor],
) -> None:
    """Refuse stored tensors that do not fit the model's own, before any is copied."""
    missing = [name for name in own if name not in stored]
    unexpected = [name for name in stored if name not in own]
    faults = [
        f"{len(names)} {kind} ({shorten(names)})"
        for kind, names in (("missing", missing), ("unexpected", unexpected))
        if names
    ]
    shapes = [
        f"{name} is {list(stored[name].shape)} in the folder and {list(value.shape)} in the model"
        for name, value in own.items()
        if name in stored and stored[name].shape != value.shape
    ]
    if shapes:
        faults.append(f"{len(shapes)} of another shape ({shorten(shapes)})")
    if faults:
        raise CheckpointError(
            f"{folder} holds a pruned {identity.get('class')} and does not fit this {type(host).__name__}: of {len(own)} "
            f"tensors {', '.join(faults)}. Pass the model that was saved, unmodified and of the same size."
        )
    check_values(str(folder), own=own, stored=stored)
