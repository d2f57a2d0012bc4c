"""Open samples in random order, augmented, in other processes: :class:`Loader`.

Which samples a step has, and how they are augmented, follows from the seed and the step alone. Transforms draw from torch's
global generator, of which a process has one: so samples are opened in processes of their own, seeded anew for every sample.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from typing import Any

import torch

from madtp.errors import ConfigError
from zoo.datasets.records import DataSet, Sample

_opened: DataSet[Any] | None = None


class Loader:
    """Samples of the steps of a run.

    Args:
        data: The data set, with the transform of training.
        samples_per_step: Samples of a step. The rest of an epoch that fills no step is left out.
        seed: Seed of order and augmentation.
        workers: Processes that open samples. 0 opens them in this process, where augmentation draws from the same generator as
            training.

    Raises:
        ConfigError: The data set has fewer samples than a step.
    """

    def __init__(self, data: DataSet[Any], samples_per_step: int, seed: int, workers: int) -> None:
        if len(data) < samples_per_step:
            raise ConfigError(f"{data.name} has {len(data)} samples, and a step takes {samples_per_step}; take fewer.")
        self.data = data
        self.samples_per_step = samples_per_step
        self.seed = seed
        self.workers = workers
        self._pool: ProcessPoolExecutor | None = None

    def open(self, step: int, rows: range) -> list[tuple[Sample[Any], float]]:
        """Return the samples of these rows of a step's batch, each with a draw that is uniform in [0, 1)."""
        indices = self.indices(step)[rows.start : rows.stop]
        seeds = [(self.seed * 1_000_003 + step) * self.samples_per_step + row for row in rows]
        if not self.workers:
            samples: Sequence[Sample[Any]] = [self.data[index] for index in indices]
        else:
            samples = list(self._processes().map(_open, indices, seeds))
        return [(sample, _draw(seed)) for sample, seed in zip(samples, seeds, strict=True)]

    def indices(self, step: int) -> list[int]:
        """Return the indices of a step's samples in the data set."""
        epoch, place = divmod(step, len(self.data) // self.samples_per_step)
        first = place * self.samples_per_step
        return _order(len(self.data), self.seed, epoch)[first : first + self.samples_per_step]

    def _processes(self) -> ProcessPoolExecutor:
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.workers, context, initializer=_receive, initargs=(self.data,))
        return self._pool


@lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()


def _draw(seed: int) -> float:
    return float(torch.rand((), generator=torch.Generator().manual_seed(seed)))


def _receive(data: DataSet[Any]) -> None:
    global _opened
    _opened = data
    torch.set_num_threads(1)


def _open(place: int, seed: int) -> Sample[Any]:
    assert _opened is not None
    torch.manual_seed(seed)
    return _opened[place]
