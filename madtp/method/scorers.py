"""Scorers: what tokens are ranked by. A scorer says what it needs, and nothing else is computed.

Start at :class:`Scorer`; :data:`SCORERS` finds them by name. :class:`Importance` is the method, S; the others are controls of
ablations. Selectors (``selectors.py``) turn scores into survivors, reducers (``reducers.py``) decide what becomes of the other
tokens, and ``parts.py`` puts the three together.

Symbols: B samples, N tokens, K alignment tokens, S ``[B, N]`` the importance.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from madtp.config import PruningConfig
from madtp.errors import ConfigError
from madtp.method.arrays import Values, in_float32
from madtp.method.importance import ImportanceTerms


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What the parts of a site read.

    Attributes:
        received: the attention that each token receives.
        class_attention: what the class token attends to.
        guidance: the guidance G of the alignment tokens.
        importance: S, which needs all of these.
    """

    received: bool = False
    class_attention: bool = False
    guidance: bool = False
    importance: bool = False

    def __or__(self, other: Needs) -> Needs:
        return Needs(
            received=self.received or other.received,
            class_attention=self.class_attention or other.class_attention,
            guidance=self.guidance or other.guidance,
            importance=self.importance or other.importance,
        )


NOTHING = Needs()
IMPORTANCE = Needs(received=True, class_attention=True, guidance=True, importance=True)


class Scorer(ABC):
    """Scores tokens.

    Attributes:
        name: what it is found by.
        needs: what it reads.
    """

    name: ClassVar[str]
    needs: ClassVar[Needs]

    @abstractmethod
    def score(self, terms: ImportanceTerms[Values], importance: Values, config: PruningConfig) -> Values:
        """Return what tokens are ranked by, the larger the better.

        Args:
            terms: those of the importance that something asked for; tensors or arrays.
            importance: S ``[B, N]``, their mean.
            config: the field ``seed`` is read.

        Returns:
            ``[B, N]`` float32.
        """


class Importance(Scorer):
    """The method: importance S, the mean of the terms of self-attention, alignment and class attention."""

    name = "importance"
    needs = IMPORTANCE

    def score(self, terms: ImportanceTerms[Values], importance: Values, config: PruningConfig) -> Values:
        return importance


class ClassAttention(Scorer):
    """Control: what the class token attends to, s3."""

    name = "class_attention"
    needs = Needs(class_attention=True)

    def score(self, terms: ImportanceTerms[Values], importance: Values, config: PruningConfig) -> Values:
        if terms.class_attention is None:
            raise ConfigError(
                "selection='class_attention' needs a class token, and this site has none; "
                "restrict `towers` to the modality that has one, or choose another selection"
            )
        return terms.class_attention


class Random(Scorer):
    """Control: a hash of S, so that the draw for a sample does not depend on the other samples of the batch."""

    name = "random"
    needs = IMPORTANCE

    def score(self, terms: ImportanceTerms[Values], importance: Values, config: PruningConfig) -> Values:
        return random_scores(importance, config.seed)


SCORERS: Mapping[str, Scorer] = {scorer.name: scorer for scorer in (Importance(), ClassAttention(), Random())}


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
