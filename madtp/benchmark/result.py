"""What a benchmark measured, and the ratios that follow from it: :class:`BenchmarkResult` and :func:`compare`.

Times are milliseconds of a batch, MACs are multiply-accumulates of a sample. Both are means over the batches of a round.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from madtp.atomic_files import write_text
from madtp.benchmark.environment import Environment
from madtp.benchmark.spread import Spread, spread_of
from madtp.benchmark.timing import Round
from madtp.errors import DataError
from madtp.files.json_text import read_description

Clock: TypeAlias = Literal["wall", "cpu"]
"""Which seconds count: those on the wall, or processor time of this process."""

Mode: TypeAlias = Literal["inference", "training"]

FORMAT = 1
DENSE, FLOOR = "dense", "floor"


@dataclass
class Measurement:
    """One variant in one mode on batches of one size.

    Attributes:
        mode: ``"inference"``, or ``"training"`` for a forward with its backward.
        batch: samples of a batch.
        variant: name of the variant.
        target: which pruning strength it belongs to; empty for a variant that has none.
        macs: multiply-accumulates per sample of the forward.
        wall_ms: milliseconds of a batch by the clock, one for each round.
        cpu_ms: milliseconds of all threads together.
        tokens: tokens of each sample after each site, by site, one list for each batch.
        peak_bytes: largest memory of tensors that a call made; None if it was not measured.
        observing_ms: milliseconds of a batch that attention takes longer because sites observe it; None if not measured.
        deciding_ms: milliseconds of a batch in which sites score, select and merge; None if not measured.
    """

    mode: Mode
    batch: int
    variant: str
    target: str
    macs: float
    wall_ms: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)
    tokens: list[dict[str, list[int]]] = field(default_factory=list)
    peak_bytes: int | None = None
    observing_ms: float | None = None
    deciding_ms: float | None = None

    @property
    def name(self) -> str:
        """The variant and its target."""
        return f"{self.variant} {self.target}".strip()

    def add(self, timed: Round) -> None:
        """Add a round that counts."""
        seconds = timed.taken[self.name]
        self.wall_ms.append(round(seconds.wall * 1e3, 4))
        self.cpu_ms.append(round(seconds.cpu * 1e3, 4))

    def times(self, clock: Clock) -> list[float]:
        """Milliseconds of a batch in each round."""
        return self.wall_ms if clock == "wall" else self.cpu_ms


@dataclass
class BenchmarkResult:
    """Everything that a benchmark measured, and how.

    Attributes:
        command: the command line.
        settings: its settings, in JSON values.
        environment: the machine.
        measurements: in the order in which they were made.
        notes: why a variant was left out, or what else to know of it, by its name.
        complete: whether it ran to its end; a result that is not is valid as far as it goes.
    """

    command: str
    settings: dict[str, Any]
    environment: Environment
    measurements: list[Measurement] = field(default_factory=list)
    notes: dict[str, str] = field(default_factory=dict)
    complete: bool = False

    def write(self, path: Path, clock: Clock = "wall") -> None:
        """Write JSON, whole or not at all: all that was measured, and under ``comparison`` the ratios of :func:`compare`."""
        ratios = [asdict(row) for row in compare(self, clock)]
        write_text(path, json.dumps({"format": FORMAT, **asdict(self), "clock": clock, "comparison": ratios}, indent=1))

    @classmethod
    def read(cls, path: Path) -> BenchmarkResult:
        """Read what :meth:`write` wrote.

        Raises:
            DataError: the file is no result of a benchmark.
        """
        try:
            content = read_description(path)
            measurements = [Measurement(**entry) for entry in content["measurements"]]
            return cls(
                command=content["command"],
                settings=content["settings"],
                environment=Environment(**content["environment"]),
                measurements=measurements,
                notes=content["notes"],
                complete=content["complete"],
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} is no result of `madtp bench`: {error!r}; run the command again.") from error


@dataclass(frozen=True)
class Comparison:
    """One measurement beside that of the dense model in the same rounds.

    Attributes:
        mode: see :class:`Measurement`.
        batch: samples of a batch.
        variant: name of the variant.
        target: which pruning strength it belongs to.
        milliseconds: of a batch, over the rounds.
        speed_up: median time of the dense model by the median of this one; None without a dense model.
        mac_ratio: MACs of the dense model by those of this one; None without a dense model.
        efficiency: speed-up by MAC ratio: 1 means that every saved MAC saves its share of the time.
        floor_share: median time of the floor by the median of this one, at the same target; None without a floor.
        peak_bytes: see :class:`Measurement`.
    """

    mode: Mode
    batch: int
    variant: str
    target: str
    milliseconds: Spread
    speed_up: float | None
    mac_ratio: float | None
    efficiency: float | None
    floor_share: float | None
    peak_bytes: int | None


def compare(result: BenchmarkResult, clock: Clock = "wall") -> list[Comparison]:
    """Return a row for each measurement that has a time.

    Args:
        result: measurements; those of one mode and batch size were made in the same rounds.
        clock: which times to take.
    """
    timed = [m for m in result.measurements if m.times(clock)]
    named = {(m.mode, m.batch, m.variant, m.target): m for m in timed}
    rows = []
    for one in timed:
        dense = named.get((one.mode, one.batch, DENSE, ""))
        floor = named.get((one.mode, one.batch, FLOOR, one.target)) if one.target else None
        time = spread_of(one.times(clock))
        speed_up = None if dense is None else spread_of(dense.times(clock)).median / time.median
        mac_ratio = None if dense is None else dense.macs / one.macs
        rows.append(
            Comparison(
                mode=one.mode,
                batch=one.batch,
                variant=one.variant,
                target=one.target,
                milliseconds=time,
                speed_up=speed_up,
                mac_ratio=mac_ratio,
                efficiency=None if speed_up is None or mac_ratio is None else speed_up / mac_ratio,
                floor_share=None if floor is None else spread_of(floor.times(clock)).median / time.median,
                peak_bytes=one.peak_bytes,
            )
        )
    return rows


@dataclass(frozen=True)
class TimeShares:
    """Where the time of a pruned model goes, in milliseconds of a batch.

    Attributes:
        batch: samples of a batch.
        name: the variant and its target.
        total: median time.
        observing: what attention takes longer because it is observed.
        deciding: scoring, selecting and merging.
        dense: median time of the dense model; None without one.
    """

    batch: int
    name: str
    total: float
    observing: float
    deciding: float
    dense: float | None

    @property
    def layers(self) -> float:
        """The rest: the model's own layers on the tokens that are left."""
        return max(0.0, self.total - self.observing - self.deciding)


def time_shares(result: BenchmarkResult, clock: Clock = "wall") -> list[TimeShares]:
    """Return where the time of each measurement goes whose sites were timed."""
    timed = [m for m in result.measurements if m.times(clock) and m.mode == "inference"]
    dense = {m.batch: spread_of(m.times(clock)).median for m in timed if m.variant == DENSE}
    return [
        TimeShares(
            batch=one.batch,
            name=one.name,
            total=spread_of(one.times(clock)).median,
            observing=one.observing_ms,
            deciding=one.deciding_ms,
            dense=dense.get(one.batch),
        )
        for one in timed
        if one.observing_ms is not None and one.deciding_ms is not None
    ]
