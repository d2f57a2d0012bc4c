"""What the variants of one model share: rewritten models, calibrated gains, and what pruning keeps of each batch.

Start at :class:`Bench`. Rewriting and calibrating take long, so each is done once. Rewritten models share their parameters with
the dense model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

import madtp
from madtp.config import PruningConfig
from madtp.cost.counting import Counter
from madtp.pruned import PrunedModel
from madtp.saving.artefacts import FORMATS, Opened
from madtp.tuning.calibration import dense_macs
from zoo.benchmark.models import Batch, OpenedModel

TOLERANCE = 0.01
"""How far calibration may be off, as a fraction of the dense MACs."""


@dataclass(frozen=True)
class Target:
    """How strongly a model is to be pruned: by a fraction of its MACs, or as a checkpoint was.

    Attributes:
        label: what tables call it.
        reduction: fraction of the dense MACs to save; None for a checkpoint.
        checkpoint: name of a pruned checkpoint; None for a reduction.
    """

    label: str
    reduction: float | None = None
    checkpoint: str | None = None


def targets_of(reductions: Sequence[float], checkpoints: Sequence[str]) -> list[Target]:
    """Return reductions and pruned checkpoints as targets."""
    return [
        *(Target(f"−{100 * reduction:g}%", reduction=reduction) for reduction in reductions),
        *(Target(f"({checkpoint})", checkpoint=checkpoint) for checkpoint in checkpoints),
    ]


@dataclass(frozen=True)
class Kept:
    """What a pruned model kept of one batch.

    Attributes:
        macs: multiply-accumulates per sample.
        dense_macs: the same without pruning.
        tokens: tokens of each sample after each site, by site.
    """

    macs: float
    dense_macs: float
    tokens: dict[str, list[int]]


@dataclass(frozen=True)
class Strength:
    """A pruned model, and what gives it its strength before a call, since several strengths may share the model."""

    model: PrunedModel
    apply: Callable[[], None]


@dataclass
class Bench:
    """A dense model, its batches, and what was built of it so far.

    Attributes:
        opened: the model.
        calibration: batches that strengths are set by.
        batches: batches to time, all of one size; see :meth:`load`.
    """

    opened: OpenedModel
    calibration: list[Batch]
    batches: list[Batch] = field(default_factory=list)
    _rewritten: dict[PruningConfig, PrunedModel] = field(default_factory=dict)
    _gains: dict[Target, float] = field(default_factory=dict)
    _frozen: dict[Target, PrunedModel] = field(default_factory=dict)
    _kept: dict[Target, list[Kept]] = field(default_factory=dict)

    @property
    def dense(self) -> nn.Module:
        """The dense model."""
        return self.opened.dense

    def load(self, batches: list[Batch]) -> None:
        """Take other batches to time."""
        self.batches = batches
        self._kept.clear()

    def rewritten(self, config: PruningConfig | None = None) -> PrunedModel:
        """Return the dense model rewritten, once for each configuration."""
        config = PruningConfig() if config is None else config
        if config not in self._rewritten:
            self._rewritten[config] = madtp.rewrite(self.dense, self.calibration[0], config=config).eval()
        return self._rewritten[config]

    def priced(self) -> PrunedModel:
        """Return a pruned model that knows the MACs of the dense one; any will do, so none is rewritten for it."""
        return next(iter(self.opened.pruned.values())) if self.opened.pruned else self.rewritten()

    def strength(self, target: Target) -> Strength:
        """Return the pruned model of a target, calibrated on the batches for that."""
        if target.checkpoint is not None:
            return Strength(self.opened.pruned[target.checkpoint], lambda: None)
        assert target.reduction is not None
        model = self.rewritten()
        if target not in self._gains:
            set_strength(model, gain=1.0)
            found = madtp.calibrate(model, self.calibration, reduction=target.reduction, tolerance=TOLERANCE)
            self._gains[target] = found.gain
        return Strength(model, partial(set_strength, model, gain=self._gains[target]))

    def frozen(self, target: Target) -> PrunedModel:
        """Return a pruned model of its own, with the mean token counts of a target on the calibration batches."""
        if target not in self._frozen:
            if target.checkpoint is not None:
                model = self.opened.reopened(target.checkpoint)
            else:
                self.strength(target)
                model = madtp.rewrite(self.dense, self.calibration[0]).eval()
                model.madtp.gain = self._gains[target]
            if model.madtp.config.batching != "static":
                madtp.freeze(model, self.calibration)
            self._frozen[target] = model
        return self._frozen[target]

    def kept(self, target: Target) -> list[Kept]:
        """Return what the pruned model of a target keeps of each batch to time."""
        if target not in self._kept:
            strength = self.strength(target)
            strength.apply()
            self._kept[target] = kept_of(strength.model, self.batches)
        return self._kept[target]

    def saved(self, target: Target) -> float:
        """Return the fraction of the dense MACs that the pruned model of a target saves on the batches to time."""
        kept = self.kept(target)
        return 1 - sum(k.macs for k in kept) / sum(k.dense_macs for k in kept)


def set_strength(model: PrunedModel, *, gain: float, temperature: float = 1.0) -> None:
    """Set how strongly a model prunes."""
    model.madtp.gain, model.madtp.temperature = gain, temperature


@torch.no_grad()
def kept_of(model: PrunedModel, batches: Sequence[Batch]) -> list[Kept]:
    """Run a pruned model and return what it kept of each batch."""
    kept = []
    for batch in batches:
        model(**batch)
        tokens = {site: counts.tolist() for site, counts in model.madtp.token_counts().items()}
        kept.append(Kept(model.madtp.macs(), dense_macs(model), tokens))
    return kept


def opened_export(model: PrunedModel, batch: Batch, format: str) -> Opened:
    """Return a frozen model as an exported file, opened; the file itself is gone."""
    with TemporaryDirectory() as folder:
        return madtp.export(model, Path(folder) / f"model{FORMATS[format].suffix}", batch, format=format).open()


@torch.no_grad()
def counted_macs(call: Callable[[], object], samples: int) -> float:
    """Return the multiply-accumulates per sample of what a call runs."""
    with Counter(lambda: False) as counter:
        call()
    return counter.total / samples


def samples_of(batch: Batch) -> int:
    """Return the number of samples of a batch."""
    return next(len(value) for value in batch.values() if isinstance(value, Tensor) and value.dim())
