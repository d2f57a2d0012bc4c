"""What ``madtp export`` runs: a model is pruned, frozen, exported, checked and timed. Start at :func:`export_model`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

import madtp
from madtp.atomic_files import check_writable
from madtp.benchmark.timing import median_seconds
from madtp.errors import ConfigError
from madtp.pruned import PrunedModel
from madtp.saving.export import Exported, format_of
from zoo.benchmark.bench import Bench, Target, kept_of, opened_export
from zoo.benchmark.models import DENSE, Batch, open_model

DEFAULT_REDUCTION = 0.5


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """What to export, and how.

    Attributes:
        model: name of a model of the zoo or of timm.
        output: the file to write.
        checkpoint: weights: the name of a shipped checkpoint or the path of a saved model. Dense ones are pruned by
            ``reduction``. None takes the shipped dense weights, or random ones.
        reduction: fraction of the MACs to save where the checkpoint is not a pruned model; None for a half.
        format: as in :func:`madtp.export`.
        batch: number of samples that the artefact takes.
        any_batch: as in :func:`madtp.export`.
        rounds: rounds to time; 0 for none.
        threads: CPU threads.
        seed: of samples and random weights.
    """

    model: str
    output: Path
    checkpoint: str | None = None
    reduction: float | None = None
    format: str | None = None
    batch: int = 8
    any_batch: bool = False
    rounds: int = 5
    threads: int = 1
    seed: int = 0


@dataclass(frozen=True)
class ExportReport:
    """What was exported.

    Attributes:
        exported: the artefact.
        macs: multiply-accumulates per sample of the frozen model.
        dense_macs: the same of the dense model.
        seconds: median time of a batch, by what ran it; empty if nothing was timed.
    """

    exported: Exported
    macs: float
    dense_macs: float
    seconds: dict[str, float]


def _quiet(doing: str) -> None:
    """Reports nothing."""


def export_model(settings: ExportSettings, notify: Callable[[str], None] = _quiet) -> ExportReport:
    """Prune a model as settings say, fix its counts on calibration samples, export it, check and time the artefact.

    Args:
        settings: see there.
        notify: is told what happens.

    Raises:
        MadtpError: the model cannot be opened, pruned or exported.
    """
    if settings.any_batch and settings.batch < 2:
        raise ConfigError("batch is 1; to leave the number of samples free, export with 2 or more.")
    format_of(settings.output, settings.format)
    check_writable(settings.output)
    torch.set_num_threads(settings.threads)
    notify(f"opening {settings.model}")
    opened = open_model(settings.model, () if settings.checkpoint is None else (settings.checkpoint,), settings.seed)
    for module in (opened.dense, *opened.pruned.values()):
        module.eval()
    bench = Bench(opened, opened.calibration())
    notify("fixing token counts")
    frozen = bench.frozen(_target(settings, pruned=bool(opened.pruned)))
    batch = opened.samples(settings.batch, settings.batch)[0]
    notify(f"exporting to {settings.output}")
    exported = madtp.export(frozen, settings.output, batch, format=settings.format, any_batch=settings.any_batch)
    kept = kept_of(frozen, [batch])[0]
    seconds: dict[str, float] = {}
    if settings.rounds:
        notify("timing")
        calls: dict[str, Callable[..., object]] = {
            DENSE: opened.dense,
            f"{DENSE} {exported.format}": _dense_artefact(frozen, batch, exported),
            "frozen": frozen,
            exported.format: exported.open(),
        }
        with torch.no_grad():
            seconds = median_seconds({name: partial(call, **batch) for name, call in calls.items()}, settings.rounds)
    return ExportReport(exported, kept.macs, kept.dense_macs, seconds)


def _dense_artefact(frozen: PrunedModel, batch: Batch, exported: Exported) -> Callable[..., object]:
    """The dense model in the same format: what pruning saves there is the difference from it."""
    with frozen.madtp.dense():
        return opened_export(frozen, batch, exported.format)


def _target(settings: ExportSettings, *, pruned: bool) -> Target:
    if pruned:
        if settings.reduction is not None:
            raise ConfigError(
                f"{settings.checkpoint} is pruned already, so there is nothing to reduce; leave out --reduction."
            )
        return Target(settings.checkpoint or "", checkpoint=settings.checkpoint)
    reduction = DEFAULT_REDUCTION if settings.reduction is None else settings.reduction
    return Target(f"{reduction:.0%}", reduction=reduction)
