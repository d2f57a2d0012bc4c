"""``madtp bench`` with one round on small models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result as Outcome
from typer.testing import CliRunner

from madtp.benchmark import BenchmarkResult, Round
from madtp.cli.app import app
from zoo.benchmark import measuring as module


def run(*arguments: str) -> Outcome:
    return CliRunner().invoke(app, ["bench", *arguments])


def quick(path: Path, model: str, *arguments: str) -> Outcome:
    common = ("--rounds", "1", "--warm-up", "0", "--calibration-samples", "4", "--output", str(path))
    return run(model, *common, *arguments)


@pytest.mark.slow
def test_all_variants_of_a_vision_transformer(tmp_path: Path) -> None:
    path, plot, where = tmp_path / "b.json", tmp_path / "b.png", tmp_path / "w.png"
    plots = ("--plot", str(plot), "--where", str(where))
    outcome = quick(path, "timm:test_vit", "-r", "0.5", "-b", "1", "-b", "4", "--batches", "2", *plots)
    assert outcome.exit_code == 0, outcome.output
    content: dict[str, Any] = json.loads(path.read_text())
    assert content["complete"]
    assert content["settings"]["batch_sizes"] == [1, 4]
    rows = {(row["batch"], row["variant"]): row for row in content["comparison"]}
    assert [name for batch, name in rows if batch == 4] == [
        *("dense", "rewritten", "pruned", "static", "uniform", "tome", "floor")
    ]
    assert (1, "uniform") not in rows
    assert "the same as pruned" in content["notes"]["uniform −50%, batch 1"]
    assert rows[4, "rewritten"]["mac_ratio"] == pytest.approx(1)
    pruned = next(m for m in content["measurements"] if (m["batch"], m["variant"]) == (4, "pruned"))
    assert [len(counts) for counts in pruned["tokens"][0].values()] == [4] * len(pruned["tokens"][0])
    assert len(pruned["tokens"]) == 2
    assert rows[4, "floor"]["mac_ratio"] == pytest.approx(rows[4, "pruned"]["mac_ratio"], rel=0.25)
    assert pruned["deciding_ms"] > 0
    assert next(m for m in content["measurements"] if m["variant"] == "dense")["deciding_ms"] is None
    assert plot.is_file()
    assert where.is_file()
    assert "tokens of a sample" in outcome.output
    assert "where the time goes" in outcome.output


@pytest.mark.slow
def test_a_shipped_model_trains_and_takes_memory(tmp_path: Path) -> None:
    path = tmp_path / "b.json"
    more = ("-k", "dense", "-k", "pruned-80", "-b", "2", "--training", "--memory", "--clock", "cpu")
    outcome = quick(path, "blip_nlvr_mini", *more, "--variant", "pruned", "--variant", "floor")
    assert outcome.exit_code == 0, outcome.output
    result = BenchmarkResult.read(path)
    assert {(m.mode, m.name) for m in result.measurements} == {
        (mode, name)
        for mode in ("inference", "training")
        for name in ("dense", "pruned (pruned-80)", "floor (pruned-80)")
    }
    assert all(m.peak_bytes and len(m.wall_ms) == len(m.cpu_ms) == 1 for m in result.measurements)
    dense, pruned = (next(m for m in result.measurements if m.variant == name) for name in ("dense", "pruned"))
    assert dense.macs > 3 * pruned.macs


def test_an_interruption_leaves_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = module.time_interleaved

    def interrupted(*arguments: Any) -> Any:
        yield from own(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "time_interleaved", interrupted)
    outcome = quick(tmp_path / "b.json", "timm:test_vit", "-b", "2", "--variant", "rewritten", "-r", "0.3")
    assert outcome.exit_code == 130
    result = BenchmarkResult.read(tmp_path / "b.json")
    assert not result.complete
    assert [(m.name, len(m.wall_ms)) for m in result.measurements] == [("dense", 1), ("rewritten", 1)]
    assert "Interrupted." in outcome.output


def test_rounds_to_warm_up_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, seen = module.time_interleaved, list[Round]()

    def watched(*arguments: Any) -> Any:
        for timed in own(*arguments):
            seen.append(timed)
            yield timed

    monkeypatch.setattr(module, "time_interleaved", watched)
    arguments = ("timm:test_vit", "-b", "2", "--variant", "rewritten", "--rounds", "2", "--warm-up", "1")
    assert run(*arguments, "-o", str(tmp_path / "b.json")).exit_code == 0
    assert [timed.warm_up for timed in seen] == [True, False, False]
    measurement = BenchmarkResult.read(tmp_path / "b.json").measurements[0]
    assert measurement.wall_ms == [round(timed.taken["dense"].wall * 1e3, 4) for timed in seen[1:]]


def test_variants_are_listed() -> None:
    outcome = run("--list")
    assert outcome.exit_code == 0
    for name in ("dense", "compiled", "floor", "tome"):
        assert name in outcome.output


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, "name a model"),
        (("nothing_of_that_name",), 1, "neither a model of the zoo or of timm"),
        (("blip_nlvr_mini", "--dtype", "int8"), 1, "allowed: float32"),
        (("blip_nlvr_mini", "--variant", "best"), 1, "there is no variant 'best'"),
        (("blip_nlvr_mini", "--clock", "sun"), 2, "neither wall nor cpu"),
    ],
)
def test_what_does_not_fit_is_a_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], code: int, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = run(*arguments)
    assert outcome.exit_code == code
    assert message in outcome.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("option", "name", "told"),
    [
        ("--output", "folder", "cannot be written"),
        ("--plot", "speed.xyz", "ends in one of"),
        ("--where", "folder.png", "cannot"),
    ],
)
def test_what_cannot_be_written_is_told_before_anything_is_measured(
    option: str, name: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "measure", lambda *given, **more: pytest.fail("it measures"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder.png").mkdir()
    outcome = run("timm:test_vit", "--output", str(tmp_path / "b.json"), option, str(tmp_path / name))
    assert outcome.exit_code != 0
    assert told in f"{outcome.output}{outcome.exception}"
