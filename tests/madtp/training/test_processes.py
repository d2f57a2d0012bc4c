"""Training in several processes equals training in one: weights, gradients, alignment loss, steering; on a pruned model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_training as tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from process_group import run_workers
from torch import Tensor, nn

from madtp.errors import ConfigError
from madtp.processes import ALONE, Processes, joined, launched
from madtp.training import Learner, fit
from madtp.training.batch_shares import BatchShares

CLOSE = {"rtol": 1e-5, "atol": 1e-7}
"""Scores and the threshold are computed in float32 whatever the model's precision is."""


def _same(one: Any, other: Any) -> None:
    for name in ("gradients", "weights"):
        assert set(one[name]) == set(other[name])
        for key, value in one[name].items():
            torch.testing.assert_close(other[name][key], value, **CLOSE, msg=lambda text, k=key: f"{k}: {text}")
    for name, number in one["metrics"].items():
        assert other["metrics"][name] == pytest.approx(number, rel=1e-4), name
    for name, number in one["state"]["controller"].items():
        assert other["state"]["controller"][name] == pytest.approx(number, rel=1e-6), name


def both(folder: Path) -> list[Any]:
    """In workers: without dropout; with dropout, interrupted."""
    return [tiny.trained(folder / "plain"), tiny.trained(folder / "dropout", dropout=0.2, stop=2)]


@pytest.mark.slow
def test_two_processes_equal_one_whose_batch_is_whole_or_comes_in_two_parts(tmp_path: Path) -> None:
    found = run_workers(both, tmp_path / "two")
    whole = tiny.trained(tmp_path / "one")
    for rank in range(2):
        _same(whole, found[rank][0])
    names = [path.name for path in sorted((tmp_path / "two" / "plain" / "run" / "checkpoints").iterdir())]
    assert names == ["step-00000004", "step-00000006"]
    # Draws belong to a part of the batch, so dropout is the same, too; two began, one goes on.
    _same(
        tiny.trained(tmp_path / "parts", dropout=0.2, accumulate=2),
        tiny.trained(tmp_path / "two" / "dropout", dropout=0.2, accumulate=2, resume=True),
    )


def test_micro_batches_add_up_to_the_gradients_of_the_batch(tmp_path: Path) -> None:
    whole = tiny.trained(tmp_path / "whole", steps=1)
    _same(whole, tiny.trained(tmp_path / "parts", steps=1, accumulate=4))


def test_a_batch_that_cannot_be_divided_evenly_is_refused(tmp_path: Path) -> None:
    learner = Learner(nn.Linear(1, 1), lambda step, rows: {}, lambda m, b, s: (m(b), {}), samples_per_step=6)
    with pytest.raises(ConfigError, match=r"6 samples a step .* 1 processes of 4 micro batches .* multiple of 4"):
        fit(learner, tiny.config(accumulate=4), tmp_path, progress=tiny.QUIET)


def failing(folder: Path, at: int) -> str:
    """In workers: a loss that is NaN in one of the processes stops both."""
    from madtp.processes import current

    def loss(module: nn.Module, batch: Any, step: int) -> tuple[Tensor, dict[str, float]]:
        bad = step == at and current().rank == 1
        return module(batch["x"]).mean() * (float("nan") if bad else 1.0), {}

    learner = Learner(nn.Linear(2, 1), lambda step, rows: {"x": torch.ones(len(rows), 2)}, loss, samples_per_step=2)
    try:
        fit(learner, tiny.config(), folder, progress=tiny.QUIET)
    except Exception as error:
        return str(error)
    return "no error"


@pytest.mark.slow
def test_what_goes_wrong_in_one_process_stops_all(tmp_path: Path) -> None:
    for message in run_workers(failing, tmp_path, at=2):
        assert "loss of step 2 is nan" in message
        assert "step-00000002" in message


@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 7))
def test_shares_cover_the_batch_once_and_draw_apart(size: int, accumulate: int, samples: int) -> None:
    total = samples * size * accumulate
    shares = [BatchShares(total, Processes(rank, size), accumulate, 5) for rank in range(size)]
    rows = [row for one in shares for share in one.local() for row in share.rows]
    assert rows == list(range(total))
    draws = set()
    for one in shares:
        for share in one.local():
            one.reseed(3, share.number)
            draws.add(float(torch.rand((), dtype=torch.float64)))
    assert len(draws) == size * accumulate


def test_shares_are_made_equal() -> None:
    shares = BatchShares(4, ALONE, 2)
    batches = [
        {"ids": torch.ones(2, 3, dtype=torch.long), "words": torch.tensor(6.0)},
        {"ids": torch.ones(2, 5, dtype=torch.long), "words": torch.tensor(9.0)},
    ]
    one, other = shares.equalise(batches, {"ids": 7, "absent": 0})
    assert one["ids"].tolist() == [[1, 1, 1, 7, 7]] * 2
    assert other["ids"].shape == (2, 5)
    assert one["words"] == other["words"] == 7.5
    assert batches[0]["ids"].shape == (2, 3)


def test_nothing_is_joined_without_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    with joined("cpu") as (processes, device):
        assert (processes, device) == (ALONE, "cpu")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    assert launched() == Processes(3, 4)
