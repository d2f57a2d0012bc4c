"""What the sites of one pruned model share: strength, configuration, and the record of the last forward.

Start at :class:`PruningControl`. It is plain state, not a module: nothing here is a parameter.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from madtp.calls.modality_tracking import Tracker
from madtp.config import PruningConfig
from madtp.method.guidance import AlignmentTokens
from madtp.tokens.state import TokenState


class Observation(NamedTuple):
    """What a site judges: its name, its own query projection, block_input and tokens ``[B, N, C]`` of the stream before and
    after the self-attention, candidates ``[B, N]``, those of one part of a stream that several modalities share."""

    site: str
    query: nn.Module
    block_input: Tensor
    tokens: Tensor
    candidates: Tensor


RECORD = ("states", "features", "kept_counts", "runs")
"""Attributes of :class:`PruningControl` that record the last forward."""

if TYPE_CHECKING:
    from madtp.programs.program import Run


@dataclass
class PruningControl:
    """Shared by all sites of a model.

    Attributes:
        config: how pruning is done; ``temperature`` and ``gain`` below start from it and may be changed.
        forced: if given, which original tokens ``[B, N0]`` survive at each site, instead of DTP's decision (for tests
            of the graph and for replaying a decision).
        in_place: dropped tokens keep their slots, marked as padding, instead of leaving; merging has to be off. The graph must
            compute the same for the survivors either way, which is how a rewrite checks itself.
        gradient_checkpointing: forwards with gradients run in pieces that the backward computes again.
        observer: if given, called by every site with what it judges; see :class:`Observation`.
        states, features, kept_counts: record of the last forward: state after each site; pooled features ``[B, K, d_e]`` by
            site and modality; prunable tokens ``[B]`` that were kept, by site (``site[modality]`` for a segment).
        runs: programs that ran in the last forward, in order. outside: multiply-accumulates of the last forward, per
            sample, that no program did; None if they were not counted. batch: its samples; None if not known.
        tracker: follows what the host computes in the present call of it, for regions that have to know which of their tokens
            image features were written to; None where none has to.
        bypassed: regions run what the original runs. depth, depth_inside: how many calls of the model, and programs of
            regions, are under way. stale: the record is of a forward before the present one.
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
    states: dict[str, TokenState] = field(default_factory=dict)
    features: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    kept_counts: dict[str, Tensor] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)
    outside: float | None = None
    batch: int | None = None
    tracker: Tracker | None = None
    bypassed: bool = False
    depth: int = 0
    depth_inside: int = 0
    stale: bool = False

    def __deepcopy__(self, memo: dict[int, Any]) -> PruningControl:
        """For a copy of the model: all but the record of the last forward, which hangs on the gradients of this one."""
        fresh = copy.copy(self)
        memo[id(self)] = fresh
        for name in RECORD:
            setattr(fresh, name, type(getattr(self, name))())
        fresh.outside = fresh.batch = None
        for one in fields(fresh):
            setattr(fresh, one.name, copy.deepcopy(getattr(fresh, one.name), memo))
        return fresh

    @property
    def active(self) -> bool:
        """Whether sites prune at all."""
        return self.temperature > 0 or self.forced is not None

    def begin(self) -> None:
        """Forget the last forward."""
        for name in RECORD:
            getattr(self, name).clear()
        self.outside = self.batch = None

    @contextmanager
    def aside(self) -> Iterator[None]:
        """The record of the last forward is afterwards what it was before."""
        before = {name: getattr(self, name) for name in (*RECORD, "outside", "batch", "stale")}
        for name in RECORD:
            setattr(self, name, type(before[name])())
        try:
            yield
        finally:
            for name, value in before.items():
                setattr(self, name, value)

    @contextmanager
    def call(self) -> Iterator[None]:
        """Around a call of the model: the record starts anew when something runs in the outermost one."""
        self.stale = self.stale or self.depth == 0
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1

    @contextmanager
    def following(self, inputs: Iterable[Tensor]) -> Iterator[None]:
        """Follow what is computed from the inputs of the host, but for what programs compute."""
        before = self.tracker
        self.tracker = Tracker(inputs, paused=lambda: self.depth_inside > 0)
        try:
            with self.tracker:
                yield
        finally:
            self.tracker = before

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Around a program of a region, which is priced by its own table."""
        self.depth_inside += 1
        try:
            yield
        finally:
            self.depth_inside -= 1

    def opened(self) -> None:
        """A program is about to run: forget the forward before this one."""
        if self.stale:
            self.begin()
            self.stale = False

    @contextmanager
    def unpruned(self) -> Iterator[None]:
        """Pruning switched off inside the block."""
        before = self.temperature, self.forced
        self.temperature, self.forced = 0.0, None
        try:
            yield
        finally:
            self.temperature, self.forced = before

    @contextmanager
    def bypassing(self) -> Iterator[None]:
        """Regions run what the original runs inside the block."""
        before, self.bypassed = self.bypassed, True
        try:
            yield
        finally:
            self.bypassed = before

    def collects_features(self) -> bool:
        """Whether the alignment features are wanted: they serve only a loss."""
        return self.config.alignment and torch.is_grad_enabled()
