"""Scorers: what tokens are ranked by. A scorer says what it needs, and nothing else is computed.

Start at :class:`Scorer`; :data:`SCORERS` finds them by name. :class:`Importance` is the method, S; the others are controls of
ablations, and rules of methods that need no training. Selectors (``selectors.py``) turn scores into survivors, reducers
(``reducers.py``) decide what becomes of the other tokens, and ``parts.py`` puts the three together.

Symbols: B samples, N tokens, K alignment tokens, S ``[B, N]`` the importance.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import ClassVar, Generic

import numpy as np
import torch
from torch import Tensor

from madtp.calls.compiling import is_compiling
from madtp.config import PruningConfig
from madtp.errors import ConfigError, ExportError
from madtp.method.arrays import Numbers, Values, in_float32, on_host
from madtp.method.diversity import determinantal_order, distinct_values, max_min_order, relevance_to, similarities
from madtp.method.importance import ImportanceTerms


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What the parts of a site read.

    Attributes:
        received: the attention that each token receives.
        class_attention: what the class token attends to, heads weighted by their outputs.
        class_token_attention: what it attends to in the mean of all heads.
        last_token_attention: what the last token attends to in the mean of all heads.
        features: the residual stream at the block's input.
        guidance: the guidance G of the alignment tokens.
        importance: S, which needs all of these.
    """

    received: bool = False
    class_attention: bool = False
    class_token_attention: bool = False
    last_token_attention: bool = False
    features: bool = False
    guidance: bool = False
    importance: bool = False

    def __or__(self, other: Needs) -> Needs:
        return Needs(**{one.name: getattr(self, one.name) or getattr(other, one.name) for one in fields(Needs)})


NOTHING = Needs()
IMPORTANCE = Needs(received=True, class_attention=True, guidance=True, importance=True)


@dataclass(frozen=True)
class Features:
    """The residual stream at the input of a block.

    Attributes:
        tokens: ``[B, N, C]``.
        candidates: ``[B, N]`` bool, the tokens that pruning may take; None if it may take all of them.
        context: ``[B, C]``, the mean of the tokens of other segments, such as the text beside image tokens. None without.
    """

    tokens: Tensor
    candidates: Tensor | None
    context: Tensor | None


@dataclass(frozen=True)
class Evidence(Generic[Values]):
    """What is known of the tokens of a site; tensors or arrays.

    Attributes:
        terms: the terms of the importance that something asked for.
        importance: S ``[B, N]``, their mean.
        features: of the tokens. None if nothing asks for them.
    """

    terms: ImportanceTerms[Values]
    importance: Values
    features: Features | None = None


class Scorer(ABC):
    """Scores tokens.

    Attributes:
        name: what it is found by.
        needs: what it reads.
        leaves_to_towers: where image tokens stand among words, and nothing of what it needs is there, the vision tower has
            chosen among them; such a site keeps what it is given.
    """

    name: ClassVar[str]
    needs: ClassVar[Needs]
    leaves_to_towers: ClassVar[bool] = False

    @abstractmethod
    def score(self, evidence: Evidence[Values], config: PruningConfig) -> Values:
        """Return what tokens are ranked by, the larger the better.

        Args:
            evidence: what is known of the tokens: what something asked for.
            config: the fields ``seed``, ``keep_ratio`` and ``min_tokens`` are read.

        Returns:
            ``[B, N]`` float32.
        """


class Importance(Scorer):
    """The method: importance S, the mean of the terms of self-attention, alignment and class attention."""

    name = "importance"
    needs = IMPORTANCE

    def score(self, evidence: Evidence[Values], config: PruningConfig) -> Values:
        return evidence.importance


CLASS_TOKEN = "a class token; restrict `towers` or `layers` to the stream that has one"


class RowOfAttention(Scorer):
    """What one token attends to.

    Attributes:
        missing: what a site needs that has no such token, and the way out.
    """

    missing: ClassVar[str]

    def score(self, evidence: Evidence[Values], config: PruningConfig) -> Values:
        row = evidence.terms.class_attention
        if row is None:
            raise ConfigError(
                f"selection={config.selection!r} needs {self.missing}, or choose another selection: this site has none"
            )
        return row


class ClassAttention(RowOfAttention):
    """Control: what the class token attends to, s3."""

    name = "class_attention"
    needs = Needs(class_attention=True)

    missing = CLASS_TOKEN


class ClassTokenAttention(RowOfAttention):
    """What the class token attends to in the mean of all heads: Yang et al., VisionZip, CVPR 2025, dominant tokens."""

    name = "class_token_attention"
    needs = Needs(class_token_attention=True)
    leaves_to_towers = True

    missing = CLASS_TOKEN


class LastTokenAttention(RowOfAttention):
    """What the last token attends to in the mean of all heads: Chen et al., FastV, ECCV 2024."""

    name = "last_token_attention"
    needs = Needs(last_token_attention=True)

    missing = "causal attention; restrict `layers` to the language model"


class Diversity(Scorer):
    """Tokens that are far from each other: Alvar et al., DivPrune, CVPR 2025."""

    name = "diversity"
    needs = Needs(features=True)

    def score(self, evidence: Evidence[Values], config: PruningConfig) -> Values:
        return _by_order(evidence, config, lambda tokens, _, count: max_min_order(similarities(tokens), count))


