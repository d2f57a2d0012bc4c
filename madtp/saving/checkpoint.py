"""Save a pruned model and load it again: :func:`save`, :func:`load`. Files are safetensors and JSON, never pickle.

Besides the tensors, a folder holds what :func:`madtp.rewrite` needs to do its work again: the configuration, the sites, and a
record of the example call. ``madtp/saving/model_folder.py`` knows the files.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import madtp
from madtp.calls.call import Call, Inputs
from madtp.calls.record import replay_call
from madtp.config import PruningConfig
from madtp.errors import CheckpointError, ConfigError, UnknownModelError
from madtp.pruned import PrunedModel
from madtp.saving.model_folder import CONFIG, narrowed, read_folder, shorten, write_folder
from madtp.sites.additions import PREFIX, additions_of
from madtp.sites.site import PruningSite


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
        CheckpointError: the folder cannot be written or belongs to something else, or a tensor holds NaN or does not fit
            ``dtype``.
        ConfigError: ``dtype`` is not a floating-point type.
    """
    folder = Path(folder)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ConfigError(f"dtype is {dtype!r}; allowed: a floating-point torch.dtype such as torch.float16, or None")
    tensors: Mapping[str, Tensor] = pruned.state_dict()
    unreal = [name for name, value in tensors.items() if value.is_meta]
    if unreal:
        raise CheckpointError(
            f"{shorten(unreal)} lie on the meta device and hold no values; load weights before saving."
        )
    _refuse_nan("the model", tensors)
    description = _describe(pruned, tensors)
    write_folder(folder, tensors if dtype is None else narrowed(tensors, dtype), description)
    return folder


def load(folder: str | Path, model: nn.Module | None = None, *, example_inputs: Inputs | None = None) -> PrunedModel:
    """Read a pruned model that :func:`save` wrote.

    Args:
        folder: the folder with the saved model.
        model: an unmodified model of the saved architecture. The result shares its parameters, so its weights are replaced by
            the saved ones. None builds it through the zoo, if it came from there.
        example_inputs: as for :func:`madtp.rewrite`. None makes inputs like those of the first rewrite.

    Returns:
        The pruned model with its temperature and gain, in the mode (train or eval) of ``model``.

    Raises:
        CheckpointError: the folder is missing, damaged, foreign, newer, or of another model. ``model`` is unchanged then.
        MadtpError: the model cannot be rewritten.
    """
    folder = Path(folder)
    tensors, description = read_folder(folder)
    try:
        config = PruningConfig.from_dict(description["pruning"])
        temperature, gain = float(description["temperature"]), float(description["gain"])
        counts = {str(site): int(count) for site, count in description["static_counts"].items()}
        room = {str(site): int(count) for site, count in description.get("static_room", {}).items()}
        sites = {site["name"]: site for site in description["sites"]}
        width = int(description["alignment_width"])
        identity, recorded = dict(description["model"]), dict(description["example"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{folder / CONFIG} is damaged: {type(error).__name__}: {error}. Save the model again."
        ) from error
    _refuse_nan(str(folder), tensors)
    host = _create(folder, identity) if model is None else model
    bare = {name: value for name, value in tensors.items() if not name.startswith(f"{PREFIX}.")}
    _check_fit(folder, identity, host, own=host.state_dict(), stored=bare)
    inputs = _inputs(folder, recorded, host) if example_inputs is None else example_inputs
    # Fixed counts cannot run before they are known, and checking the rewrite runs the model.
    free = dataclasses.replace(config, batching="ragged") if config.batching == "static" else config
    pruned = _rewrite_as(folder, host, inputs, free, sites=sites, width=width)
    own = pruned.state_dict()
    _check_fit(folder, identity, host, own=own, stored=tensors)
    with torch.no_grad():
        for name, value in tensors.items():
            own[name].copy_(value)
    pruned.temperature, pruned.gain = temperature, gain
    pruned.config = pruned._control.config = config
    pruned._control.static_counts.update(counts)
    pruned._control.static_room.update(room)
    return pruned


def _describe(pruned: PrunedModel, tensors: Mapping[str, Tensor]) -> dict[str, object]:
    host, sites = pruned._host, _sites(pruned)
    floats = {v.dtype for k, v in tensors.items() if v.is_floating_point() and not k.startswith(f"{PREFIX}.")}
    return {
        "madtp": madtp.__version__,
        "torch": str(torch.__version__),
        "model": {
            "class": f"{type(host).__module__}.{type(host).__qualname__}",
            "zoo_name": getattr(host, "zoo_name", None),
            "dtype": str(floats.pop()).removeprefix("torch.") if len(floats) == 1 else None,
        },
        "pruning": pruned.config.to_dict(),
        "temperature": pruned.temperature,
        "gain": pruned.gain,
        "static_counts": dict(pruned._control.static_counts),
        "static_room": dict(pruned._control.static_room),
        "sites": [dataclasses.asdict(site.spec) for site in sites],
        "alignment_width": additions_of(host).alignment_width,
        "example": pruned.example,
    }


def _sites(pruned: PrunedModel) -> list[PruningSite]:
    return [module for module in pruned.modules() if isinstance(module, PruningSite)]


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
            f"{folder} holds the zoo model {name!r}, which is not registered here ({error}); import what registers it, or "
            "pass model."
        ) from error
    dtype = getattr(torch, str(identity.get("dtype")), None)
    return model.to(dtype) if isinstance(dtype, torch.dtype) else model


def _inputs(folder: Path, recorded: Mapping[str, Any], host: nn.Module) -> Inputs:
    call = replay_call(recorded)
    if call.args and call.kwargs:
        raise CheckpointError(
            f"{folder} was made from positional and named inputs together; pass example_inputs to load."
        )
    device = next((p.device for p in host.parameters()), torch.device("cpu"))
    leaves, spec = Call(call.args, call.kwargs).flat()
    moved = [x.to(device) if isinstance(x, Tensor) else x for x in leaves]
    inputs: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_unflatten(moved, spec)
    args, kwargs = inputs
    return args or kwargs


def _rewrite_as(
    folder: Path,
    host: nn.Module,
    inputs: Inputs,
    config: PruningConfig,
    *,
    sites: Mapping[str, Mapping[str, Any]],
    width: int,
) -> PrunedModel:
    """Rewrite with the saved sites, which may come from an edited plan."""
    from madtp.api import Plan, rewrite

    pruned = rewrite(host, inputs, config=config)
    found = {site.spec.name: _plain(dataclasses.asdict(site.spec)) for site in _sites(pruned)}
    wanted = {name: _plain(site) for name, site in sites.items()}
    if found == wanted and additions_of(pruned._host).alignment_width == width:
        return pruned
    missing = [name for name in wanted if name not in found]
    if missing:
        raise CheckpointError(
            f"{folder} prunes at {len(missing)} sites that this model does not have ({shorten(missing)}); pass the model "
            "that was saved, and example_inputs of the same kind."
        )
    plan = Plan.from_dict(pruned.report.plan)
    kept = []
    for site in plan.sites:
        if site.name in wanted:
            chosen = wanted[site.name]
            given = {k: chosen[k] for k in ("class_position", "causal")}
            kept.append(dataclasses.replace(site, protected=tuple(chosen["protected"]), **given))
    return rewrite(
        host, inputs, config=config, plan=dataclasses.replace(plan, sites=tuple(kept), alignment_width=width)
    )


def _plain(site: Mapping[str, Any]) -> dict[str, Any]:
    """A site as its file holds it: lists for tuples."""
    plain: dict[str, Any] = json.loads(json.dumps(site))
    return plain


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
