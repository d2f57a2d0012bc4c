"""Which tokens the parts of a configuration keep, as tensors: :func:`select`."""

from __future__ import annotations

import torch
from torch import Tensor

from madtp.config import PruningConfig
from madtp.method.arrays import on_host
from madtp.method.importance import ImportanceTerms
from madtp.method.parts import parts_of
from madtp.method.scorers import Evidence
from madtp.method.selectors import Ballot


def select(
    terms: ImportanceTerms, theta: Tensor, candidates: Tensor | None, config: PruningConfig, *, gain: float
) -> Tensor:
    """Return the candidates that survive, ``[B, N]`` bool; arguments as in a site."""
    parts, importance = parts_of(config), terms.mean()
    ballot = Ballot(
        importance=on_host(importance),
        ranking=on_host(parts.scorer.score(Evidence(terms, importance), config)),
        theta=on_host(theta),
        gain=gain,
        candidates=None if candidates is None else on_host(candidates),
        smallest_drop=parts.reducer.smallest_drop,
    )
    return torch.from_numpy(parts.selector.keep(ballot, config))
