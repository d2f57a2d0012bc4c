"""Chains: blocks that a model calls one after the other, where no submodule that could be a region holds them all.

Start at :func:`chains_in`. All is seen in one real run: which module is given, as the same object, a tensor that another one
has returned, and who else reads it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from madtp.calls.call import Call
from madtp.calls.objects import object_kind
from madtp.programs.chained_modules import Chain, LinkCall, chained_call
from rewriters.capture.recording import RecordedCall, Recording
from rewriters.capture.scope import Region
from rewriters.plan.plan import Refusal

HIDDEN = "[1]['hidden']"
CALLED_APART = "it is called more or less often than the block after it, so the two cannot be computed together"
KEEPS = "it or the block after it takes an object or has hooks of its own, so the two cannot be computed together"
SEVERAL = "it returns {} tensors, of which one cannot go on by itself"
OTHER_FORM = "what it returns has another form than what it is given, so the block after it cannot be computed with it"
READ = "what it returns is read by more than {}, so the two cannot be computed together"
HELP = "a submodule that runs the blocks"


@dataclass(frozen=True)
class ChainOfBlocks:
    """Modules that are called one after the other, as a region.

    Attributes:
        region: The region.
        call: The call of all modules as one, see :class:`~madtp.programs.chained_modules.ChainedModules`.
    """

    region: Region
    call: Call

    @property
    def names(self) -> tuple[str, ...]:
        """Paths of the modules."""
        assert self.region.chain is not None
        return self.region.chain.names

    def lies_in(self, path: str) -> bool:
        """Whether the module at a path holds all of its modules."""
        return all(map(Region(path).holds, self.names))

    def overlaps(self, other: Region) -> bool:
        """Whether another region is a chain that shares a module with it, or of which one holds a module of the other."""
        if other.chain is None:
            return False
        return any(map(other.holds, self.names)) or any(map(self.region.holds, other.chain.names))


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


def chains_in(
    recording: Recording, model: nn.Module, taken: Sequence[Region], blocks: Collection[str]
) -> list[ChainOfBlocks]:
    """The longest chains of modules that hold two attentions or more, in the order in which they are called.

    Args:
        recording: A run of the model.
        model: The model.
        taken: Regions that chains have to leave alone.
        blocks: Paths of those of them that are single blocks, which a chain may hold.
    """

    def is_free(path: str) -> bool:
        others = [one for one in taken if one.path != path or path not in blocks]
        return not any(one.holds(path) or Region(path).holds(one.path) for one in others)

    handovers = {
        path: one
        for path, one in _handovers(recording)
        if is_free(path) and is_free(one.reader) and _obstacle(path, one, recording, model) is None
    }
    readers = _readers(handovers, recording)
    chains = []
    for first in readers:
        if first in readers.values():
            continue
        names = [first]
        while names[-1] in readers:
            names.append(readers[names[-1]])
        while len(names) > 1 and not recording.calls[names[0]].attentions:
            del names[0]
        if len(names) > 1 and sum(recording.calls[name].attentions for name in names) > 1:
            found = _chain(names, handovers, recording)
            chains += [] if found is None else [found]
    return chains


def _readers(handovers: Mapping[str, _Handover], recording: Recording) -> dict[str, str]:
    """Which module goes on with what another one returned: with the first tensor given to it that is like its own result."""
    going_on: dict[str, str] = {}
    for reader in dict.fromkeys(one.reader for one in handovers.values()):
        sources = {id(one.tensor): path for path, one in handovers.items() if one.reader == reader}
        recorded = recording.calls[reader]
        given, returned = recorded.call.tensors(), _tensors(recorded.output)
        alike = [one for one in given if any(_alike(one, other) for other in returned)]
        first = next((sources[id(one)] for one in alike if id(one) in sources), None)
        if first is not None:
            going_on[first] = reader
    return going_on


def why_no_chain(recording: Recording, model: nn.Module) -> Iterator[Refusal]:
    """Why modules that hand a tensor on, and compute attention, are in no chain.

    Args:
        recording: A run of the model.
        model: The model.
    """
    for path, one in _handovers(recording):
        if not (recording.calls[path].attentions and recording.calls[one.reader].attentions):
            continue
        reason = _obstacle(path, one, recording, model)
        if reason is not None:
            yield Refusal(path, "", reason, HELP)


def _handovers(recording: Recording) -> Iterator[tuple[str, _Handover]]:
    """Modules that return a tensor which another module, called later beside them, is given, with that module."""
    given: dict[int, list[str]] = {}
    for name, recorded in recording.calls.items():
        for leaf in recorded.call.tensors():
            given.setdefault(id(leaf), []).append(name)
    order = {name: number for number, name in enumerate(recording.calls)}
    for path, recorded in recording.calls.items():
        for place, leaf in enumerate(pytree.tree_leaves(recorded.output)):
            takers = given.get(id(leaf), []) if isinstance(leaf, Tensor) else []
            later = (name for name in takers if order[name] > order[path])
            reader = next((name for name in later if recording.calls[name].callers == recorded.callers), None)
            if reader is not None:
                yield path, _Handover(reader, leaf, place)
                break


def _obstacle(path: str, handover: _Handover, recording: Recording, model: nn.Module) -> str | None:
    """Why a module cannot be computed with the one that reads what it returns; None if it can."""
    recorded = recording.calls[path]
    tensors = _tensors(recorded.output)
    if recorded.times != recording.calls[handover.reader].times:
        return CALLED_APART
    if not all(_keeps_nothing(one, recording, model) for one in (path, handover.reader)):
        return KEEPS
    if len(tensors) > 1:
        return SEVERAL.format(len(tensors))
    if not tensors[0].is_floating_point() or not any(_alike(tensors[0], one) for one in recorded.call.tensors()):
        return OTHER_FORM
    if any(handover.reader not in at_work for at_work in recording.readers.of(handover.tensor)):
        return READ.format(handover.reader)
    return None


def _keeps_nothing(path: str, recording: Recording, model: nn.Module) -> bool:
    """Whether a call can wait for those of later modules: it changes and keeps nothing that others may read before."""
    recorded, module = recording.calls[path], model.get_submodule(path)
    # Hooks of the module itself run around its forward, which would not have run yet.
    hooked = module._forward_hooks or module._forward_pre_hooks
    held = recorded.opened or object_kind(recorded.output) is not None
    return recorded.state is None and not held and not hooked


def _tensors(values: object) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype


def _chain(names: list[str], handovers: dict[str, _Handover], recording: Recording) -> ChainOfBlocks | None:
    """The chain of these modules; None if it cannot be told which tensor goes through it."""
    calls = [recording.calls[name] for name in names]
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
