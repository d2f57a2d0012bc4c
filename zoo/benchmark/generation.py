"""Measure how long a model takes to generate, dense and pruned: :func:`measure_generation`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from statistics import mean
from typing import Any

import torch
from torch import nn

import madtp
from madtp.benchmark import Limits, Run, describe_environment, time_interleaved
from madtp.benchmark.generation import GenerationMeasurement, GenerationResult
from madtp.config import PruningConfig
from madtp.errors import CalibrationError, ConfigError
from madtp.pruned import PrunedModel
from madtp.tokens.cache_bytes import bytes_of_caches
from madtp.tuning.search import KNOBS, Knob
from zoo.benchmark.bench import TOLERANCE, targets_of
from zoo.benchmark.continuing import Continuing, StepForm, cache_of, form_of_steps
from zoo.benchmark.generators import GeneratingModel, PromptSize, open_generator
from zoo.benchmark.measuring import DTYPES, FEWEST_SAMPLES, LIBRARIES, Notify, quiet
from zoo.benchmark.models import DRAWN_SAMPLES, Batch, cast_batch

FIRST = {"gain": 1.0, "keep_ratio": 0.5}
"""Where the search for a strength begins."""
Save = Callable[[GenerationResult], None]


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """What to measure, and how.

    Attributes:
        model: see :func:`zoo.benchmark.generators.open_generator`.
        fields: see there.
        pruning: fields of :class:`madtp.PruningConfig`. With ``keep_ratio``, that is what strengths are calibrated by.
        reductions: fractions of the MACs of the prefill to save, each a pruned model.
        batch_sizes: samples in a batch.
        text_tokens: words of a prompt.
        image_sizes: sides of images in pixels, each a model of its own; empty for the model's own size.
        new_tokens: tokens that each prompt is continued by, at least 2.
        batches: number of batches of each size; all samples differ. None takes as many as hold 4 samples.
        calibration_samples: samples that strengths are calibrated on, other than those that are timed. None takes 16.
        rounds: largest number of rounds.
        warm_up: rounds before them that do not count.
        seconds: no further round begins after so many, for each prompt and batch size; None for no such limit.
        threads: threads of torch.
        dtype: of parameters and images: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        seed: of random weights and samples.

    Raises:
        ConfigError: a value is out of range.
    """

    model: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    pruning: Mapping[str, Any] = field(default_factory=dict)
    reductions: tuple[float, ...] = (0.5, 0.8)
    batch_sizes: tuple[int, ...] = (1, 8)
    text_tokens: tuple[int, ...] = (16, 64)
    image_sizes: tuple[int, ...] = ()
    new_tokens: int = 16
    batches: int | None = None
    calibration_samples: int | None = None
    rounds: int = 5
    warm_up: int = 1
    seconds: float | None = None
    threads: int = 1
    dtype: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype is {self.dtype!r}; allowed: {', '.join(DTYPES)}")
        for name, low in (("batches", 1), ("calibration_samples", 2), ("threads", 1), ("new_tokens", 2)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise ConfigError(f"{name} is {value}; allowed: at least {low}")
        for name in ("batch_sizes", "text_tokens"):
            if not getattr(self, name) or min(getattr(self, name)) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; allowed: one or more numbers of at least 1")

    @property
    def limits(self) -> Limits:
        """How long to measure one prompt size in batches of one size."""
        return Limits(self.rounds, self.warm_up, self.seconds)

    def batches_of(self, size: int) -> int:
        """Return the number of batches of a size."""
        return -(-FEWEST_SAMPLES // size) if self.batches is None else self.batches


def measure_generation(
    settings: GenerationSettings, command: str = "", *, save: Save = lambda result: None, notify: Notify = quiet
) -> GenerationResult:
    """Measure a model that generates, dense and pruned taking turns. A strength that cannot be reached is left out, with the
    reason in the result.

    Args:
        settings: what to measure.
        command: the command line, for the record.
        save: is given the result after every round, so that an interrupted benchmark leaves what it has.
        notify: is told what happens.

    Raises:
        MadtpError: the model does not generate, or cannot be built or rewritten.
    """
    torch.set_num_threads(settings.threads)
    blank = GenerationResult(command=command, settings=asdict(settings), environment=describe_environment(LIBRARIES))
    session = _Session(settings, blank, save, notify)
    for image_size in settings.image_sizes or (None,):
        notify(f"building {settings.model}", 0, 0)
        size = PromptSize(max(settings.text_tokens), image_size)
        opened = open_generator(settings.model, settings.seed, size, settings.new_tokens, settings.fields)
        opened.dense.to(DTYPES[settings.dtype])
        session.measure_model(opened)
    session.result = replace(session.result, complete=True)
    save(session.result)
    return session.result


def _knob_of(pruned: PrunedModel) -> Knob:
    """The setting that strengths are calibrated by."""
    return KNOBS["gain" if pruned.madtp.config.keep_ratio is None else "keep_ratio"]


@dataclass
class _Session:
    """What a benchmark measured so far; see :func:`measure_generation`."""

    settings: GenerationSettings
    result: GenerationResult
    save: Save
    notify: Notify

    def measure_model(self, opened: GeneratingModel) -> None:
        """Rewrite a model, and measure it with prompts of all lengths."""
        lengths = self.settings.text_tokens
        form = form_of_steps(opened.dense, opened.cache_name, self._cast(opened.prompts(2, 2, lengths[0]))[0])
        self.notify("rewriting", 0, 0)
        config = PruningConfig.from_dict(self.settings.pruning)
        pruned = madtp.rewrite(opened.dense, self._calibration(opened, lengths[0])[0], config=config).eval()
        for text_tokens in lengths:
            strengths = self._strengths(opened, pruned, text_tokens)
            for batch in self.settings.batch_sizes:
                count = self.settings.batches_of(batch) * batch
                prompts = self._cast(opened.prompts(count, batch, text_tokens))
                self._time((opened.dense, pruned), form, Prompts(prompts, batch, text_tokens), strengths)

    def _strengths(self, opened: GeneratingModel, pruned: PrunedModel, text_tokens: int) -> dict[str, float]:
        """Calibrate for prompts with so many words; gains, or keep ratios, by the label of the strength."""
        knob = _knob_of(pruned)
        calibration, strengths, notes = self._calibration(opened, text_tokens), dict[str, float](), dict[str, str]()
        length = calibration[0]["input_ids"].shape[1]
        for target in targets_of(self.settings.reductions, ()):
            assert target.reduction is not None
            self.notify(f"prompts of {length}: calibrating {target.label}", 0, 0)
            try:
                knob.write(pruned, FIRST[knob.name])
                madtp.calibrate(pruned, calibration, reduction=target.reduction, tolerance=TOLERANCE)
                strengths[target.label] = knob.read(pruned)
            except CalibrationError as error:
                notes[f"pruned {target.label}, prompts of {length}"] = f"left out: {error}"
        self.result = replace(self.result, notes={**self.result.notes, **notes})
        return strengths

    def _time(
        self, models: tuple[nn.Module, PrunedModel], form: StepForm, prompts: Prompts, strengths: Mapping[str, float]
    ) -> None:
        """Measure a dense model and its pruned one in turns on prompts, and add the measurements to the result."""
        dense, pruned = models
        doing = f"batch {prompts.batch}, prompts of {prompts.length}"
        total = self.settings.warm_up + self.settings.rounds
        self.notify(f"{doing}: what is kept", 0, 0)
        blank = partial(
            GenerationMeasurement,
            batch=prompts.batch,
            image_tokens=prompts.length - prompts.text_tokens,
            text_tokens=prompts.text_tokens,
            new_tokens=self.settings.new_tokens,
        )
        entrants = [Continuing(blank(target="", **dense_costs(dense, pruned, prompts.calls)), dense)]
        for label, strength in strengths.items():
            prepare = partial(_knob_of(pruned).write, pruned, strength)
            prepare()
            entrants.append(Continuing(blank(target=label, **pruned_costs(pruned, prompts.calls)), pruned, prepare))
        runs = [Run(one.measurement.name, partial(one.generate, prompts.calls, form), one.prepare) for one in entrants]
        before = self.result
        self.notify(doing, 0, total)
        for timed in time_interleaved(runs, len(prompts.calls), self.settings.limits):
            self.notify(doing, timed.number + 1, total)
            for one in entrants:
                one.finish(timed)
            self.result = replace(before, measurements=(*before.measurements, *(one.measurement for one in entrants)))
            if not timed.warm_up:
                self.save(self.result)

    def _calibration(self, opened: GeneratingModel, text_tokens: int) -> list[Batch]:
        return self._cast(opened.calibration(self.settings.calibration_samples or DRAWN_SAMPLES, text_tokens))

    def _cast(self, batches: Sequence[Batch]) -> list[Batch]:
        return [cast_batch(DTYPES[self.settings.dtype], batch) for batch in batches]


@dataclass(frozen=True)
class Prompts:
    """Prompts to continue.

    Attributes:
        calls: keyword arguments of the model, one for each batch.
        batch: samples of a batch.
        text_tokens: words of a prompt.
    """

    calls: Sequence[Batch]
    batch: int
    text_tokens: int

    @property
    def length(self) -> int:
        """Tokens of a prompt."""
        return int(self.calls[0]["input_ids"].shape[1])


@torch.no_grad()
def pruned_costs(model: PrunedModel, calls: Sequence[Batch]) -> dict[str, Any]:
    """Run the prefills of a pruned model, and return its MACs, bytes and tokens as fields of a measurement."""
    macs, held, tokens = [], [], []
    for call in calls:
        output = model(**call, use_cache=True)
        macs.append(model.madtp.macs())
        held.append(bytes_of_caches([cache_of(output)]).held)
        tokens.append({site: counts.tolist() for site, counts in model.madtp.token_counts().items()})
    return {"macs": mean(macs), "cache_bytes": mean(held), "tokens": tuple(tokens)}


@torch.no_grad()
def dense_costs(model: nn.Module, pruned: PrunedModel, calls: Sequence[Batch]) -> dict[str, Any]:
    """Return MACs and bytes of a dense model in the same way. Its pruned form counts the MACs."""
    with pruned.madtp.dense():
        counted = pruned_costs(pruned, calls)
    held = [bytes_of_caches([cache_of(model(**call, use_cache=True))]).held for call in calls]
    return {"macs": counted["macs"], "cache_bytes": mean(held)}
