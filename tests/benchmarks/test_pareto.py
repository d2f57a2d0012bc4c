"""``benchmarks/pareto.py``: results of finished runs are kept, printed and drawn."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from project_paths import ROOT


@pytest.fixture
def pareto(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("pareto")


def write_card(runs: Path, name: str, score: float, target: int = 80) -> None:
    folder = runs / "questions" / str(target) / name / "pruned"
    folder.mkdir(parents=True)
    test = {"items": 64, "metrics": {"vqa_accuracy": score}}
    card = {"calibration": {"reduction": target / 100}, "training": {"steps": 7}, "test": test}
    (folder / "card.json").write_text(json.dumps(card))


def dense(pareto: ModuleType) -> list[object]:
    return [pareto.Result("questions", "dense", 0.0, 0, 0.0, "vqa_accuracy", 0.95, 64, 0)]


def test_runs_are_added_to_what_is_known_and_replace_their_like(pareto: ModuleType, tmp_path: Path) -> None:
    write_card(tmp_path, "random-0", 0.5)
    write_card(tmp_path, "madtp-0", 0.9)
    file = tmp_path / "results.json"
    pareto.write(file, pareto.collect(tmp_path, dense(pareto)))
    once = pareto.read(file)
    assert [(r.control, r.seed, r.score) for r in once] == [("dense", 0, 0.95), ("madtp", 0, 0.9), ("random", 0, 0.5)]
    pareto.write(file, pareto.collect(tmp_path, once))
    assert pareto.read(file) == once


def test_seeds_share_a_row(pareto: ModuleType, tmp_path: Path) -> None:
    for seed, score in enumerate((0.90, 0.92, 0.94)):
        write_card(tmp_path, f"madtp-{seed}", score)
    write_card(tmp_path, "madtp-0", 0.93, target=50)
    results = pareto.collect(tmp_path, dense(pareto))
    results[1] = replace(results[1], ms=3.0, dense_ms=6.0)
    pareto.write(tmp_path / "r.json", results)
    assert pareto.table(pareto.read(tmp_path / "r.json")).splitlines()[2:] == [
        "| questions | dense |  | VQA accuracy | 95.00% |  |  |  |",
        "| questions | madtp at −50% | 50.0% | VQA accuracy | 93.00% | 1 | 7 | 0.50 |",
        "| questions | madtp at −80% | 80.0% | VQA accuracy | 92.00% ± 2.00 | 3 | 7 |  |",
    ]


def test_the_picture_has_a_column_a_task(pareto: ModuleType, tmp_path: Path) -> None:
    write_card(tmp_path, "madtp-0", 0.9)
    results = pareto.collect(tmp_path, dense(pareto))
    pareto.draw(results, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_a_model_of_another_length_is_not_timed_for_a_result(pareto: ModuleType, tmp_path: Path) -> None:
    write_card(tmp_path, "madtp-0", 0.9)
    result = pareto.collect(tmp_path, dense(pareto))[1]
    assert pareto._folder(tmp_path, result) == tmp_path / "questions" / "80" / "madtp-0" / "pruned"
    assert pareto._folder(tmp_path, replace(result, steps=8)) is None
