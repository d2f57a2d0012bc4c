"""Measure the variants of a model: :func:`measure`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from madtp.benchmark import (
    BenchmarkResult,
    Limits,
    Measurement,
    Run,
    describe_environment,
    peak_memory,
    time_interleaved,
)
from madtp.benchmark.result import Mode
from madtp.errors import ConfigError, MadtpError
from madtp.pruned import PrunedModel
from madtp.tuning.break_even import timed_sites
from zoo.benchmark.bench import Bench, Target, targets_of
from zoo.benchmark.models import cast_batch, open_model
from zoo.benchmark.variants import Entrant, Variant, choose_variants

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

LIBRARIES = ("madtp", "torch", "timm", "transformers")
FEWEST_SAMPLES = 4

Save = Callable[[BenchmarkResult], None]
Notify = Callable[[str, int, int], None]
"""Takes what is being done, how many rounds are done, and how many there are; 0 of 0 where there are no rounds."""


@dataclass(frozen=True)
class BenchmarkSettings:
    """What to measure, and how.

    Attributes:
        model: see :func:`zoo.benchmark.models.open_model`.
        checkpoints: see there; each pruned one is a target.
        reductions: fractions of the dense MACs to save, each a target.
        batch_sizes: samples in a batch.
        batches: number of batches of each size; all samples differ. None takes as many as hold 4 samples.
        calibration_samples: samples that strengths are calibrated on, other than those that are timed. None takes 64 where
            there is data, and 16 where pictures are drawn.
        rounds: largest number of rounds.
        warm_up: rounds before them that do not count.
        seconds: no further round begins after so many, for each batch size and mode; None for no such limit.
        threads: threads of torch.
        dtype: of parameters and images: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        seed: of random weights and samples.
        variants: names of variants; none takes the usual ones.
        compiled: whether to add the dense model by torch.compile.
        training: whether to time a forward with its backward, too.
        memory: whether to find the peak memory of a call.
        where: whether to find where the time of pruned models goes.

    Raises:
        ConfigError: a value is out of range.
    """

    model: str
    checkpoints: tuple[str, ...] = ()
    reductions: tuple[float, ...] = (0.5, 0.8)
    batch_sizes: tuple[int, ...] = (1, 8)
    batches: int | None = None
    calibration_samples: int | None = None
    rounds: int = 5
    warm_up: int = 1
    seconds: float | None = None
    threads: int = 1
    dtype: str = "float32"
    seed: int = 0
    variants: tuple[str, ...] = ()
    compiled: bool = False
    training: bool = False
    memory: bool = False
    where: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype is {self.dtype!r}; allowed: {', '.join(DTYPES)}")
        for name, low in (("batches", 1), ("calibration_samples", 2), ("threads", 1)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise ConfigError(f"{name} is {value}; allowed: at least {low}")
        if not self.batch_sizes or min(self.batch_sizes) < 1:
            raise ConfigError(f"batch_sizes is {self.batch_sizes}; allowed: one or more sizes of at least 1")
        choose_variants(self.variants)

    def batches_of(self, size: int) -> int:
        """Return the number of batches of a size."""
        return -(-FEWEST_SAMPLES // size) if self.batches is None else self.batches

    @property
    def limits(self) -> Limits:
        """How long to measure one batch size in one mode."""
        return Limits(self.rounds, self.warm_up, self.seconds)

    @property
    def modes(self) -> tuple[Mode, ...]:
        """The modes to measure."""
        return ("inference", "training") if self.training else ("inference",)


def quiet(doing: str, done: int, total: int) -> None:
    """Reports nothing."""


def measure(
    settings: BenchmarkSettings, command: str = "", *, save: Save = lambda result: None, notify: Notify = quiet
) -> BenchmarkResult:
    """Measure a model, its variants taking turns. A variant that cannot be built is left out, with the reason in the result.

    Args:
        settings: what to measure.
        command: the command line, for the record.
        save: is given the result after every round, so that an interrupted benchmark leaves what it has.
        notify: is told what happens.

    Raises:
        MadtpError: the model cannot be opened or rewritten, or the dense model not be run.
    """
    torch.set_num_threads(settings.threads)
    result = BenchmarkResult(command, asdict(settings), describe_environment(LIBRARIES))
    notify(f"building {settings.model}", 0, 0)
    opened = open_model(settings.model, settings.checkpoints, settings.seed)
    cast = partial(cast_batch, DTYPES[settings.dtype])
    for module in (opened.dense, *opened.pruned.values()):
        module.to(DTYPES[settings.dtype]).eval()
    calibration = opened.calibration(settings.calibration_samples)
    bench = Bench(opened, [cast(batch) for batch in calibration])
    targets = targets_of(settings.reductions, tuple(opened.pruned))
    variants = choose_variants(settings.variants, compiled=settings.compiled)
    for size in settings.batch_sizes:
        bench.load([cast(b) for b in opened.samples(settings.batches_of(size) * size, size)])
        entrants = _build(bench, variants, targets, result, lambda doing: notify(doing, 0, 0))
        for mode in settings.modes:
            _time(bench, entrants, mode, settings, result, save=save, notify=notify)
    result.complete = True
    save(result)
    return result


def _build(
    bench: Bench,
    variants: Sequence[Variant],
    targets: Sequence[Target],
    result: BenchmarkResult,
    say: Callable[[str], None],
) -> list[tuple[Measurement, Entrant]]:
    """Make every variant at every target. The measurements are drafts, of which each mode fills a copy."""
    size = next(iter(bench.batches[0].values())).shape[0]
    built = []
    for variant in variants:
        for target in targets if variant.build_at else [None]:
            draft = Measurement("inference", size, variant.name, target.label if target else "", macs=0.0)
            say(f"batch {size}: preparing {draft.name}")
            try:
                entrant = _entrant(bench, variant, target)
            except MadtpError as error:
                if variant.name == "dense":
                    raise
                result.notes[f"{draft.name}, batch {size}"] = f"left out: {error}"
                continue
            if entrant.note:
                result.notes[f"{draft.name}, batch {size}"] = entrant.note
            draft.macs, draft.tokens = entrant.macs, entrant.tokens
            built.append((draft, entrant))
    return built


def _entrant(bench: Bench, variant: Variant, target: Target | None) -> Entrant:
    if target is None:
        assert variant.build is not None
        return variant.build(bench)
    assert variant.build_at is not None
    return variant.build_at(bench, target)


def _time(
    bench: Bench,
    entrants: Sequence[tuple[Measurement, Entrant]],
    mode: Mode,
    settings: BenchmarkSettings,
    result: BenchmarkResult,
    *,
    save: Save,
    notify: Notify,
) -> None:
    """Time all entrants in one mode, and add the measurements to the result."""
    drafts = [
        (Measurement(mode, d.batch, d.variant, d.target, d.macs, tokens=d.tokens), entrant) for d, entrant in entrants
    ]
    runs = [_run(draft.name, entrant, mode) for draft, entrant in drafts]
    result.measurements.extend(draft for draft, _ in drafts)
    doing = f"batch {drafts[0][0].batch}, {mode}"
    total = settings.warm_up + settings.rounds
    with _mode([entrant.module for _, entrant in drafts], training=mode == "training"):
        notify(doing, 0, total)
        for timed in time_interleaved(runs, len(bench.batches), settings.limits):
            notify(doing, timed.number + 1, total)
            if timed.warm_up:
                continue
            for draft, _ in drafts:
                draft.add(timed)
            save(result)
        for (draft, _), run in zip(drafts, runs, strict=True):
            if settings.memory:
                notify(f"{doing}: memory of {draft.name}", 0, 0)
                run.prepare()
                draft.peak_bytes = peak_memory(partial(run.call, 0))
                run.finish()
        for draft, entrant in drafts if settings.where and mode == "inference" else ():
            if isinstance(entrant.module, PrunedModel) and draft.target:
                notify(f"{doing}: sites of {draft.name}", 0, 0)
                _time_sites(draft, entrant, len(bench.batches))


@torch.inference_mode()
def _time_sites(draft: Measurement, entrant: Entrant, batches: int) -> None:
    """Find where the time of a pruned model goes."""
    assert isinstance(entrant.module, PrunedModel)
    entrant.prepare()
    entrant.call(0)
    with timed_sites(entrant.module) as spent:
        for number in range(batches):
            entrant.call(number)
    draft.observing_ms, draft.deciding_ms = (
        round(1e3 * max(0.0, sum(part.values())) / batches, 4) for part in (spent.observing, spent.deciding)
    )


def _run(name: str, entrant: Entrant, mode: Mode) -> Run:
    if mode == "training":
        return Run(name, partial(_step, entrant), entrant.prepare, partial(_clear_gradients, entrant.module))
    return Run(name, partial(_infer, entrant), entrant.prepare)


@torch.inference_mode()
def _infer(entrant: Entrant, batch: int) -> object:
    return entrant.call(batch)


def _step(entrant: Entrant, batch: int) -> None:
    """A forward and a backward, of the mean of all outputs; no optimiser."""
    outputs = [t for t in pytree.tree_leaves(_plain(entrant.call(batch))) if isinstance(t, Tensor) and t.requires_grad]
    loss: Tensor = torch.stack([output.float().mean() for output in outputs]).sum()
    loss.backward()


def _plain(output: object) -> object:
    """An output with the fields of a dataclass as a dict."""
    return vars(output) if hasattr(output, "__dataclass_fields__") else output


def _clear_gradients(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.grad = None


@contextmanager
def _mode(modules: Sequence[nn.Module], *, training: bool) -> Iterator[None]:
    """Put modules into training mode inside the block, and into eval mode behind it."""
    for module in modules:
        module.train(training)
    try:
        yield
    finally:
        for module in modules:
            module.eval()
