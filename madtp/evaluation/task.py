"""What can be evaluated: a :class:`Task` runs a model on samples and computes metrics of the results.

A task consists of stages, usually one. A later stage may use the results of earlier ones: retrieval compares the features of
the whole data set before it matches pairs. Each stage gives one result for each sample, in plain JSON values, so that results
can be stored in files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import nn

Result = dict[str, Any]
"""Result of a stage for one sample, in JSON values by name. Metrics are computed from nothing else."""


class Stage(Protocol):
    """One pass over the samples."""

    @property
    def name(self) -> str:
        """A word that distinguishes the stage from the others of its task."""

    def run(self, model: nn.Module, samples: range, earlier: Mapping[str, Sequence[Result]]) -> list[Result]:
        """Return the results of some samples, in their order.

        Args:
            model: the model, in eval mode.
            samples: positions in the data set.
            earlier: all results of the stages before, by name of the stage.
        """


class Task(Protocol):
    """How a kind of model is evaluated on a data set."""

    @property
    def name(self) -> str:
        """Name of the task, one word."""

    @property
    def stages(self) -> Sequence[Stage]:
        """The stages, in the order in which they run."""

    @property
    def ids(self) -> Sequence[str]:
        """Names of all samples."""

    def inputs(self, samples: range) -> dict[str, Any]:
        """Return the arguments of a call of the model on these samples; it is rewritten and calibrated with them."""

    def metrics(self, results: Mapping[str, Sequence[Result]]) -> dict[str, float]:
        """Return metrics by name, given the results of all stages."""
