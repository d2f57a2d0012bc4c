"""Ratios, tables and files of a benchmark of generation, on numbers made up here."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from madtp.benchmark import describe_environment
from madtp.benchmark.generation import GenerationMeasurement, GenerationResult, Times, compare_generation
from madtp.benchmark.generation_table import generation_conditions, generation_tables
from madtp.errors import DataError

DENSE = GenerationMeasurement(
    batch=4,
    image_tokens=576,
    text_tokens=64,
    new_tokens=11,
    target="",
    macs=8e9,
    cache_bytes=4096.0,
    prefill=Times((900.0, 1000.0, 5000.0), (700.0, 800.0, 900.0)),
    step=Times((100.0, 100.0, 100.0), (50.0, 50.0, 50.0)),
)
PRUNED = replace(
    DENSE,
    target="−50%",
    macs=4e9,
    cache_bytes=1024.0,
    prefill=Times((500.0, 500.0, 500.0), (200.0, 200.0, 200.0)),
    step=Times((90.0, 90.0, 90.0), (60.0, 60.0, 60.0)),
    tokens=({"tower.blocks.0": [9, 7, 8, 8]},),
)


def made_up() -> GenerationResult:
    settings = {"dtype": "float32", "seed": 3, "new_tokens": 11, "warm_up": 1}
    environment = describe_environment()
    longer = replace(PRUNED, text_tokens=128)
    measurements = (DENSE, PRUNED, longer, replace(longer, batch=8, prefill=Times(), step=Times()))
    return GenerationResult(
        command="madtp bench x", settings=settings, environment=environment, measurements=measurements, notes={"a": "b"}
    )


def test_shares_are_of_the_dense_model_with_the_same_prompts() -> None:
    dense, pruned, alone = compare_generation(made_up())
    assert (dense.prefill_share, dense.step_share, dense.speed_share, dense.cache_share) == (1.0, 1.0, 1.0, 1.0)
    assert (pruned.prefill_share, pruned.step_share, pruned.cache_share) == (0.5, 0.9, 0.25)
    assert dense.tokens_per_second == pytest.approx(4 * 11 / (1.0 + 10 * 0.1))
    assert pruned.tokens_per_second == pytest.approx(4 * 11 / (0.5 + 10 * 0.09))
    assert (alone.prefill_share, alone.cache_share) == (None, None)
    assert compare_generation(made_up(), "cpu")[1].prefill_share == 0.25


def test_a_result_is_read_as_it_was_written(tmp_path: Path) -> None:
    result, path = made_up(), tmp_path / "g.json"
    result.write(path)
    assert GenerationResult.read(path) == result
    assert json.loads(path.read_text())["comparison"][1]["cache_share"] == 0.25
    path.write_text('{"kind": "other"}')
    with pytest.raises(DataError, match=r"g.json is no result of `madtp bench --generate`"):
        GenerationResult.read(path)


def test_tables_fit_a_narrow_console() -> None:
    console = Console(file=io.StringIO(), width=80)
    for table in generation_tables(made_up(), "llm"):
        console.print(table)
    written = console.file.getvalue()  # type: ignore[attr-defined]
    for cell in (
        "prefill",
        "a step",
        "new tokens",
        "cache",
        "576 + 64",
        "pruned −50%",
        "MACs",
        "500 ×0.50",
        "90.0 ×0.90",
        "1.00 ×0.25",
    ):
        assert cell in written
    assert written.count("batch of") == 1
    assert "…" not in written


def test_conditions_say_how_it_was_measured() -> None:
    told = generation_conditions(made_up())
    for part in (
        "Medians of 3 rounds after 1 to warm up",
        "seed 3",
        "11 new tokens",
        "each of the other 10",
        "Interrupted.",
    ):
        assert part in told
    assert "Interrupted." not in generation_conditions(replace(made_up(), complete=True))