class ConditionalDiversity(Scorer):
    """Tokens that differ, and are relevant to the text, by a determinantal process: Zhang et al., CDPruner, NeurIPS 2025."""

    name = "conditional_diversity"
    needs = Needs(features=True)

    def score(self, evidence: Evidence[Values], config: PruningConfig) -> Values:
        return _by_order(
            evidence,
            config,
            lambda tokens, context, count: determinantal_order(
                similarities(tokens), relevance_to(tokens, context), count
            ),
        )


class Distinct(Scorer):
    """Tokens that matter beside those that matter more: sqrt(N S_j) times the distance to the nearest token picked before."""

    name = "distinct"
    needs = IMPORTANCE | Needs(features=True)

    def score(self, evidence: Evidence[Values], config: PruningConfig) -> Values:
        importance = on_host(evidence.importance) if isinstance(evidence.importance, Tensor) else evidence.importance

        def ranked(sample: int, slots: Numbers, tokens: Tensor, _: Tensor | None) -> Numbers:
            weight = np.sqrt(importance[sample, slots].astype(np.float64) * len(slots))
            return distinct_values(similarities(tokens), weight)

        return _by_features(evidence, config, ranked)


class Random(Scorer):
    """Control: a hash of S, so that the draw for a sample does not depend on the other samples of the batch."""

    name = "random"
    needs = IMPORTANCE

    def score(self, evidence: Evidence[Values], config: PruningConfig) -> Values:
        return random_scores(evidence.importance, config.seed)


SCORERS: Mapping[str, Scorer] = {
    scorer.name: scorer
    for scorer in (
        Importance(),
        ClassAttention(),
        Random(),
        LastTokenAttention(),
        ClassTokenAttention(),
        Diversity(),
        ConditionalDiversity(),
        Distinct(),
    )
}


def share_kept(config: PruningConfig, candidates: Numbers) -> Numbers:
    """Return how many of ``candidates [B]`` survive with ``config.keep_ratio``."""
    assert config.keep_ratio is not None
    counts = np.ceil(np.float32(config.keep_ratio) * candidates.astype(np.float32)).astype(np.int64)
    kept: Numbers = counts.clip(min=config.min_tokens)
    return kept


def _by_order(
    evidence: Evidence[Values], config: PruningConfig, order_of: Callable[[Tensor, Tensor | None, int], Numbers]
) -> Values:
    """Scores that fall with the place of a token in an order."""

    def ranked(_: int, slots: Numbers, tokens: Tensor, context: Tensor | None) -> Numbers:
        count = min(len(slots), int(share_kept(config, np.array(len(slots)))))
        order = order_of(tokens, context, count)
        ranking = np.full(len(slots), -1.0)
        ranking[order] = np.arange(len(order), 0, -1)
        return ranking

    return _by_features(evidence, config, ranked)


def _by_features(
    evidence: Evidence[Values],
    config: PruningConfig,
    ranked: Callable[[int, Numbers, Tensor, Tensor | None], Numbers],
) -> Values:
    """Scores of the candidates of each sample by themselves.

    Args:
        evidence: what is known of the tokens.
        config: its ``selection`` is named where it cannot be exported.
        ranked: takes the number of a sample, the slots of its n candidates, their features ``[n, C]`` and the mean of the
            tokens beside them ``[C]``, and returns their scores ``[n]``.
    """
    features = evidence.features
    assert features is not None
    if is_compiling():
        raise ExportError(
            f"selection={config.selection!r} picks tokens one by one on the host, which cannot be exported."
        )
    batch, length = features.tokens.shape[:2]
    inside = np.ones((batch, length), dtype=bool) if features.candidates is None else on_host(features.candidates)
    ranking = np.full((batch, length), -1.0, dtype=np.float32)
    for sample in range(batch):
        slots = np.flatnonzero(inside[sample])
        tokens = features.tokens[sample, torch.from_numpy(slots).to(features.tokens.device)]
        context = None if features.context is None else features.context[sample]
        ranking[sample, slots] = ranked(sample, slots, tokens, context)
    importance = evidence.importance
    if isinstance(importance, Tensor):
        return torch.from_numpy(ranking).to(importance.device)
    return ranking


def random_scores(scores: Values, seed: int) -> Values:
    """Return pseudo-random numbers in [0, 1), a hash of S.

    Args:
        scores: S ``[B, N]``.
        seed: another seed gives another draw.

    Returns:
        ``[B, N]`` float32.
    """
    if isinstance(scores, Tensor):
        bits = scores.detach().float().contiguous().view(torch.int32).long()
        return in_float32(_hashed(bits, torch.arange(scores.shape[1], device=scores.device), seed)) / 0x1000000
    bits = np.ascontiguousarray(scores, dtype=np.float32).view(np.int32).astype(np.int64)
    return in_float32(_hashed(bits, np.arange(scores.shape[1]), seed)) / np.float32(0x1000000)


def _hashed(bits: Values, position: Values, seed: int) -> Values:
    word = (bits + 0x9E3779B1 * (position + 1) + 0x85EBCA77 * (seed + 1)) & 0xFFFFFFFF
    for shift, factor in ((16, 0x7FEB352D), (15, 0x46A7B8A5)):
        word = ((word ^ (word >> shift)) * factor) & 0xFFFFFFFF
    hashed: Values = (word ^ (word >> 16)) & 0xFFFFFF
    return hashed
