"""What the sites of one pruned model share: strength, configuration, and the record of the last forward.

Start at :class:`PruningControl`. It is plain state, not a module: nothing here is a parameter.

There are two ways to do without pruning. :meth:`PruningControl.unpruned` keeps the rewritten graphs and switches the sites off;
:attr:`PruningControl.active` is the one place where that is decided. :meth:`PruningControl.running_original` runs the original
modules in place of the rewritten graphs of regions.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from madtp.calls.compiling import is_compiling
from madtp.calls.modality_tracking import Tracker
from madtp.config import PruningConfig
from madtp.method.guidance import AlignmentTokens
from madtp.method.parts import Parts, parts_of
from madtp.tokens.state import TokenState

if TYPE_CHECKING:
    from madtp.programs.program import Run


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


class FeatureKey(NamedTuple):
    """The site and the modality whose tokens were pooled."""

    site: str
    modality: str


@dataclass
class ForwardRecord:
    """What the last forward did.

    Attributes:
        states: the state after each site.
        features: pooled features C_l ``[B, K, d_e]``.
        kept_counts: number ``[B]`` of candidates that each site kept, by site (``site[modality]`` for a segment).
        runs: the programs that ran, in order.
        outside_macs: multiply-accumulates per sample that no program did. None if they were not counted.
        batch: number of samples. None if it is not known.
        outdated: a call has begun since. The record is replaced when the first program of that call runs.
    """

    states: dict[str, TokenState] = field(default_factory=dict)
    features: dict[FeatureKey, Tensor] = field(default_factory=dict)
    kept_counts: dict[str, Tensor] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)
    outside_macs: float | None = None
    batch: int | None = None
    outdated: bool = False


@dataclass
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
        record: what the last forward did.
        tracker: follows what the host computes in the present call, for regions that have to know which of their tokens are
            image features. None if no region has to.
        runs_original: regions run the original modules.
        call_depth: number of calls of the model that are under way.
        program_depth: number of programs of regions that are under way.
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
    record: ForwardRecord = field(default_factory=ForwardRecord)
    tracker: Tracker | None = None
    runs_original: bool = False
    call_depth: int = 0
    program_depth: int = 0

    def __deepcopy__(self, memo: dict[int, object]) -> PruningControl:
        """Copy all but the record of the last forward, whose tensors hang on the gradients of this model."""
        fresh = copy.copy(self)
        memo[id(self)] = fresh
        fresh.record = ForwardRecord(outdated=self.record.outdated)
        for one in fields(fresh):
            setattr(fresh, one.name, copy.deepcopy(getattr(fresh, one.name), memo))
        return fresh

    @property
    def active(self) -> bool:
        """Whether sites prune at all."""
        return self.temperature > 0 or self.forced is not None

    @property
    def parts(self) -> Parts:
        """The scorer, selector and reducer of the configuration."""
        return parts_of(self.config)

    def counts_are_fixed(self) -> bool:
        """Whether sites keep counts that were fixed beforehand (:func:`madtp.freeze`)."""
        return self.config.batching == "static" and self.forced is None and bool(self.static_counts)

    def clear_record(self) -> None:
        """Forget the last forward."""
        self.record = ForwardRecord(outdated=self.record.outdated)

    @contextmanager
    def unrecorded(self) -> Iterator[None]:
        """Keep the record of the last forward: what runs inside the block leaves no trace in it."""
        before, self.record = self.record, ForwardRecord(outdated=self.record.outdated)
        try:
            yield
        finally:
            self.record = before

    @contextmanager
    def call(self) -> Iterator[None]:
        """Enter a call of the model. The record starts anew when the first program of the outermost call runs."""
        self.record.outdated = self.record.outdated or self.call_depth == 0
        self.call_depth += 1
        try:
            yield
        finally:
            self.call_depth -= 1

    def begin_program(self) -> None:
        """Prepare for a program that is about to run: the record of an earlier call is cleared."""
        if self.record.outdated:
            self.record = ForwardRecord()

    @contextmanager
    def in_program(self) -> Iterator[None]:
        """Enter a program of a region, whose multiply-accumulates its own table counts."""
        self.program_depth += 1
        try:
            yield
        finally:
            self.program_depth -= 1

    @contextmanager
    def following(self, inputs: Iterable[Tensor]) -> Iterator[None]:
        """Follow what the host computes from ``inputs``, outside of programs."""
        before = self.tracker
        self.tracker = Tracker(inputs, paused=lambda: self.program_depth > 0)
        try:
            with self.tracker:
                yield
        finally:
            self.tracker = before

    @contextmanager
    def unpruned(self) -> Iterator[None]:
        """Switch pruning off inside the block; the rewritten graphs run all the same."""
        before = self.temperature, self.forced
        self.temperature, self.forced = 0.0, None
        try:
            yield
        finally:
            self.temperature, self.forced = before

    @contextmanager
    def running_original(self) -> Iterator[None]:
        """Run the original modules in place of the programs of regions inside the block."""
        before, self.runs_original = self.runs_original, True
        try:
            yield
        finally:
            self.runs_original = before

    def collects_features(self) -> bool:
        """Whether sites pool features for the alignment loss, which is wanted only where there are gradients."""
        return self.config.alignment and torch.is_grad_enabled() and not is_compiling()
