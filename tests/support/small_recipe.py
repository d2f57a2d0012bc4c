"""A recipe as :func:`madtp.training.train` runs it, on the network of :mod:`small_learner`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from small_learner import learner

from madtp.training import Learner, TrainingConfig, TrainingResult


def build(settings: Mapping[str, Any], training: TrainingConfig) -> Learner:
    """Build the learner; no setting changes it."""
    return learner()


def finish(learner: Learner, result: TrainingResult, output: Path) -> None:
    """Write that the run is done."""
    (output / "done.txt").write_text(str(result.steps))
