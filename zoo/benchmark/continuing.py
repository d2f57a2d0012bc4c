"""How a model continues prompts, with its times: :class:`Continuing`.

The cache of a call is read from its output and handed to the next call under the name that the model's forward has for it,
since transformers renamed it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from madtp.benchmark import Round, Seconds, Stopwatch
from madtp.benchmark.generation import GenerationMeasurement, Times
from madtp.errors import ConfigError
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
    def generate(self, calls: Sequence[Batch], form: StepForm, number: int) -> Tensor:
        """Continue the prompts of a batch, and time the prefill and the steps.

        Args:
            calls: batches of prompts.
            form: how the model takes steps.
            number: of the batch.

        Returns:
            The new words, ``[B, new tokens]``.
        """
        call = calls[number]
        given = [form.arguments(call, step) for step in range(1, self.measurement.new_tokens)]
        watch = Stopwatch()
        output = self.model(**call, use_cache=True)
        words = [next_words(output)]
        self.prefills.append(watch.lap())
        for arguments in given:
            output = form.step(self.model, output, words[-1], arguments)
            words.append(next_words(output))
        self.steps.append(watch.lap())
        return torch.cat(words, dim=1)

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
    """Return the key/value cache in what a call of a model returned, by its newest name that is there.

    Raises:
        ConfigError: there is none.
    """
    found = (getattr(output, name, None) for name in CACHES)
    cache = next((one for one in found if one is not None), None)
    if cache is None:
        raise ConfigError(f"its call returns no key/value cache, but a {type(output).__name__}.")
    return cache


def next_words(output: Any) -> Tensor:
    """Return the likeliest next word of each sample, ``[B, 1]``."""
    words: Tensor = output.logits[:, -1:].argmax(dim=-1)
    return words


@dataclass(frozen=True)
class StepForm:
    """How a model takes a step.

    Attributes:
        cache_name: what its forward calls a cache.
        masked: whether it takes the attention mask of all tokens. Without padding the mask says nothing, and some models take
            it for the positions of all tokens.
    """

    cache_name: str
    masked: bool

    def arguments(self, prompt: Batch, number: int) -> dict[str, Tensor]:
        """Return what a step takes beside the word and the cache: a mask ``[B, T + number]``. Steps count from 1."""
        mask = prompt.get("attention_mask")
        if mask is None or not self.masked:
            return {}
        return {"attention_mask": torch.cat([mask, mask.new_ones(len(mask), number)], dim=1)}

    def step(self, model: nn.Module, output: Any, words: Tensor, given: Mapping[str, Tensor]) -> Any:
        """Return the output of a step behind an output, for words ``[B, 1]`` and other arguments."""
        return model(input_ids=words, use_cache=True, **{self.cache_name: cache_of(output)}, **given)


@torch.inference_mode()
def form_of_steps(model: nn.Module, cache_name: str, prompt: Batch) -> StepForm:
    """Try out a prefill and a step, with a mask and without one, and return how the model takes steps.

    Raises:
        ConfigError: the model takes neither.
    """
    errors = []
    for form in (StepForm(cache_name, masked=True), StepForm(cache_name, masked=False)):
        try:
            output = model(**prompt, use_cache=True)
            form.step(model, output, next_words(output), form.arguments(prompt, 1))
        except Exception as error:  # the model's own, whatever it is
            errors.append(error)
        else:
            return form
    raise ConfigError(
        f"{type(model).__name__} cannot be measured: its call with a prompt, or with a word and a cache, fails "
        f"({type(errors[0]).__name__}: {errors[0]})."
    ) from errors[0]
