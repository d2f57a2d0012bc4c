"""The forward of a host whose submodules are regions: :class:`HostForward`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from madtp.calls.agreement import Run, differ_by_rounding, require_agreement, starting_with
from madtp.calls.call import Call, Signature, normalise_call, signature
from madtp.calls.double_precision import DoublePrecision, in_double_precision
from madtp.calls.fast_path import spelled_out
from madtp.calls.module_states import ModuleState, ModuleStates
from madtp.calls.objects import CannotFlatten, object_kind, objects_in
from madtp.calls.stored_tensors import Entry, StoredTensors, put_others
from madtp.cost.counting import Counter
from madtp.errors import ExampleInputsError, ExportError, MadtpError, RewriteError
from madtp.programs.cached_program import without_attributes
from madtp.programs.cached_steps import CachedSteps, with_own_caches
from madtp.programs.deferred import settled
from madtp.programs.notes import Notes
from madtp.programs.program_cache import ProgramCache
from madtp.programs.replaced_forward import ReplacedForward
from madtp.sites.additions import PREFIX
from madtp.sites.control import PruningControl
from madtp.sites.preserved_state import trial_run
from madtp.sites.steady_draws import comparable_draws, values_are_comparable

REMEMBERED = 256
"""Number of call signatures whose MACs outside the regions are remembered."""
COLLECTED = "It may collect values from the inside of a rewritten region; then leave the option that asks for them out."
Forward: TypeAlias = Callable[[tuple[object, ...], Mapping[str, object]], object]
LARGEST = 1e9
"""Number of parameters up to which a copy in double precision is made to tell rounding from a fault."""


class HostForward(ReplacedForward):
    """The forward of a host whose submodules are regions.

    A model that collects values from the inside of a region would miss them. So the first call of each kind (structure,
    constants, training flags, dtypes) is run twice with pruning off, by the original and by the regions. Where the results
    differ by more than rounding, calls of that kind run as the original does from then on.

    Attributes:
        programs: the programs of the regions.
        follows_features: a region has to be told the positions of image features, so what the host computes is followed.
        chained: a region is a chain of blocks that the host calls one after the other.
        steps: run calls that go on from a key/value cache.
        agreements: by kind of call, whether the regions reproduce the original.
        outside_macs: by call signature, the multiply-accumulates per sample that run outside the regions.
    """

    def __init__(self, host: nn.Module, control: PruningControl, notes: Notes) -> None:
        super().__init__(host)
        self.control, self.notes = control, notes
        self.module_states = ModuleStates(self.module, without=PREFIX)
        self.steps = CachedSteps(self.module, host, control)
        self.programs: list[ProgramCache] = []
        self.follows_features = False
        self.chained = False
        self.agreements: dict[Signature, bool] = {}
        self.outside_macs: dict[Signature, float] = {}

    def __call__(self, *args: object, **kwargs: object) -> object:
        control = self.control
        if control.scope.runs_original:
            return self.original(*args, **kwargs)
        if self.steps.serve_text(args, kwargs):
            return self.steps.run(self.original, args, kwargs)
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
        control.remember_returned(objects_in(result))
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
        """Whether regions reproduce the original on ``call`` with pruning off; a note says so if they do not."""
        found = self.disagreement(call)
        if found is not None:
            self.notes.unpruned(type(self.module).__name__, found)
        return found is None

    def disagreement(self, call: Call) -> str | None:
        """How regions differ from the original on ``call`` with pruning off; None if they reproduce it."""
        values = values_are_comparable(self.module, call.tensors())
        before = set(self.control.scope.computed_twice)
        with comparable_draws(self.module, call.tensors()):
            try:
                original, regions = self._unpruned_runs(call)
                require_agreement(original, regions, values=values)
            except MadtpError as error:
                differs = isinstance(error, RewriteError) and not isinstance(error, _RegionsFail)
                if values and differs and self._differ_by_rounding(call):
                    return None
                return f"{error} {COLLECTED}"
        twice = self.control.scope.computed_twice - before
        return f"it reads what blocks inside {', '.join(sorted(twice))} return." if twice else None

    def _differ_by_rounding(self, call: Call) -> bool:
        """Whether regions and the original differ on ``call`` by rounding: they agree in double precision."""
        large = sum(one.numel() for one in self.module.parameters()) > LARGEST
        if large or any(x.dtype == torch.float64 for x in call.tensors()):
            return False
        try:
            exact = self._in_double_precision()
            with exact.control.call():
                truth, exact_regions = exact._unpruned_runs(in_double_precision(call))
                with DoublePrecision():
                    require_agreement(truth, exact_regions)
                return differ_by_rounding(truth, *self._unpruned_runs(call))
        except Exception:  # a fault; or a model that cannot be run in double precision, of which nothing is known then
            return False

    def _in_double_precision(self) -> HostForward:
        """The forward of a copy of the host in double precision, with the same programs."""
        exact = copy.deepcopy(self)
        exact.module.double()
        exact.notes.strict = True  # a region that runs as the original does would agree with it in any case
        for programs in exact.programs:
            programs.serve_double_precision()
        return exact

    def _unpruned_runs(self, call: Call) -> tuple[Run, Run]:
        """Run the original, and the regions with pruning off, on ``call``.

        Where modules store tensors, each run finds other ones than any run has left there.
        """
        modules = [one for path, one in self.module.named_modules() if path.partition(".")[0] != PREFIX]
        stored = StoredTensors(modules)
        changed: list[Entry] = []

        def run(forward: Forward) -> object:
            own_args, own_kwargs = with_own_caches((call.args, call.kwargs))
            own = replace(call, args=own_args, kwargs=own_kwargs)
            with (
                torch.no_grad(),
                trial_run(self.module, (own.args, own.kwargs)),
                self.control.unpruned(),
                spelled_out(),
            ):
                put_others(changed)
                result = settled(forward(own.args, own.kwargs))
                changed.extend(() if changed else stored.changed())
                return result

        original = partial(run, self._by_original)
        expected = original()
        regions = _blaming_regions(partial(run, self._by_regions))
        return original if changed else starting_with(expected, original), regions


class _RegionsFail(RewriteError):
    """The model misses something that a region does not leave behind."""


def _blaming_regions(run: Run) -> Run:
    """A run that fails with an error of ours."""

    def blaming() -> object:
        try:
            return run()
        except MadtpError:
            raise
        except Exception as error:
            raise _RegionsFail(f"with regions in it, it fails: {type(error).__name__}: {error}.") from error

    return blaming


def _all_dims(call: Call) -> tuple[tuple[int, ...], ...]:
    leaves = call.flat()[0]
    held = call.cache_leaves()
    return tuple(
        tuple(range(x.dim())) if isinstance(x, Tensor) else (0,) if at in held else () for at, x in enumerate(leaves)
    )
