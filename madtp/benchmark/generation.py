"""What a benchmark of text generation measured, and the ratios that follow from it: :class:`GenerationResult` and
:func:`compare_generation`.

The *prefill* is the call that reads the prompt, fills the key/value cache and yields the first new token. Each further token
takes one *step*, which reads the token before and the cache.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from madtp.atomic_files import write_text
from madtp.benchmark.environment import Environment
from madtp.benchmark.result import Clock
from madtp.benchmark.spread import Spread, spread_of
from madtp.errors import DataError
from madtp.files.json_text import read_description

FORMAT = 1
KIND = "generation"


@dataclass(frozen=True)
class Times:
    """Milliseconds in each round, means over its batches.

    Attributes:
        wall_ms: by the clock.
        cpu_ms: of all threads together.
    """

    wall_ms: tuple[float, ...] = ()
    cpu_ms: tuple[float, ...] = ()

    def by(self, clock: Clock) -> tuple[float, ...]:
        """Milliseconds by one of the clocks."""
        return self.wall_ms if clock == "wall" else self.cpu_ms


@dataclass(frozen=True, kw_only=True)
class GenerationMeasurement:
    """One model that continues prompts of one size, in batches of one size.

    Attributes:
        batch: samples of a batch.
        image_tokens: tokens of a sample's prompt that stand for its image.
        text_tokens: all other tokens of the prompt.
        new_tokens: tokens that each sample is continued by; the prefill yields the first.
        target: how strongly the model is pruned; empty for the dense model.
        macs: multiply-accumulates of the prefill, per sample.
        cache_bytes: bytes of the key/value cache of a batch after the prefill, the mean over the batches. A batch takes as many
            slots as its fullest sample.
        prefill: times of the prefill of a batch.
        step: times of a step of a batch, the mean over the steps.
        tokens: tokens of each sample after each site, by site, one entry for each batch.
    """

    batch: int
    image_tokens: int
    text_tokens: int
    new_tokens: int
    target: str
    macs: float
    cache_bytes: float
    prefill: Times = Times()
    step: Times = Times()
    tokens: tuple[dict[str, list[int]], ...] = ()

    @property
    def name(self) -> str:
        """What tables call it."""
        return f"pruned {self.target}" if self.target else "dense"

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> GenerationMeasurement:
        """Make one of the JSON values of its fields."""
        times = {name: Times(**{k: tuple(v) for k, v in entry[name].items()}) for name in ("prefill", "step")}
        return cls(**{**entry, **times, "tokens": tuple(entry["tokens"])})


@dataclass(frozen=True, kw_only=True)
class GenerationResult:
    """Everything that a benchmark of generation measured, and how.

    Attributes:
        command: the command line.
        settings: its settings, in JSON values.
        environment: the machine.
        measurements: in the order in which they were made.
        notes: why a strength was left out, or what else to know of it, by its name.
        complete: whether it ran to its end; a result that is not is valid as far as it goes.
    """

    command: str
    settings: dict[str, Any]
    environment: Environment
    measurements: tuple[GenerationMeasurement, ...] = ()
    notes: dict[str, str] = field(default_factory=dict)
    complete: bool = False

    def write(self, path: Path, clock: Clock = "wall") -> None:
        """Write JSON, whole or not at all: what was measured, and under ``comparison`` the rows of
        :func:`compare_generation`."""
        rows = [asdict(row) for row in compare_generation(self, clock)]
        content = {"format": FORMAT, "kind": KIND, **asdict(self), "clock": clock, "comparison": rows}
        write_text(path, json.dumps(content, indent=1))

    @classmethod
    def read(cls, path: Path) -> GenerationResult:
        """Read what :meth:`write` wrote.

        Raises:
            DataError: the file is no result of a benchmark of generation.
        """
        try:
            content = read_description(path)
            if content["kind"] != KIND:
                raise ValueError(f"its kind is {content['kind']!r}")
            return cls(
                command=content["command"],
                settings=content["settings"],
                environment=Environment(**content["environment"]),
                measurements=tuple(map(GenerationMeasurement.from_json, content["measurements"])),
                notes=content["notes"],
                complete=content["complete"],
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path} is no result of `madtp bench --generate`: {error!r}; run the command again."
            ) from error


@dataclass(frozen=True, kw_only=True)
class GenerationComparison:
    """One measurement, and what it is of the dense model's in the same rounds: 0.5 is half as much.

    Attributes:
        batch: samples of a batch.
        image_tokens: see :class:`GenerationMeasurement`.
        text_tokens: see there.
        name: what tables call it.
        prefill_ms: of a batch, over the rounds.
        step_ms: of a batch, over the rounds.
        tokens_per_second: new tokens of all samples, by the median time of the prefill and of the steps.
        cache_bytes: of a batch after the prefill.
        macs_share: MACs of the prefill by those of the dense model; None without a dense model, as are all that follow.
        prefill_share: the same for the median of the prefill.
        step_share: for the median of a step.
        speed_share: for the tokens a second; above 1 is faster.
        cache_share: for the bytes of the cache.
    """

    batch: int
    image_tokens: int
    text_tokens: int
    name: str
    prefill_ms: Spread
    step_ms: Spread
    tokens_per_second: float
    cache_bytes: float
    macs_share: float | None
    prefill_share: float | None
    step_share: float | None
    speed_share: float | None
    cache_share: float | None


def compare_generation(result: GenerationResult, clock: Clock = "wall") -> list[GenerationComparison]:
    """Return a row for each measurement that has a time.

    Args:
        result: measurements; those of one prompt and batch size were made in the same rounds.
        clock: which times to take.
    """
    timed = [(one, _values(one, clock)) for one in result.measurements if one.prefill.by(clock)]
    dense = {_size(one): values for one, values in timed if not one.target}
    return [
        GenerationComparison(
            batch=one.batch,
            image_tokens=one.image_tokens,
            text_tokens=one.text_tokens,
            name=one.name,
            prefill_ms=spread_of(one.prefill.by(clock)),
            step_ms=spread_of(one.step.by(clock)),
            tokens_per_second=values["speed"],
            cache_bytes=one.cache_bytes,
            **{f"{name}_share": _share(name, values, dense.get(_size(one))) for name in values},
        )
        for one, values in timed
    ]


def _size(one: GenerationMeasurement) -> tuple[int, int, int]:
    return one.batch, one.image_tokens, one.text_tokens


def _values(one: GenerationMeasurement, clock: Clock) -> dict[str, float]:
    """What is compared with the dense model's: MACs, median milliseconds, new tokens a second, and bytes."""
    prefill, step = spread_of(one.prefill.by(clock)).median, spread_of(one.step.by(clock)).median
    speed = 1e3 * one.batch * one.new_tokens / (prefill + (one.new_tokens - 1) * step)
    return {"macs": one.macs, "prefill": prefill, "step": step, "speed": speed, "cache": one.cache_bytes}


def _share(name: str, values: Mapping[str, float], dense: Mapping[str, float] | None) -> float | None:
    return None if dense is None else values[name] / dense[name]
