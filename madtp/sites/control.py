"""What the sites of one pruned model share: strength, configuration, and the record of the last forward.

Start at :class:`PruningControl`. It is plain state, not a module: nothing here is a parameter.

There are two ways to do without pruning. :meth:`PruningControl.unpruned` keeps the rewritten graphs and switches the sites off;
:attr:`PruningControl.active` is the one place where that is decided. :meth:`PruningControl.running_original` runs the original
modules in place of the rewritten graphs of regions.

Strength and configuration belong to the model. What a call needs besides (:class:`CallScope`), and what it leaves behind
(:class:`~madtp.sites.forward_record.ForwardRecord`), belong to the thread or task that makes the call.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.torch_version import TorchVersion

from madtp.calls.compiling import is_compiling
from madtp.calls.hooks import next_hook
from madtp.calls.modality_tracking import Tracker
from madtp.config import PruningConfig
from madtp.method.guidance import AlignmentTokens
from madtp.method.parts import Parts, parts_of
from madtp.sites.forward_record import ForwardRecord, Records
from madtp.tokens.state import TokenState

# torch.compile reads context variables since torch 2.14. Before, what it compiles goes by the thread that entered a scope last.
COMPILES_CONTEXT_VARIABLES = TorchVersion(torch.__version__) >= "2.14"


class Observation(NamedTuple):
    """What a site scores.

    Attributes:
        site: name of the site, ``site[modality]`` for a segment of a stream that several modalities share.
        query: the site's query projection.
        block_input: rows ``[T, C]`` of the residual stream X at the block's input.
        tokens: rows ``[T, C]`` of the residual stream behind the self-attention; what follows is computed from them.
        candidates: ``[B, N]`` bool, the tokens that pruning may take.
        state: says which token of which sample each row is.
    """

    site: str
    query: nn.Module
    block_input: Tensor
    tokens: Tensor
    candidates: Tensor
    state: TokenState


@dataclass(frozen=True)
class CallScope:
    """What holds for the calls of one thread or task.

    Attributes:
        unpruned: number of blocks under way in which pruning is switched off.
        runs_original: regions run the original modules.
        follows_caches: they do so in calls that go on from key/value caches of pruned ones, too.
        tracker: follows what the host computes in the present call, for regions that have to know which of their tokens are
            image features. None if no region has to.
        calls: number of calls of the model that are under way.
        next_hook: number of the next hook when the outermost of them began; infinite outside.
        programs: number of programs of regions that are under way.
        dropped_features: which tokens of the program that runs are image tokens that their vision tower has dropped,
            ``[B, N]`` bool. None if there are none.
        interrupted: names of chains of blocks that could not run as one in the outermost call.
        computed_twice: those of them of which a program ran nevertheless.
    """

    unpruned: int = 0
    runs_original: bool = False
    follows_caches: bool = False
    tracker: Tracker | None = None
    calls: int = 0
    next_hook: float = math.inf
    programs: int = 0
    dropped_features: Tensor | None = None
    interrupted: set[str] = field(default_factory=set)
    computed_twice: set[str] = field(default_factory=set)


OUTSIDE = CallScope()


@dataclass(eq=False)
class PruningControl:
    """Shared by all sites of a model.

    Attributes:
        config: how pruning is done; ``temperature`` and ``gain`` below start from it and may be changed.
        alignment: the alignment tokens E; None without alignment.
        temperature: T of the threshold; 0 switches pruning off.
        gain: gamma, the factor on the threshold.
        forced: which original tokens ``[B, N0]`` survive at each site, in place of the method's decision. None to let the
            method decide. Checks of a rewrite use it to repeat a decision.
        in_place: dropped tokens keep their slots, marked as padding, instead of leaving; merging has to be off. The graph must
            compute the same for the survivors either way, which is how a rewrite checks itself.
        gradient_checkpointing: forwards with gradients run in pieces, which the backward computes again.
        observer: called by every site with its :class:`Observation`. None if nobody observes.
        static_counts: number of candidates that each site keeps, once :func:`madtp.freeze` has fixed it.
        static_room: slots that each site has for tokens that survive in any case, fixed with these counts.
        measured_room: while :func:`madtp.freeze` measures, the largest number of such tokens of any sample so far, by site.
            None elsewhere.
        compiled: the last call was compiled, and so left no record.
    """

    config: PruningConfig
    alignment: AlignmentTokens | None = None
    temperature: float = 1.0
    gain: float = 1.0
    forced: dict[str, Tensor] | None = None
    in_place: bool = False
    gradient_checkpointing: bool = False
    observer: Callable[[Observation], None] | None = None
    static_counts: dict[str, int] = field(default_factory=dict)
    static_room: dict[str, int] = field(default_factory=dict)
    measured_room: dict[str, int] | None = None
    compiled: bool = False

    def __post_init__(self) -> None:
        self._scope = ContextVar("scope of a call", default=OUTSIDE)
        self._latest_scope = OUTSIDE
        self._records = Records()
        self._returned: WeakSet[Any] = WeakSet()

    def __deepcopy__(self, memo: dict[int, object]) -> PruningControl:
        """Copy all but the record of the last forward, whose tensors hang on the gradients of this model."""
        fresh = copy.copy(self)
        memo[id(self)] = fresh
        fresh.__post_init__()
        for one in fields(fresh):
            setattr(fresh, one.name, copy.deepcopy(getattr(fresh, one.name), memo))
        return fresh

    @property
    def scope(self) -> CallScope:
        """What holds for calls of this thread or task."""
        if not COMPILES_CONTEXT_VARIABLES and torch.compiler.is_dynamo_compiling():
            return self._latest_scope
        return self._scope.get()

    @property
    def record(self) -> ForwardRecord:
        """What the last forward of this thread or task did; the calls under way write to it."""
        return self._records.own

    def last_record(self) -> ForwardRecord:
        """What the last forward did: of this thread or task, or of any if this one has made none."""
        return ForwardRecord() if self.compiled else self._records.last()

    @property
    def active(self) -> bool:
        """Whether sites prune at all."""
        return (self.temperature > 0 or self.forced is not None) and not self.scope.unpruned

    @property
    def parts(self) -> Parts:
        """The scorer, selector and reducer of the configuration."""
        return parts_of(self.config)

    @property
    def guided(self) -> bool:
        """Whether sites compare their tokens with the alignment tokens; parts that do not need that leave it out."""
        return self.alignment is not None and self.config.alignment and self.parts.needs.guidance

    def counts_are_fixed(self) -> bool:
        """Whether sites keep counts that were fixed beforehand (:func:`madtp.freeze`)."""
        return self.config.batching == "static" and self.forced is None and bool(self.static_counts)

    def remember_returned(self, objects: Iterable[object]) -> None:
        """Remember objects that the model has returned: what it is called with again is a cache."""
        for one in objects:
            with suppress(TypeError):  # some cannot be referred to weakly
                self._returned.add(one)

    def has_returned(self, value: object) -> bool:
        """Whether the model has returned an object."""
        try:
            return value in self._returned
        except TypeError:
            return False

    def clear_record(self) -> None:
        """Forget the last forward."""
        self._records.clear()

    @contextmanager
    def unrecorded(self) -> Iterator[None]:
        """Keep the record of the last forward: what runs inside the block leaves no trace in it."""
        own, latest = self._records.own, self._records.latest
        self._records.begin(ForwardRecord(outdated=own.outdated))
        try:
            yield
        finally:
            self._records.begin(own)
            self._records.latest = latest

    @contextmanager
    def call(self) -> Iterator[None]:
        """Enter a call of the model. The record starts anew when the first program of the outermost call runs."""
        scope = self.scope
        if not scope.calls:
            self.record.outdated = True
            scope = replace(scope, next_hook=next_hook(), interrupted=set(), computed_twice=set())
        with self._within(replace(scope, calls=scope.calls + 1)):
            yield

    def begin_program(self) -> None:
        """Prepare for a program that is about to run: the record of an earlier call is cleared."""
        self.compiled = False
        if self.record.outdated:
            self._records.latest = self._records.begin(ForwardRecord())

    @contextmanager
    def in_program(self) -> Iterator[None]:
        """Enter a program of a region, whose multiply-accumulates its own table counts, and whose values nobody follows."""
        tracker = self.scope.tracker
        unfollowed = nullcontext() if tracker is None else tracker.set_aside()
        with self._within(replace(self.scope, programs=self.scope.programs + 1)), unfollowed:
            yield

    @contextmanager
    def without_features(self, dropped: Tensor | None) -> Iterator[None]:
        """Let programs inside the block begin without the image tokens ``dropped [B, N]`` bool; None keeps all."""
        with self._within(replace(self.scope, dropped_features=dropped)):
            yield

    @contextmanager
    def following(self, inputs: Iterable[Tensor]) -> Iterator[None]:
        """Follow what the host computes from ``inputs``, outside of programs. Without images, nothing is followed.

        What is followed already goes on: a method such as ``generate`` may encode images before it calls forward.
        """
        given = list(inputs)
        images = any(x.is_floating_point() for x in given)
        around = self.scope.tracker
        if around is not None and around.follows_images:
            around.follow(given)
            yield
            return
        tracker = Tracker(given if images else (), paused=lambda: self.scope.programs > 0)
        with self._within(replace(self.scope, tracker=tracker)), tracker if images else nullcontext():
            yield

    @contextmanager
    def unpruned(self) -> Iterator[None]:
        """Switch pruning off inside the block; the rewritten graphs run all the same."""
        # Counted, not restored: generators may close such blocks in another order, or in another task.
        self._enter(replace(self.scope, unpruned=self.scope.unpruned + 1))
        try:
            yield
        finally:
            self._enter(replace(self.scope, unpruned=max(0, self.scope.unpruned - 1)))

    @contextmanager
    def running_original(self) -> Iterator[None]:
        """Run the original modules in place of the programs of regions inside the block."""
        with self._within(replace(self.scope, runs_original=True)):
            yield

    @contextmanager
    def following_caches(self) -> Iterator[None]:
        """Run the original modules inside the block, which go on from key/value caches of pruned calls."""
        with self._within(replace(self.scope, runs_original=True, follows_caches=True)):
            yield

    @contextmanager
    def _within(self, scope: CallScope) -> Iterator[None]:
        before = self.scope
        self._enter(scope)
        try:
            yield
        finally:
            self._enter(before)

    def _enter(self, scope: CallScope) -> None:
        self._scope.set(scope)
        self._latest_scope = scope

    def collects_features(self) -> bool:
        """Whether sites pool features for the alignment loss, which is wanted only where there are gradients."""
        return self.config.alignment and torch.is_grad_enabled() and not is_compiling()
