"""Rewrite a model as it was rewritten before: :func:`description_of`, and :func:`rewritten_as`.

Programs are not kept: a description of a pruned model says what :func:`madtp.rewrite` needs to make them again.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import madtp
from madtp.calls.call import Call, Inputs
from madtp.calls.record import recorded_bytes, replay_call
from madtp.config import PruningConfig
from madtp.errors import CheckpointError
from madtp.files.limits import FREE_BYTES, LARGEST_COUNT, check_bytes, count, finite, shown
from madtp.files.tensors import shorten
from madtp.programs.replaced_forward import HOST_CLASS
from madtp.pruned import PrunedModel
from madtp.sites.additions import PREFIX
from madtp.sites.site import PruningSite

CAPTURES = ("", "whole", "regions")
ALIGNMENT_TOKENS = f"{PREFIX}.alignment.tokens"
CAPTURED_OTHERWISE = (
    "the model in {} was captured as {!r}, this one as {!r}, because a check failed on the inputs that it is made from: it may "
    "keep other tokens than the one that was saved. Pass the example_inputs of the first rewrite to load"
)


@dataclass(frozen=True)
class Settings:
    """How a model was rewritten, and how strongly it prunes.

    Attributes:
        identity: which class of model it is, and of which dtype.
        config: the configuration.
        temperature: T of the threshold.
        gain: factor on the threshold.
        static_counts: fixed counts, by site.
        static_room: slots fixed with them.
        sites: the specs of the sites as plain data, by name.
        alignment_width: d_e.
        example: the example call, as :func:`madtp.calls.record.record_call` keeps it.
        capture: whether it was captured ``"whole"`` or by ``"regions"``; empty in files of before.
    """

    identity: Mapping[str, Any]
    config: PruningConfig
    temperature: float
    gain: float
    static_counts: Mapping[str, int]
    static_room: Mapping[str, int]
    sites: Mapping[str, Mapping[str, Any]]
    alignment_width: int
    example: Mapping[str, Any]
    capture: str = ""

    @classmethod
    def of(cls, description: Mapping[str, Any], source: str) -> Settings:
        """Read them from what :func:`description_of` gave.

        Args:
            description: what it gave.
            source: where it comes from, for messages.

        Raises:
            CheckpointError: something is missing or of the wrong type.
        """
        try:
            return cls._of(description)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            raise CheckpointError(f"{source} is damaged: {reason}. Save the model again.") from error

    @classmethod
    def _of(cls, description: Mapping[str, Any]) -> Settings:
        return cls(
            identity=dict(description["model"]),
            config=PruningConfig.from_dict(description["pruning"]),
            temperature=finite(description["temperature"], "temperature"),
            gain=finite(description["gain"], "gain"),
            static_counts={site: count(n, site) for site, n in description["static_counts"].items()},
            static_room={site: count(n, site) for site, n in description.get("static_room", {}).items()},
            sites={_checked_site(site)["name"]: site for site in description["sites"]},
            alignment_width=count(description["alignment_width"], "alignment_width", low=1),
            example=dict(description["example"]),
            capture=_one_of(CAPTURES, description.get("capture", "")),
        )


def check_claims(source: str, settings: Settings, stored: Mapping[str, Tensor]) -> None:
    """Refuse settings that ask for larger tensors than the file holds, before :func:`rewritten_as` makes them.

    Args:
        source: where the settings come from, for messages.
        settings: how the model was rewritten.
        stored: tensors of the file by name, with what pruning added.

    Raises:
        CheckpointError: there are others than the settings say, or the example call is too large.
    """
    if settings.config.alignment:
        wanted = [settings.config.alignment_tokens, settings.alignment_width]
        found = stored.get(ALIGNMENT_TOKENS)
        if found is None or list(found.shape) != wanted:
            held = "none" if found is None else f"those of the shape {list(found.shape)}"
            raise CheckpointError(f"{source} is damaged: its alignment tokens are to be {wanted}, and it holds {held}.")
    most = max(FREE_BYTES, sum(value.nbytes for value in stored.values()))
    try:
        check_bytes("its example call", recorded_bytes(settings.example), most)
    except ValueError as error:
        raise CheckpointError(
            f"{source} cannot be rewritten from what it says of the first call ({error}); pass example_inputs."
        ) from error


def _checked_site(site: Mapping[str, Any]) -> Mapping[str, Any]:
    """A site whose fields are of the types that :class:`~madtp.sites.spec.SiteSpec` has."""
    positions = [*site["protected"], *([] if site["class_position"] is None else [site["class_position"]])]
    for position in positions:
        count(position, "a position", low=-LARGEST_COUNT)
    count(site["width"], "width", low=1)
    for name, kind in (("name", str), ("modality", str), ("causal", bool)):
        if not isinstance(site[name], kind):
            raise TypeError(f"{name!r} of a site is {shown(site[name])}")
    return site


def _one_of(allowed: tuple[str, ...], value: object) -> str:
    if value not in allowed:
        raise ValueError(f"{shown(value)} is none of {', '.join(map(repr, allowed))}")
    return str(value)


def description_of(pruned: PrunedModel) -> dict[str, Any]:
    """Describe a pruned model as plain data, without its tensors."""
    handle, host = pruned.madtp, getattr(type(pruned), HOST_CLASS)
    floats = {
        one.dtype
        for name, one in pruned.state_dict().items()
        if one.is_floating_point() and not name.startswith(f"{PREFIX}.")
    }
    return {
        "madtp": madtp.__version__,
        "torch": str(torch.__version__),
        "model": {
            "class": f"{host.__module__}.{host.__qualname__}",
            "zoo_name": getattr(pruned, "zoo_name", None),
            "dtype": str(floats.pop()).removeprefix("torch.") if len(floats) == 1 else None,
        },
        "pruning": handle.config.to_dict(),
        "temperature": handle.temperature,
        "gain": handle.gain,
        "static_counts": dict(handle.control.static_counts),
        "static_room": dict(handle.control.static_room),
        "sites": [dataclasses.asdict(site.spec) for site in _sites(pruned)],
        "alignment_width": handle.alignment_width,
        "example": handle.example,
        "capture": handle.report.capture,
    }


def rewritten_as(source: str, host: nn.Module, settings: Settings, example_inputs: Inputs | None = None) -> PrunedModel:
    """Rewrite a model with the same sites as before, which may come from an edited plan, and set its strength.

    Args:
        source: where the settings come from, for messages.
        host: the unmodified model.
        settings: how it was rewritten.
        example_inputs: None makes inputs like those of the first rewrite.

    Raises:
        CheckpointError: the model does not have these sites.
        MadtpError: it cannot be rewritten.
    """
    from madtp.api import Plan, rewrite

    inputs = _inputs(source, settings.example, host) if example_inputs is None else example_inputs
    config = settings.config
    free = dataclasses.replace(config, alignment_width=settings.alignment_width)
    # Fixed counts cannot run before they are known, and checking the rewrite runs the model.
    if config.batching == "static":
        free = dataclasses.replace(free, batching="ragged")
    pruned = rewrite(host, inputs, config=free)
    found = {site.spec.name: _plain(dataclasses.asdict(site.spec)) for site in _sites(pruned)}
    wanted = {name: _plain(site) for name, site in settings.sites.items()}
    if found != wanted or pruned.madtp.alignment_width != settings.alignment_width:
        missing = [name for name in wanted if name not in found]
        if missing:
            raise CheckpointError(
                f"{source} prunes at {len(missing)} sites that this model does not have ({shorten(missing)}); pass the model "
                "that was saved, and example_inputs of the same kind."
            )
        plan = _plan_with(Plan.from_dict(pruned.madtp.report.plan), wanted, settings.alignment_width)
        pruned = rewrite(host, inputs, config=free, plan=plan)
    handle = pruned.madtp
    if settings.capture and handle.report.capture != settings.capture:
        handle.notes.add(CAPTURED_OTHERWISE.format(source, settings.capture, handle.report.capture))
    handle.temperature, handle.gain, handle.config = settings.temperature, settings.gain, config
    handle.control.static_counts.update(settings.static_counts)
    handle.control.static_room.update(settings.static_room)
    return pruned


def _plan_with(plan: Any, wanted: Mapping[str, Mapping[str, Any]], width: int) -> Any:
    """A plan with the sites that are wanted, and what was set for them."""
    kept = []
    for site in plan.sites:
        if site.name in wanted:
            chosen = wanted[site.name]
            given = {k: chosen[k] for k in ("class_position", "causal")}
            kept.append(dataclasses.replace(site, protected=tuple(chosen["protected"]), **given))
    return dataclasses.replace(plan, sites=tuple(kept), alignment_width=width)


def _sites(pruned: PrunedModel) -> list[PruningSite]:
    return [module for module in pruned.modules() if isinstance(module, PruningSite)]


def _inputs(source: str, recorded: Mapping[str, Any], host: nn.Module) -> Inputs:
    call = replay_call(recorded)
    if call.args and call.kwargs:
        raise CheckpointError(
            f"{source} was made from positional and named inputs together; pass example_inputs to load."
        )
    device = next((p.device for p in host.parameters()), torch.device("cpu"))
    leaves, spec = Call(call.args, call.kwargs).flat()
    moved = [x.to(device) if isinstance(x, Tensor) else x for x in leaves]
    inputs: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_unflatten(moved, spec)
    args, kwargs = inputs
    return args or kwargs


def _plain(site: Mapping[str, Any]) -> dict[str, Any]:
    """A site as its file holds it: lists for tuples."""
    plain: dict[str, Any] = json.loads(json.dumps(site))
    return plain
