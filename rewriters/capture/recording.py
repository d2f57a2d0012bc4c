"""Record one real run of a model: how each of its modules is called.

Start at :func:`record`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from madtp.calls.call import Call, normalise_call
from madtp.calls.fast_path import spelled_out
from madtp.calls.modality_tracking import Tracker
from madtp.calls.objects import CannotFlatten, flattening_error, object_kind
from madtp.calls.texts import holds_texts
from madtp.errors import ExampleInputsError
from madtp.sites.preserved_state import trial_run
from rewriters.capture.export import blamed_on_the_inputs
from rewriters.capture.readers import Readers
from rewriters.capture.scope import Region


@dataclass(frozen=True)
class ImagePositions:
    """The image positions of a text sequence.

    Attributes:
        place: Path of the sequence ``[B, N, C]`` in the call.
        positions: True at the image positions, ``[B, N]``.
    """

    place: str
    positions: Tensor


@dataclass
class RecordedCall:
    """The first call of a module.

    Attributes:
        call: The call, objects in it opened.
        opened: Whether there were objects in it.
        times: Number of calls in one run of the model.
        output: What the first call returned; None before it ends.
        modalities: What the leaves of its inputs descend from, by their place in the call.
        callers: Paths of the modules at work in any of its calls.
        attentions: Number of attentions that the module computes in one call, at most.
        read_positions: Positions of tokens that others read in its results.
        state: Kind of an object that goes in or comes out, may be read by later calls and cannot be opened; None if there
            is none.
        image_positions: Where image features were written among text, in the one argument of which that is known; None if
            there is none.
    """

    call: Call
    modalities: dict[str, frozenset[str] | None]
    callers: set[str] = field(default_factory=set)
    attentions: int = 0
    read_positions: set[int] = field(default_factory=set)
    state: str | None = None
    image_positions: ImagePositions | None = None
    opened: bool = False
    times: int = 1
    output: object = None

    def region(self, path: str) -> Region:
        """The module, at ``path``, as a region."""
        return Region(
            path,
            modalities=self.modalities,
            read_positions=tuple(sorted(self.read_positions)),
            embeddings="" if self.image_positions is None else self.image_positions.place,
        )


@dataclass
class Recording:
    """A run of a model.

    Attributes:
        calls: First call of each module that has children, by module path.
        active: Paths of the modules at work, outermost first.
        counts: Number of attentions that each of these has computed so far.
        readers: Who reads what modules returned.
    """

    calls: dict[str, RecordedCall] = field(default_factory=dict)
    active: list[str] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    readers: Readers = field(init=False)

    def __post_init__(self) -> None:
        self.readers = Readers(self.active)

    def attended(self) -> None:
        """Count an attention for all modules at work."""
        self.counts[:] = [count + 1 for count in self.counts]


def record(model: nn.Module, call: Call) -> Recording:
    """Run ``model`` once on ``call``, with gradients off, and record how its modules are called.

    Raises:
        ExampleInputsError: The model itself fails.
    """
    recording = Recording()
    tracker = Tracker(call.tensors(), recording.attended, tokenises=holds_texts(call))
    handles: list[RemovableHandle] = []
    for path, module in model.named_modules():
        if not path or not any(True for _ in module.children()):
            continue
        handles.append(module.register_forward_pre_hook(_enter(path, recording, tracker), with_kwargs=True))
        handles.append(module.register_forward_hook(_leave(path, recording, tracker), always_call=True))
    try:
        with (
            blamed_on_the_inputs(model),
            spelled_out(),
            torch.no_grad(),
            trial_run(model, (call.args, call.kwargs)),
            tracker,
            recording.readers,
        ):
            model(*call.args, **call.kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return recording


def _enter(
    path: str, recording: Recording, tracker: Tracker
) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    """A hook that records the call of the module at ``path`` that begins."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        callers = set(recording.active)
        recording.active.append(path)
        recording.counts.append(0)
        if path in recording.calls:
            recording.calls[path].callers |= callers
            recording.calls[path].times += 1
            return
        try:
            call = normalise_call(module, args, kwargs)
        except ExampleInputsError:
            return
        state, opened = None, object_kind((call.args, call.kwargs)) is not None
        try:
            call = call.flattened()
        except CannotFlatten as error:
            state = str(error)
        leaves, _ = pytree.tree_flatten_with_path((call.args, call.kwargs))
        modalities = {pytree.keystr(place): tracker.modalities(leaf) for place, leaf in leaves}
        # Containers are copied: the model may change them later in the run.
        recording.calls[path] = RecordedCall(
            call.with_leaves([leaf for _, leaf in leaves]),
            modalities,
            callers,
            state=state,
            opened=opened,
            image_positions=_image_positions(leaves, tracker),
        )

    return hook


def _image_positions(leaves: list[tuple[pytree.KeyPath, Any]], tracker: Tracker) -> ImagePositions | None:
    by_place = {pytree.keystr(place): tracker.image_positions(leaf) for place, leaf in leaves}
    # What was only brought to the shape of the sequence, such as positions, holds no image feature.
    known = [ImagePositions(place, found) for place, found in by_place.items() if found is not None and found.any()]
    return known[0] if len(known) == 1 else None


def _leave(path: str, recording: Recording, tracker: Tracker) -> Callable[[nn.Module, object, object], None]:
    """A hook that records the results of the call of the module at ``path`` that ends."""

    def hook(module: nn.Module, args: object, output: object) -> None:
        recording.active.pop()
        count = recording.counts.pop()
        if path in recording.calls:
            recorded = recording.calls[path]
            recorded.attentions = max(recorded.attentions, count)
            recorded.state = recorded.state or flattening_error(output)
            tracker.watch_reads(output, recorded.read_positions)
            if recorded.times == 1:
                recorded.output = output
                recording.readers.watch(output)

    return hook
