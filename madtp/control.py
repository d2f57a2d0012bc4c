"""What the sites of one pruned model share: strength, configuration, and the record of the last forward.

Start at :class:`PruningControl`. It is plain state, not a module: nothing here is a parameter.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from madtp.config import PruningConfig
from madtp.guidance import AlignmentTokens
from madtp.state import TokenState


@dataclass
class PruningControl:
    """Shared by all sites of a model.

    Attributes:
        config: how pruning is done; ``temperature`` and ``gain`` below start from it and may be changed.
        forced: if given, which original tokens ``[B, N0]`` survive at each site, instead of DTP's decision (for tests
            of the graph and for replaying a decision).
        in_place: dropped tokens keep their slots, marked as padding, instead of leaving; merging has to be off. The graph must
            compute the same for the survivors either way, which is how a rewrite checks itself.
        states, features, kept_counts: record of the last forward: state after each site; pooled features ``[B, K, d_e]`` by
            site and modality; prunable tokens ``[B]`` that were kept, by site (``site[modality]`` for a segment).
    """

    config: PruningConfig
    alignment: AlignmentTokens | None = None
    temperature: float = 1.0
    gain: float = 1.0
    forced: dict[str, Tensor] | None = None
    in_place: bool = False
    static_counts: dict[str, int] = field(default_factory=dict)
    states: dict[str, TokenState] = field(default_factory=dict)
    features: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    kept_counts: dict[str, Tensor] = field(default_factory=dict)

    @property
    def active(self) -> bool:
        """Whether sites prune at all."""
        return self.temperature > 0 or self.forced is not None

    def begin(self) -> None:
        """Forget the last forward."""
        self.states.clear()
        self.features.clear()
        self.kept_counts.clear()

    def collects_features(self) -> bool:
        """Whether the alignment features are wanted: they serve only a loss."""
        return self.config.alignment and torch.is_grad_enabled()
