"""How a model continues prompts, with its times: :class:`Continuing`.

The cache of a call is read from its output and handed to the next call under the name that the model's forward has for it,
since transformers renamed it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from madtp.benchmark import Round, Seconds, Stopwatch
from madtp.benchmark.generation import GenerationMeasurement, Times
from zoo.benchmark.generators import CACHES
from zoo.benchmark.models import Batch


def _nothing() -> None:
    """Does nothing."""


@dataclass
class Continuing:
    """A model that continues prompts, and the times of its parts in the round that runs.

    Attributes:
        measurement: what was measured of it in the rounds before.
        model: the dense or the pruned model.
        prepare: gives the model its strength.
        prefills: time of each prefill of this round.
        steps: time of all steps of each batch of this round.
    """

    measurement: GenerationMeasurement
    model: nn.Module
    prepare: Callable[[], None] = _nothing
    prefills: list[Seconds] = field(default_factory=list)
    steps: list[Seconds] = field(default_factory=list)

    @torch.inference_mode()
    def generate(self, calls: Sequence[Batch], cache_name: str, number: int) -> None:
        """Continue the prompts of a batch, and time the prefill and the steps.

        Args:
            calls: batches of prompts.
            cache_name: what the model's forward calls a cache.
            number: of the batch.
        """
        call, steps = calls[number], self.measurement.new_tokens - 1
        watch = Stopwatch()
        output = self.model(**call, use_cache=True)
        words = next_words(output)
        self.prefills.append(watch.lap())
        for given in masks_of_steps(call, steps):
            output = self.model(input_ids=words, use_cache=True, **{cache_name: cache_of(output)}, **given)
            words = next_words(output)
        self.steps.append(watch.lap())

    def finish(self, timed: Round) -> None:
        """Take the times of a round, and count them if it counts."""
        steps = self.measurement.new_tokens - 1
        prefill, step = _mean_times(self.prefills, 1), _mean_times(self.steps, steps)
        self.prefills.clear()
        self.steps.clear()
        if not timed.warm_up:
            before = self.measurement
            self.measurement = replace(
                before, prefill=_joined(before.prefill, prefill), step=_joined(before.step, step)
            )


def _mean_times(laps: Sequence[Seconds], parts: int) -> Times:
    """Milliseconds of one of the equal parts of laps, the mean over the laps."""
    count = len(laps) * parts
    wall, cpu = (round(1e3 * sum(getattr(lap, clock) for lap in laps) / count, 4) for clock in ("wall", "cpu"))
    return Times((wall,), (cpu,))


def _joined(before: Times, after: Times) -> Times:
    return Times(before.wall_ms + after.wall_ms, before.cpu_ms + after.cpu_ms)


def cache_of(output: Any) -> Any:
    """Return the key/value cache in what a call of a model returned, by its newest name that is there."""
    return next(getattr(output, name) for name in CACHES if getattr(output, name, None) is not None)


def next_words(output: Any) -> Tensor:
    """Return the likeliest next word of each sample, ``[B, 1]``."""
    words: Tensor = output.logits[:, -1:].argmax(dim=-1)
    return words


def masks_of_steps(prompt: Batch, steps: int) -> list[dict[str, Tensor]]:
    """The attention mask of each step, ``[B, T + 1]``, ``[B, T + 2]`` ...; empty for a model that takes none."""
    mask = prompt.get("attention_mask")
    if mask is None:
        return [{} for _ in range(steps)]
    longest = torch.cat([mask, mask.new_ones(len(mask), steps)], dim=1)
    return [{"attention_mask": longest[:, : mask.shape[1] + number]} for number in range(1, steps + 1)]
