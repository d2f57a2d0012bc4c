"""Chains: blocks that a model calls one after the other, where no submodule that could be a region holds them all.

Start at :func:`chains_in`. All is seen in one real run: which module is given, as the same object, a tensor that another one
has returned, and who else reads it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from madtp.calls.call import Call
from madtp.calls.objects import is_object
from madtp.programs.chained_modules import Chain, LinkCall, chained_call
from rewriters.capture.recording import RecordedCall, Recording
from rewriters.capture.scope import Region

HIDDEN = "[1]['hidden']"


@dataclass(frozen=True)
class ChainOfBlocks:
    """Modules that are called one after the other, as a region.

    Attributes:
        region: The region.
        call: The call of all modules as one, see :class:`~madtp.programs.chained_modules.ChainedModules`.
    """

    region: Region
    call: Call


@dataclass(frozen=True)
class _Handover:
    """A tensor that goes from one module to another.

    Attributes:
        reader: Path of the module that is given it.
        tensor: The tensor.
        place: Which leaf it is of what the first module returned.
    """

    reader: str
    tensor: Tensor
    place: int


def chains_in(recording: Recording, model: nn.Module) -> list[ChainOfBlocks]:
    """The longest chains of modules that hold two attentions or more, in the order in which they are called.

    Args:
        recording: A run of the model.
        model: The model.
    """
    candidates = {path: one for path, one in recording.calls.items() if _may_be_chained(model.get_submodule(path), one)}
    handovers = {path: one for path in candidates if (one := _handover(path, candidates, recording)) is not None}
    readers = {one.reader for one in handovers.values()}
    chains = []
    for first in candidates:
        if first not in handovers or first in readers:
            continue
        names = [first]
        while names[-1] in handovers:
            names.append(handovers[names[-1]].reader)
        while len(names) > 1 and not candidates[names[0]].attentions:
            del names[0]
        if len(names) > 1 and sum(candidates[name].attentions for name in names) > 1:
            found = _chain(names, candidates, handovers, recording)
            chains += [] if found is None else [found]
    return chains


def _may_be_chained(module: nn.Module, recorded: RecordedCall) -> bool:
    """Whether a call can wait for the calls of later modules: it changes and keeps nothing that others may read before."""
    # Hooks of the module itself run around its forward, which would not have run yet.
    hooked = module._forward_hooks or module._forward_pre_hooks
    return recorded.times == 1 and recorded.state is None and not recorded.opened and not hooked


def _handover(path: str, candidates: dict[str, RecordedCall], recording: Recording) -> _Handover | None:
    """What a module hands over to another one that is called beside it; None if others read it, too, or nobody does."""
    recorded = candidates[path]
    leaves = pytree.tree_leaves(recorded.output)
    tensors = [(place, leaf) for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    if len(tensors) != 1 or any(is_object(leaf) for leaf in leaves):
        return None
    place, tensor = tensors[0]
    if not tensor.is_floating_point() or not any(_alike(tensor, one) for one in recorded.call.tensors()):
        return None
    at_work = recording.readers.of(tensor)
    for name, other in candidates.items():
        beside = name != path and other.callers == recorded.callers
        if beside and any(leaf is tensor for leaf in other.call.tensors()) and all(name in names for names in at_work):
            return _Handover(name, tensor, place)
    return None


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype


def _chain(
    names: list[str], candidates: dict[str, RecordedCall], handovers: dict[str, _Handover], recording: Recording
) -> ChainOfBlocks | None:
    """The chain of these modules; None if it cannot be told which tensor goes through it."""
    calls = [candidates[name] for name in names]
    received = [handovers[name].tensor for name in names[:-1]]
    start = _start(calls, received[0])
    if start is None:
        return None
    place, hidden = start
    links = [LinkCall(one.call, tensor) for one, tensor in zip(calls, (hidden, *received), strict=True)]
    call = chained_call(links, [handovers[name].place for name in names[:-1]])
    last = calls[-1]
    positions = calls[0].image_positions
    told = positions is not None and positions.place == place
    region = Region(
        modalities=dict(_modalities(calls, call)),
        read_positions=tuple(sorted(last.read_positions)),
        embeddings=HIDDEN if told else "",
        chain=Chain(tuple(names), place),
    )
    if told and positions is not None:
        call = call.with_image_positions(positions.positions)
    return ChainOfBlocks(region, call)


def _start(calls: list[RecordedCall], handed_over: Tensor) -> tuple[str, Tensor] | None:
    """Place and value of the tensor that goes through a chain, in the call of its first module.

    It stands where the second module is given it, or is the first that is like it.
    """
    first, second = (pytree.tree_flatten_with_path((one.call.args, one.call.kwargs))[0] for one in calls[:2])
    places = [pytree.keystr(place) for place, leaf in second if leaf is handed_over]
    alike = [
        (pytree.keystr(place), leaf) for place, leaf in first if isinstance(leaf, Tensor) and _alike(leaf, handed_over)
    ]
    return next((one for one in alike if one[0] in places), alike[0] if alike else None)


def _modalities(calls: list[RecordedCall], together: Call) -> Iterator[tuple[str, frozenset[str] | None]]:
    """What the tensors of the call of all modules as one descend from, by their place in it."""
    known: dict[int, frozenset[str] | None] = {}
    for one in calls:
        for place, leaf in pytree.tree_flatten_with_path((one.call.args, one.call.kwargs))[0]:
            known.setdefault(id(leaf), one.modalities.get(pytree.keystr(place)))
    for place, leaf in pytree.tree_flatten_with_path((together.args, together.kwargs))[0]:
        if isinstance(leaf, Tensor):
            yield pytree.keystr(place), known[id(leaf)]
