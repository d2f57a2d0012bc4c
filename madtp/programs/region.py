"""Regions: submodules that run a rewritten program where Python stays in charge of the rest of the model.

Start at :class:`Region`, which stands in for the ``forward`` of one module of the host's copy, and
:class:`HostForward`, which stands in for the forward of the whole. The modules keep their class, attributes and
parameters; only the instance's ``forward`` is another. What no program serves runs as the original does: never an
error, and never with tokens dropped that later calls would miss.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils import _pytree as pytree

from madtp.calls.branches import OtherBranch
from madtp.calls.call import Call, Signature, normalise_call, signature
from madtp.calls.compare import compare, drawing_alike
from madtp.calls.objects import CannotFlatten, object_kind
from madtp.cost.counting import Counter
from madtp.errors import ContinuationError, ExampleInputsError, MadtpError, NothingToPruneError
from madtp.programs.cache import BRANCHES, MANY_WAYS, Programs, StandIn
from madtp.programs.program import Program
from madtp.sites.control import PruningControl

log = logging.getLogger("madtp")
FAILURES = 3
REMEMBERED = 256


def of_calls(what: str) -> str:
    """How remarks begin that calls of a module (its path or name) or of a method run unpruned."""
    return f"calls of {what} that run unpruned: "


class Notes:
    """Remarks about calls, each logged once and kept for the report."""

    def __init__(self, kept: list[str]) -> None:
        self.kept = kept

    def add(self, text: str) -> None:
        """Log ``text`` unless it was said before."""
        if text not in self.kept:
            self.kept.append(text)
            log.warning("%s", text)

    def unpruned(self, what: str, reason: str) -> None:
        """Say that calls of a module or a method run unpruned, and why."""
        self.add(of_calls(what) + reason)


@contextmanager
def watching(
    host: nn.Module, blocks: Collection[str], control: PruningControl, notes: Notes, method: str
) -> Iterator[None]:
    """Note blocks of ``host`` that run as the original's while ``method`` is at work: no program does their work."""
    watched = {id(module): path for path, module in host.named_modules() if path in blocks}
    seen: list[str] = []

    def enter(module: nn.Module, args: Any) -> None:
        if id(module) in watched and control.active and not (control.runs_original or control.program_depth):
            seen.append(watched[id(module)])

    handle = register_module_forward_pre_hook(enter)
    try:
        yield
    finally:
        handle.remove()
    if seen:
        notes.unpruned(
            method,
            f"it runs {seen[0]} by itself, outside any tower that is called as a module; "
            "call the model, or rewrite the submodule that it calls.",
        )


