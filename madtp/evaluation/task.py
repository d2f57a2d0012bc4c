"""What can be evaluated: a :class:`Task` runs a model on samples and makes metrics of the results.

A task consists of stages, most of one; a later stage may use what earlier ones found (retrieval compares features of the
whole data set before it matches pairs). Each stage gives one result a sample, in plain JSON values, so that results can be
kept in files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import nn

Result = dict[str, Any]
"""What a stage found about one sample: names and JSON values. Metrics are made of nothing else."""


class Stage(Protocol):
    """One pass over the samples."""

    @property
    def name(self) -> str:
        """A word that tells the stage from others of its task."""

    def run(self, model: nn.Module, samples: range, earlier: Mapping[str, Sequence[Result]]) -> list[Result]:
        """Results of the samples at these places, in their order.

        Args:
            model: in eval mode.
            samples: places in the data set.
            earlier: all results of the stages before, by name of the stage.
        """


class Task(Protocol):
    """How a kind of model is evaluated on a data set."""

    @property
    def name(self) -> str:
        """A word."""

    @property
    def stages(self) -> Sequence[Stage]:
        """In the order in which they run."""

    @property
    def ids(self) -> Sequence[str]:
        """Names of all samples."""

    def inputs(self, samples: range) -> dict[str, Any]:
        """Arguments of a call of the model on these samples, with which it is rewritten and calibrated."""

    def metrics(self, results: Mapping[str, Sequence[Result]]) -> dict[str, float]:
        """Metrics by name, of the results of all stages."""
