"""Statistics, ratios, tables and files of a benchmark, on numbers made up here."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from madtp.benchmark import BenchmarkResult, Measurement, compare, describe_environment, peak_memory, spread_of
from madtp.benchmark.plot import draw_speed_ups, draw_time_shares
from madtp.benchmark.result import time_shares
from madtp.benchmark.table import comparison_tables, conditions, share_table, token_table
from madtp.errors import DataError


def made_up() -> BenchmarkResult:
    sites = [{"tower.blocks.0": [9, 7], "tower.blocks.1": [5, 3]}]
    measurements = [
        Measurement("inference", 2, "dense", "", 8e6, [8.0, 10.0, 30.0], [4.0, 4.0, 4.0]),
        Measurement("inference", 2, "pruned", "−50%", 4e6, [8.0, 8.0, 8.0], [2.0, 1.0, 3.0], sites, 2**20),
        Measurement("inference", 2, "floor", "−50%", 4e6, [4.0, 5.0, 4.0], [1.0, 1.0, 1.0]),
        Measurement("training", 2, "pruned", "−50%", 4e6, [7.0], [7.0]),
        Measurement("training", 2, "tome", "−50%", 4e6),
    ]
    return BenchmarkResult("madtp bench x", {"dtype": "float32", "seed": 3}, describe_environment(), measurements)


def test_median_and_quartiles() -> None:
    spread = spread_of([4.0, 1.0, 2.0, 3.0, 100.0])
    assert (spread.low, spread.median, spread.high, spread.count) == (2.0, 3.0, 4.0, 5)
    assert spread_of([7.0]).high == 7.0
    with pytest.raises(DataError, match="at least one round"):
        spread_of([])


def test_ratios_are_of_medians_in_the_same_mode_and_batch() -> None:
    dense, pruned, floor, alone = compare(made_up())
    assert (dense.speed_up, dense.mac_ratio, dense.efficiency, dense.floor_share) == (1.0, 1.0, 1.0, None)
    assert (pruned.speed_up, pruned.mac_ratio, pruned.efficiency, pruned.floor_share) == (1.25, 2.0, 0.625, 0.5)
    assert floor.floor_share == 1.0
    assert (alone.mode, alone.speed_up, alone.efficiency, alone.floor_share) == ("training", None, None, None)
    assert compare(made_up(), "cpu")[1].speed_up == 2.0


def test_a_result_is_read_as_it_was_written(tmp_path: Path) -> None:
    result, path = made_up(), tmp_path / "b.json"
    result.write(path)
    assert BenchmarkResult.read(path) == result
    content = json.loads(path.read_text())
    assert content["comparison"][1]["milliseconds"] == {"median": 8.0, "low": 8.0, "high": 8.0, "count": 3}
    assert set(content["environment"]) >= {"cpu", "threads", "versions", "load"}
    path.write_text("{}")
    with pytest.raises(DataError, match=r"b.json is no result of `madtp bench`"):
        BenchmarkResult.read(path)


def test_tables_fit_a_narrow_console() -> None:
    console = Console(width=80, file=io.StringIO())
    result = made_up()
    for table in (*comparison_tables(result, "x"), token_table(result)):
        console.print(table)
    text = " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]
    assert "x: inference, batch of 2, wall time" in text
    assert "│ pruned −50% │ 8.0 │ ±0% │ 1.25 │ 2.00 │ 0.62 │ 0.50 │ 1.0 │" in text
    assert "8.0 (7–9)" in text
    assert "4.0 (3–5)" in text
    assert "…" not in text
    assert "seed 3" in conditions(result)
    assert conditions(result).endswith("Interrupted.")


def test_speed_ups_are_drawn(tmp_path: Path) -> None:
    assert draw_speed_ups(made_up(), tmp_path / "s.png", "x").stat().st_size > 5000
    empty = BenchmarkResult("", {}, describe_environment())
    with pytest.raises(DataError, match="no variant beside the dense model"):
        draw_speed_ups(empty, tmp_path / "e.png", "x")


def test_time_goes_to_layers_attention_and_sites(tmp_path: Path) -> None:
    result = made_up()
    assert time_shares(result) == []
    assert share_table(result) is None
    with pytest.raises(DataError, match="add --where"):
        draw_time_shares(result, tmp_path / "w.png", "x")
    result.measurements[1].observing_ms, result.measurements[1].deciding_ms = 1.0, 2.0
    (row,) = time_shares(result)
    assert (row.name, row.total, row.layers, row.dense) == ("pruned −50%", 8.0, 5.0, 10.0)
    console = Console(width=80, file=io.StringIO())
    console.print(share_table(result))
    assert "│ 2 │ pruned −50% │ 8.0 │ 62% │ 12% │ 25% │" in " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]
    assert draw_time_shares(result, tmp_path / "w.png", "x").stat().st_size > 5000


def test_the_peak_counts_what_is_held_at_once() -> None:
    import torch

    given = torch.ones(256, 1024)

    def call() -> object:
        first = given + 1
        second = first + 1
        del first
        return second + 1

    assert peak_memory(call) // 2**20 == 2
