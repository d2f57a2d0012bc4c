"""The variants that are compared, as a table: :data:`VARIANTS`. One more variant is one more row with its builder."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

import madtp
from madtp.config import PruningConfig
from madtp.errors import ConfigError
from madtp.pruned import PrunedModel
from madtp.saving.artefacts import Opened
from zoo.benchmark.bench import (
    Bench,
    Kept,
    Target,
    counted_macs,
    kept_of,
    opened_export,
    samples_of,
    set_strength,
)
from zoo.benchmark.floor import floor_of
from zoo.benchmark.models import Batch
from zoo.recipes.token_merging import blocks_that_merge, merge_tokens

CLOSE = 0.02
"""How much the MACs of merging may differ from those of pruned without a note."""

EQUAL = 0.001
"""How near the search for equal MACs comes, if whole tokens can."""


def _nothing() -> None:
    """Does nothing."""


@dataclass(frozen=True)
class Entrant:
    """A variant that is ready to run on the batches of a bench.

    Attributes:
        call: takes the number of a batch, returns the output.
        module: holds the parameters that train; its mode is that of the variant.
        macs: multiply-accumulates per sample, the mean over the batches.
        tokens: tokens of each sample after each site, one dict for each batch; empty where nothing is counted.
        prepare: runs before each call and is not timed.
        note: what to know when its numbers are read; empty for nothing.
    """

    call: Callable[[int], object]
    module: nn.Module
    macs: float
    tokens: list[dict[str, list[int]]] = field(default_factory=list)
    prepare: Callable[[], None] = _nothing
    note: str = ""


Build: TypeAlias = Callable[[Bench], Entrant]
BuildTarget: TypeAlias = Callable[[Bench, Target], Entrant]


@dataclass(frozen=True)
class Variant:
    """One row of the table.

    Attributes:
        name: what tables and ``--variant`` call it.
        description: a line for people.
        build: makes it of a bench; for a variant that is the same at every target.
        build_at: makes it of a bench and a target; for all others.
        optional: whether it is left out unless it is asked for.
    """

    name: str
    description: str
    build: Build | None = None
    build_at: BuildTarget | None = None
    optional: bool = False


def _run(bench: Bench, module: nn.Module, number: int) -> object:
    return module(**bench.batches[number])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _dense_macs(bench: Bench) -> float:
    model = bench.priced()
    with model.madtp.dense():
        return _mean([kept.macs for kept in kept_of(model, bench.batches)])


def _dense(bench: Bench) -> Entrant:
    return Entrant(partial(_run, bench, bench.dense), bench.dense, _dense_macs(bench))


def _compiled(bench: Bench) -> Entrant:
    compiled = torch.compile(bench.dense)
    return Entrant(lambda number: compiled(**bench.batches[number]), bench.dense, _dense_macs(bench))


def _switched_off(bench: Bench) -> Entrant:
    model = bench.rewritten()
    prepare = partial(set_strength, model, gain=1.0, temperature=0.0)
    return Entrant(partial(_run, bench, model), model, _dense_macs(bench), prepare=prepare)


def _of_pruned(bench: Bench, model: PrunedModel, kept: list[Kept], prepare: Callable[[], None] = _nothing) -> Entrant:
    macs = _mean([one.macs for one in kept])
    return Entrant(partial(_run, bench, model), model, macs, [one.tokens for one in kept], prepare)


def _pruned(bench: Bench, target: Target) -> Entrant:
    strength = bench.strength(target)
    return _of_pruned(bench, strength.model, bench.kept(target), strength.apply)


def _static(bench: Bench, target: Target) -> Entrant:
    model = bench.frozen(target)
    return _of_pruned(bench, model, kept_of(model, bench.batches))


def _exported(format: str, bench: Bench, target: Target) -> Entrant:
    """The frozen model as a file of a format; one file for each size that batches have, as texts differ in length."""
    model = bench.frozen(target)
    opened: dict[str, Opened] = {}
    for batch in bench.batches:
        if _sizes(batch) not in opened:
            opened[_sizes(batch)] = opened_export(model, batch, format)

    def call(number: int) -> object:
        return opened[_sizes(bench.batches[number])](**bench.batches[number])

    kept = kept_of(model, bench.batches)
    return Entrant(call, model, _mean([one.macs for one in kept]), [one.tokens for one in kept])


def _sizes(batch: Batch) -> str:
    return str({name: tuple(value.shape) for name, value in batch.items() if isinstance(value, torch.Tensor)})


def _uniform(bench: Bench, target: Target) -> Entrant:
    if all(samples_of(batch) == 1 for batch in bench.batches):
        raise ConfigError("with one sample in a batch it is the same as pruned.")
    model = bench.rewritten(PruningConfig(batching="uniform"))
    set_strength(model, gain=1.0)
    madtp.calibrate(model, bench.batches, reduction=bench.saved(target), tolerance=CLOSE / 2)
    prepare = partial(set_strength, model, gain=model.madtp.gain)
    return _of_pruned(bench, model, kept_of(model, bench.batches), prepare)


def _floor(bench: Bench, target: Target) -> Entrant:
    run = floor_of(bench.dense)
    tokens = [kept.tokens for kept in bench.kept(target)]

    def call(number: int) -> object:
        return run(bench.batches[number], tokens[number])

    macs = [counted_macs(partial(call, number), samples_of(batch)) for number, batch in enumerate(bench.batches)]
    return Entrant(call, bench.dense, _mean(macs))


def _merging(bench: Bench, target: Target) -> Entrant:
    parameters = {id(p): p for p in bench.dense.parameters()}
    model = copy.deepcopy(bench.dense, parameters)  # shares the parameters
    _merge_until(model, bench.batches[0], 1 - bench.saved(target))
    macs = [counted_macs(partial(_run, bench, model, n), samples_of(b)) for n, b in enumerate(bench.batches)]
    wanted = _mean([kept.macs for kept in bench.kept(target)])
    off = _mean(macs) / wanted - 1
    note = (
        f"its MACs differ by {off:+.1%} from those of pruned, which merging cannot match." if abs(off) > CLOSE else ""
    )
    return Entrant(partial(_run, bench, model), model, _mean(macs), note=note)


def _merge_until(model: nn.Module, batch: Batch, left: float) -> None:
    """Merge as many tokens in each block as leave the fraction ``left`` of the MACs, as nearly as whole tokens can."""
    blocks = blocks_that_merge(model)

    def macs(total: int) -> float:
        merge_tokens(model, spread_evenly(total, blocks))
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            given = pytree.tree_map_only(torch.Tensor, mode.from_tensor, batch)
            return counted_macs(lambda: model(**given), samples_of(batch))

    dense = macs(0)
    merge_tokens(model, spread_evenly(nearest_number(macs, dense, left * dense, first=8 * blocks), blocks))


def nearest_number(macs: Callable[[int], float], dense: float, wanted: float, *, first: int) -> int:
    """Return the whole number at which a falling function is nearest to a value, in few steps, as each takes long.

    Args:
        macs: falls, and stays constant from some number on.
        dense: its value at 0.
        wanted: the value to reach.
        first: the number to try first.
    """
    seen = {0: dense}
    low, high = 0, first
    while (found := seen.setdefault(high, macs(high))) > wanted and found < seen[low]:
        low, high = high, 2 * high
    while high - low > 1 and min(abs(value - wanted) for value in seen.values()) > EQUAL * wanted:
        # Every other step halves, because interpolation alone creeps where the function is constant.
        share = 0.5 if len(seen) % 2 else (seen[low] - wanted) / max(1.0, seen[low] - seen[high])
        middle = min(max(low + round((high - low) * share), low + 1), high - 1)
        seen[middle] = macs(middle)
        low, high = (middle, high) if seen[middle] > wanted else (low, middle)
    return min(seen, key=lambda number: abs(seen[number] - wanted))


def spread_evenly(total: int, parts: int) -> list[int]:
    """Return ``parts`` whole numbers that differ by at most 1 and sum to ``total``."""
    return [(number + 1) * total // parts - number * total // parts for number in range(parts)]


VARIANTS: tuple[Variant, ...] = (
    Variant("dense", "the model as it is", build=_dense),
    Variant("compiled", "the dense model by torch.compile", build=_compiled, optional=True),
    Variant("rewritten", "pruning switched off (temperature 0)", build=_switched_off),
    Variant("pruned", "each sample keeps its own number of tokens", build_at=_pruned),
    Variant("static", "the same by fixed counts (madtp.freeze)", build_at=_static),
    Variant("onnx", "static as an ONNX file, by ONNX Runtime", build_at=partial(_exported, "onnx"), optional=True),
    Variant("aoti", "static, compiled by AOTInductor", build_at=partial(_exported, "aoti"), optional=True),
    Variant(
        "uniform", "every sample keeps as many tokens as the fullest of its batch, at equal MACs", build_at=_uniform
    ),
    Variant("tome", "similar tokens merge, with proportional attention, at equal MACs", build_at=_merging),
    Variant("floor", "the dense layers on the token counts of pruned, packed, without scoring", build_at=_floor),
)
"""All variants, in the order of tables."""


def choose_variants(names: Sequence[str], *, compiled: bool = False) -> list[Variant]:
    """Return variants by name, with the dense model, in the order of the table.

    Args:
        names: names of variants; none takes all that are not optional.
        compiled: whether to add the compiled model.

    Raises:
        ConfigError: there is no variant of a name.
    """
    known = [variant.name for variant in VARIANTS]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ConfigError(f"there is no variant {unknown[0]!r}; there are {', '.join(known)}.")
    wanted = {*names, "dense"} if names else {variant.name for variant in VARIANTS if not variant.optional}
    return [v for v in VARIANTS if v.name in wanted or (compiled and v.name == "compiled")]
