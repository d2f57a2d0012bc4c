"""Selectors: which candidates survive, and how many. They decide on the host, which has to know how long the result is.

Cao et al., CVPR 2024, module DTP; ``docs/method.md``, "Who survives". Start at :class:`Selector`; :data:`SELECTORS` finds them
by name. :class:`AboveThreshold` is the method.

Symbols: B samples, N tokens, S ``[B, N]`` the importance, gamma the gain.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from madtp.config import PruningConfig
from madtp.errors import ConfigError
from madtp.method.arrays import Flags, Numbers
from madtp.method.scorers import IMPORTANCE, NOTHING, Needs, share_kept
from madtp.method.threshold import keep_best, keep_mask

STEP = 1 / 16
"""Distance 1 - cosine to the nearest survivor at which a token at the threshold survives, with a gain of one."""


@dataclass(frozen=True, kw_only=True)
class Ballot:
    """What a selector decides by.

    Attributes:
        importance: S ``[B, N]`` float32.
        ranking: ``[B, N]`` float32, what the scorer says; S itself where that is the method's.
        theta: the threshold ``[B]`` float32; None for a selector that needs none.
        gain: gamma, the factor on theta.
        candidates: ``[B, N]``; None if all are candidates.
        smallest_drop: number of tokens that a sample loses at least, if it loses any.
    """

    importance: Numbers
    ranking: Numbers
    theta: Numbers | None
    gain: float
    candidates: Flags | None
    smallest_drop: int


class Selector(ABC):
    """Says which candidates survive.

    Attributes:
        name: what it is found by.
        needs: what it reads besides the ranking. The threshold comes with the importance.
    """

    name: ClassVar[str]
    needs: ClassVar[Needs]

    @abstractmethod
    def keep(self, ballot: Ballot, config: PruningConfig) -> Flags:
        """Return the candidates that survive, ``[B, N]``; all those of a sample that would lose too few.

        With ``batching="ragged"`` each sample keeps its own count. With ``"uniform"``, as in the authors' code, every sample
        keeps the largest count of the batch, each its own best tokens.

        Args:
            ballot: what is judged.
            config: the fields ``batching``, ``min_tokens`` and ``keep_ratio`` are read.
        """


class AboveThreshold(Selector):
    """The method: {j : S_j > gamma theta}."""

    name = "threshold"
    needs = IMPORTANCE

    def keep(self, ballot: Ballot, config: PruningConfig) -> Flags:
        if config.batching != "ragged":
            return _best(ballot, _counts_above(ballot, config), config)
        return _above(ballot, config, smallest_drop=ballot.smallest_drop)


class DistinctAboveThreshold(Selector):
    """Tokens that matter and differ: {j : d_j sqrt(S_j) > gamma STEP sqrt(theta)}, d_j the distance to the nearest survivor."""

    name = "distinct"
    needs = IMPORTANCE

    def keep(self, ballot: Ballot, config: PruningConfig) -> Flags:
        assert ballot.theta is not None
        limit = STEP * np.sqrt(_candidates(ballot) * ballot.theta)
        judged = replace(ballot, importance=ballot.ranking, theta=limit.astype(np.float32))
        if config.batching != "ragged":
            return _best(ballot, _counts_above(judged, config), config)
        return _above(judged, config, smallest_drop=ballot.smallest_drop)


class AsManyAsThreshold(Selector):
    """Control: the best of another ranking, as many as the method would keep."""

    name = "count"
    needs = IMPORTANCE

    def keep(self, ballot: Ballot, config: PruningConfig) -> Flags:
        return _best(ballot, _counts_above(ballot, config), config)


class KeepRatio(Selector):
    """Control: the share ``config.keep_ratio`` of the candidates."""

    name = "ratio"
    needs = NOTHING

    def keep(self, ballot: Ballot, config: PruningConfig) -> Flags:
        counts = share_kept(config, _candidates(ballot))
        return keep_best(ballot.ranking, counts, ballot.candidates, smallest_drop=ballot.smallest_drop)


SELECTORS: Mapping[str, Selector] = {
    selector.name: selector
    for selector in (AboveThreshold(), DistinctAboveThreshold(), AsManyAsThreshold(), KeepRatio())
}


def keep_of_each_image(kept: Flags, ballot: Ballot, images: Numbers | None, least: int) -> None:
    """Let the best ``least`` candidates of each image survive, in place.

    Args:
        kept: ``[B, N]``, what survives so far.
        ballot: what was judged.
        images: ``[B, N]``, the number of the image of each token; -1 for none. None if a sample is an image.
        least: of an image with fewer candidates, all survive.
    """
    for sample, ranking in enumerate(ballot.ranking):
        inside = np.ones(len(ranking), dtype=bool) if ballot.candidates is None else ballot.candidates[sample]
        own = np.zeros(len(ranking), dtype=np.int64) if images is None else images[sample]
        for image in np.unique(own[inside & (own >= 0)]):
            slots = np.flatnonzero(inside & (own == image))
            if kept[sample, slots].sum() < least:
                best = np.argsort(-ranking[slots], kind="stable")[:least]
                kept[sample, slots[best]] = True


def _candidates(ballot: Ballot) -> Numbers:
    """The number of candidates of each sample, ``[B]``."""
    batch, length = ballot.ranking.shape
    total: Numbers = np.full(batch, length) if ballot.candidates is None else ballot.candidates.sum(1)
    return total


def _above(ballot: Ballot, config: PruningConfig, *, smallest_drop: int) -> Flags:
    if config.batching == "static":
        raise ConfigError("batching='static' needs counts for each site; freeze the model with madtp.freeze first")
    assert ballot.theta is not None
    return keep_mask(
        ballot.importance,
        ballot.theta,
        ballot.gain,
        ballot.candidates,
        min_tokens=config.min_tokens,
        smallest_drop=smallest_drop,
    )


def _counts_above(ballot: Ballot, config: PruningConfig) -> Numbers:
    """How many candidates ``[B]`` each sample would keep by the threshold; with uniform batches the largest of them."""
    counts: Numbers = _above(ballot, config, smallest_drop=1).sum(1)
    return np.full_like(counts, counts.max(initial=0)) if config.batching == "uniform" else counts


def _best(ballot: Ballot, counts: Numbers, config: PruningConfig) -> Flags:
    return keep_best(ballot.ranking, counts, ballot.candidates, smallest_drop=ballot.smallest_drop)