class Region(StandIn):
    """The forward of a region: a rewritten program where one serves the call, else the original's own code.

    written: place in the call of the tensor of which programs have to be told where image features were written; "" if none.
    original: what runs where no program does, if it is not the module's own forward.
    """

    def __init__(
        self,
        programs: Programs,
        control: PruningControl,
        notes: Notes,
        written: str = "",
        original: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__(programs.module)
        self.original = original or self.original
        self.programs, self.control, self.notes, self.written = programs, control, notes, written
        self.failed: set[Signature] = set()
        self.reason = ""
        self.keeps = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.control.runs_original and not self.programs.marked:
            return self.original(*args, **kwargs)
        try:
            call = normalise_call(self.module, args, kwargs)
        except ExampleInputsError:  # the original says best what is wrong
            return self.original(*args, **kwargs)
        # What a pruned call has kept is read by programs alone: the original would attend to what was dropped.
        continues = self.programs.continues_pruned(call)
        if self.control.runs_original and not continues:
            return self.original(*args, **kwargs)
        if self.written and not continues:
            call, told = self._told(call)
            if not told:
                return self.original(*args, **kwargs)
        for program in self._candidates(call, continues):
            with suppress(OtherBranch), self.control.call(), self.control.in_program():
                self.control.begin_program()
                result = self.programs.run(program, call)
                if self.control.tracker is not None:
                    self.control.tracker.tag_result(call.flat()[0], result)
                return result
        if continues:
            raise self._lost()
        return self.original(*args, **kwargs)

    def _told(self, call: Call) -> tuple[Call, bool]:
        """The call with the positions of image features, and whether they are known; of text alone nothing would be pruned."""
        leaf, tracker = call.leaf_at(self.written), self.control.tracker
        if leaf is None or tracker is None:
            self._note("it was not called by the model's own forward, which shows where image features are written")
            return call, False
        written = tracker.image_positions(leaf)
        if written is None and "image" in (tracker.modalities(leaf) or ()):
            self._note("it cannot be followed where image features were written among its tokens")
        return (call, False) if written is None else (call.with_image_positions(written), True)

    def _lost(self) -> ContinuationError:
        self.keeps = False
        return ContinuationError(
            f"{self.programs.path} was to go on from what a pruned call has kept, and no program can be made for this call: "
            f"{self.reason or 'too many others could not be made'}. Start again; tokens are no longer pruned there in calls "
            "that keep something for later ones."
        )

    def _candidates(self, call: Call, continues: bool) -> Iterator[Program]:
        try:
            call = call.flattened(self.programs.sizes)
        except CannotFlatten as error:
            self._note(f"it was called with a {error}, which later calls may read again")
            return
        if call.continues() and not continues:
            return
        for program in self._made(call):
            if program.marked and not self.keeps:
                return
            yield program

    def _made(self, call: Call) -> Iterator[Program]:
        found = self.programs.matching(call)
        yield from found
        exact = signature(self.module, call, None)
        if len(found) >= BRANCHES:
            self._note(MANY_WAYS)
        if len(found) >= BRANCHES or len(self.failed) >= FAILURES or exact in self.failed:
            return
        try:
            # What a capture computes is no part of the model's work: nobody counts it, least of all its symbols.
            with self.control.in_program():
                further = self.programs.build(call)
        except MadtpError as error:
            self.failed.add(exact)
            self.reason = str(error)
            if isinstance(error, NothingToPruneError):  # the regions in it serve the call
                log.info("%s", error)
                return
            self._note(f"a further kind of call cannot be rewritten: {error}")
            return
        yield further

    def _note(self, reason: str) -> None:
        self.notes.unpruned(self.programs.path or type(self.module).__name__, reason)


class HostForward(StandIn):
    """The forward of a host whose submodules are regions.

    The first call of each kind (structure, constants, modes) is run without and with the regions, pruning off: a model
    that collects values from the inside of a region would miss them. Such calls run as the original from then on.
    follows: what it computes is followed, as a region has to be told where image features were written.
    """

    def __init__(self, host: nn.Module, control: PruningControl, notes: Notes) -> None:
        super().__init__(host)
        self.control, self.notes = control, notes
        self.follows = False
        self.trusted: dict[Signature, bool] = {}
        self.counted: dict[Signature, float] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        control = self.control
        if control.runs_original:
            return self.original(*args, **kwargs)
        call = normalise_call(self.module, args, kwargs)
        described = call
        with suppress(CannotFlatten):
            described = call.flattened(None)
        kind = signature(self.module, described, _all_dims(described))
        if kind not in self.trusted:
            self.trusted[kind] = self._agrees(call)
        with control.call():
            if control.call_depth > 1:
                return self._run(kind, args, kwargs)
            control.begin_program()
            control.record.batch = call.samples()
            return self._counted(described, kind, args, kwargs)

    def _run(self, kind: Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.trusted[kind]:
            return self._followed(args, kwargs)
        with self.control.running_original():
            return self.original(*args, **kwargs)

    def _followed(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.follows:
            return self.original(*args, **kwargs)
        with self.control.following(x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)):
            return self.original(*args, **kwargs)

    def _counted(self, call: Call, kind: Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run, and count what the regions do not do where these sizes are new."""
        exact = signature(self.module, call, None)
        if exact in self.counted:
            self.control.record.outside_macs = self.counted[exact]
            return self._run(kind, args, kwargs)
        with Counter(lambda: self.control.program_depth > 0) as counter:
            result = self._run(kind, args, kwargs)
        while len(self.counted) >= REMEMBERED:
            self.counted.pop(next(iter(self.counted)))
        self.counted[exact] = self.control.record.outside_macs = counter.total / (self.control.record.batch or 1)
        return result

    def _agrees(self, call: Call) -> bool:
        """Whether regions reproduce the original on ``call`` with pruning off."""
        reason = ""
        try:
            results = []
            for bypassed in (True, False):
                own = call if object_kind((call.args, call.kwargs)) is None else copy.deepcopy(call)
                with torch.no_grad(), drawing_alike(), self.control.unpruned():
                    results.append(self._silently(own, bypassed))
            compare(*results, values=not any(m.training for m in self.module.modules()))
        except MadtpError as error:
            reason = str(error)
        if reason:
            self.notes.unpruned(
                type(self.module).__name__,
                f"{reason} It collects values from the inside of a "
                "rewritten region; leave the option that asks for them out.",
            )
        return not reason

    def _silently(self, call: Call, bypassed: bool) -> Any:
        if not bypassed:
            return self._followed(call.args, call.kwargs)
        with self.control.running_original():
            return self.original(*call.args, **call.kwargs)


def _all_dims(call: Call) -> tuple[tuple[int, ...], ...]:
    leaves = call.flat()[0]
    held = call.cache_leaves()
    return tuple(
        tuple(range(x.dim())) if isinstance(x, Tensor) else (0,) if at in held else () for at, x in enumerate(leaves)
    )
