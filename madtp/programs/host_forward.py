"""The forward of a host whose submodules are regions: :class:`HostForward`."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import suppress

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from madtp.calls.call import Call, Signature, normalise_call, signature
from madtp.calls.compare import compare, drawing_alike
from madtp.calls.module_states import ModuleState, ModuleStates
from madtp.calls.objects import CannotFlatten, object_kind
from madtp.cost.counting import Counter
from madtp.errors import ExampleInputsError, ExportError, MadtpError
from madtp.programs.cached_program import without_attributes
from madtp.programs.deferred import settled
from madtp.programs.notes import Notes
from madtp.programs.replaced_forward import ReplacedForward
from madtp.sites.additions import PREFIX
from madtp.sites.control import PruningControl

REMEMBERED = 256
"""Number of call signatures whose MACs outside the regions are remembered."""


class HostForward(ReplacedForward):
    """The forward of a host whose submodules are regions.

    A model that collects values from the inside of a region would miss them. So the first call of each kind (structure,
    constants, training flags, dtypes) is run twice with pruning off, by the original and by the regions. Where the results
    differ, calls of that kind run as the original does from then on.

    Attributes:
        follows_features: a region has to be told the positions of image features, so what the host computes is followed.
        chained: a region is a chain of blocks that the host calls one after the other.
        agreements: by kind of call, whether the regions reproduce the original.
        outside_macs: by call signature, the multiply-accumulates per sample that run outside the regions.
    """

    def __init__(self, host: nn.Module, control: PruningControl, notes: Notes) -> None:
        super().__init__(host)
        self.control, self.notes = control, notes
        self.module_states = ModuleStates(self.module, without=PREFIX)
        self.follows_features = False
        self.chained = False
        self.agreements: dict[Signature, bool] = {}
        self.outside_macs: dict[Signature, float] = {}

    def __call__(self, *args: object, **kwargs: object) -> object:
        control = self.control
        if control.scope.runs_original:
            return self.original(*args, **kwargs)
        try:
            call = normalise_call(self.module, args, kwargs, self.parameters)
        except ExampleInputsError:  # the original says best what is wrong
            return self.original(*args, **kwargs)
        described = call
        with suppress(CannotFlatten):
            described = call.flattened(None)
        kind = signature(described, _all_dims(described), self.module_states())
        with control.call():
            if kind not in self.agreements:
                with control.unrecorded():
                    self.agreements[kind] = self._agrees(call)
            if control.scope.calls > 1:
                result = self._run(kind, args, kwargs)
            else:
                control.begin_program()
                control.record.batch = call.samples()
                result = self._counted(described, kind, args, kwargs)
            result = settled(result)  # the host may leave a chain of blocks before its last one
        self._ignore_own_changes(kind.modules)
        return result

    def _ignore_own_changes(self, before: ModuleState) -> None:
        """Attributes that the host changes itself as it runs, such as counters, do not make another kind of call."""
        if self.module_states().attributes == before.attributes:
            return
        ignored = self.module_states.ignore_differences(before)
        self.agreements = {without_attributes(kind, ignored): agrees for kind, agrees in self.agreements.items()}

    def compiled(self, *args: object, **kwargs: object) -> object:
        """The forward as a compiler follows it: by the regions, whose agreement an earlier call of this kind has shown.

        Raises:
            ExportError: there was none, or it ran as the original does.
        """
        if not self.reproduces(args, kwargs):
            raise ExportError(
                "the regions of the model are not known to reproduce it on such a call: call it once with such inputs before "
                "it is exported. If the report has a note on it, they do not."
            )
        return self._by_regions(args, kwargs)

    def reproduces(self, args: tuple[object, ...], kwargs: Mapping[str, object]) -> bool:
        """Whether an earlier call of this kind has shown that the regions reproduce the original."""
        call = normalise_call(self.module, args, kwargs, self.parameters)
        if object_kind((call.args, call.kwargs)) is not None:
            return False
        return self.agreements.get(signature(call, _all_dims(call), self.module_states()), False)

    def _run(self, kind: Signature, args: tuple[object, ...], kwargs: Mapping[str, object]) -> object:
        return self._by_regions(args, kwargs) if self.agreements[kind] else self._by_original(args, kwargs)

    def _by_original(self, args: tuple[object, ...], kwargs: Mapping[str, object]) -> object:
        with self.control.running_original():
            return self.original(*args, **kwargs)

    def _by_regions(self, args: tuple[object, ...], kwargs: Mapping[str, object]) -> object:
        if not self.follows_features:
            return self.original(*args, **kwargs)
        with self.control.following(x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)):
            return self.original(*args, **kwargs)

    def _counted(self, call: Call, kind: Signature, args: tuple[object, ...], kwargs: Mapping[str, object]) -> object:
        """Run, and count what runs outside the regions if these sizes are new."""
        exact = signature(call, None, kind.modules)
        if exact in self.outside_macs:
            self.control.record.outside_macs = self.outside_macs[exact]
            return self._run(kind, args, kwargs)
        with Counter(lambda: self.control.scope.programs > 0) as counter:
            result = self._run(kind, args, kwargs)
        while len(self.outside_macs) >= REMEMBERED:
            self.outside_macs.pop(next(iter(self.outside_macs)))
        self.outside_macs[exact] = self.control.record.outside_macs = counter.total / (self.control.record.batch or 1)
        return result

    def _agrees(self, call: Call) -> bool:
        """Whether regions reproduce the original on ``call`` with pruning off."""
        try:
            results, before = [], set(self.control.scope.computed_twice)
            for run in (self._by_original, self._by_regions):
                own = call if object_kind((call.args, call.kwargs)) is None else copy.deepcopy(call)
                with torch.no_grad(), drawing_alike(), self.control.unpruned():
                    results.append(settled(run(own.args, own.kwargs)))
            compare(*results, values=not any(m.training for m in self.module.modules()))
        except MadtpError as error:
            self.notes.unpruned(
                type(self.module).__name__,
                f"{error} It collects values from the inside of a "
                "rewritten region; leave the option that asks for them out.",
            )
            return False
        twice = self.control.scope.computed_twice - before
        if twice:
            names = ", ".join(sorted(twice))
            self.notes.unpruned(type(self.module).__name__, f"it reads what blocks inside {names} return.")
        return not twice


def _all_dims(call: Call) -> tuple[tuple[int, ...], ...]:
    leaves = call.flat()[0]
    held = call.cache_leaves()
    return tuple(
        tuple(range(x.dim())) if isinstance(x, Tensor) else (0,) if at in held else () for at, x in enumerate(leaves)
    )
