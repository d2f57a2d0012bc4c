"""Record one real run of a model: how each of its modules is called.

Start at :func:`record`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from madtp.calls.call import Call, normalise_call
from madtp.calls.fast_path import spelled_out
from madtp.calls.modality_tracking import Tracker
from madtp.calls.objects import CannotFlatten, flattening_error
from madtp.errors import ExampleInputsError
from rewriters.capture.export import blamed_on_the_inputs
from rewriters.capture.scope import Region


@dataclass
class Recorded:
    """The first call of a module.

    Attributes:
        modalities: of the leaves of its inputs, by their path in the call.
        attentions: how many it computes in one run of the model.
        read: positions of tokens that others read in its results.
        state: kind of an object that goes in or comes out, may be read by later calls and cannot be taken apart; None if
            there is none.
        written: place in the call of the one tensor [B, N, C] of which it is known where image features were written among
            text, and these positions [B, N]; None if there is none.
    """

    call: Call
    modalities: dict[str, frozenset[str] | None]
    attentions: int = 0
    read: set[int] = field(default_factory=set)
    state: str | None = None
    written: tuple[str, Tensor] | None = None

    def region(self, path: str) -> Region:
        """The module, at ``path``, as a region."""
        written = "" if self.written is None else self.written[0]
        return Region(path, self.modalities, tuple(sorted(self.read)), written)


@dataclass
class Recording:
    """A run of a model. calls: by module path, of modules that have children. attentions: of the whole run."""

    calls: dict[str, Recorded] = field(default_factory=dict)
    active: list[str] = field(default_factory=list)

    def attended(self) -> None:
        """Count an attention for all modules that are at work."""
        for path in dict.fromkeys(self.active):
            if path in self.calls:
                self.calls[path].attentions += 1


def record(model: nn.Module, call: Call) -> Recording:
    """Run ``model`` once on ``call``, with gradients off, and record how its modules are called.

    Raises:
        ExampleInputsError: the model itself fails.
    """
    recording = Recording()
    tracker = Tracker(call.tensors(), recording.attended)
    handles: list[Any] = []
    for path, module in model.named_modules():
        if not path or not any(True for _ in module.children()):
            continue
        handles.append(module.register_forward_pre_hook(_enter(path, recording, tracker), with_kwargs=True))
        handles.append(module.register_forward_hook(_leave(path, recording, tracker), always_call=True))
    try:
        with blamed_on_the_inputs(model), spelled_out(), torch.no_grad(), torch.random.fork_rng(devices=[]), tracker:
            model(*call.args, **call.kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return recording


def _enter(path: str, recording: Recording, tracker: Tracker) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        recording.active.append(path)
        if path in recording.calls:
            return
        try:
            call = normalise_call(module, args, kwargs)
        except ExampleInputsError:
            return
        state = None
        try:
            call = call.flattened()
        except CannotFlatten as error:
            state = str(error)
        leaves, _ = pytree.tree_flatten_with_path((call.args, call.kwargs))
        modalities = {pytree.keystr(place): tracker.modalities(leaf) for place, leaf in leaves}
        # Containers are copied: the model may change them later in the run.
        recording.calls[path] = Recorded(
            call.with_leaves([leaf for _, leaf in leaves]), modalities, state=state, written=_written(leaves, tracker)
        )

    return hook


def _written(leaves: list[tuple[Any, Any]], tracker: Tracker) -> tuple[str, Tensor] | None:
    found = [(pytree.keystr(place), tracker.image_positions(leaf)) for place, leaf in leaves]
    known = [(place, written) for place, written in found if written is not None]
    return known[0] if len(known) == 1 else None


def _leave(path: str, recording: Recording, tracker: Tracker) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        recording.active.pop()
        if path in recording.calls:
            recorded = recording.calls[path]
            recorded.state = recorded.state or flattening_error(output)
            tracker.watch_reads(output, recorded.read)

    return hook
