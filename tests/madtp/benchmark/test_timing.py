"""Timing in turns: the order of calls, what counts, and when it ends. No test asserts on how long something takes."""

from __future__ import annotations

import gc

import pytest

from madtp.benchmark import Limits, Run, median_seconds, time_interleaved, timing
from madtp.errors import ConfigError


@pytest.fixture(autouse=True)
def no_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """A collection before every call takes seconds in a process that has run many tests."""
    monkeypatch.setattr(gc, "collect", lambda: 0)


def test_runs_take_turns_on_each_batch_in_alternating_order() -> None:
    called: list[str] = []
    runs = [Run(name, lambda batch, name=name: called.append(f"{name}{batch}")) for name in "ab"]
    rounds = list(time_interleaved(runs, 2, Limits(rounds=2, warm_up=1)))
    assert called == "a0 b0 a1 b1 b0 a0 b1 a1 a0 b0 a1 b1".split()
    assert [(r.number, r.warm_up) for r in rounds] == [(0, True), (1, False), (2, False)]
    assert all(set(r.taken) == {"a", "b"} for r in rounds)
    assert all(s.wall >= 0 and s.cpu >= 0 for r in rounds for s in r.taken.values())


def test_each_call_is_prepared_and_finished_with_garbage_collection_off_in_between() -> None:
    seen: list[object] = []
    run = Run("a", lambda _: seen.append(gc.isenabled()), lambda: seen.append("<"), lambda: seen.append(">"))
    list(time_interleaved([run], 1, Limits(rounds=1, warm_up=0)))
    assert seen == ["<", False, ">"]
    assert gc.isenabled()


def test_garbage_collection_is_on_again_after_an_error() -> None:
    def fail(batch: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(time_interleaved([Run("a", fail)], 1, Limits(rounds=1)))
    assert gc.isenabled()


def test_seconds_end_it_after_the_fewest_rounds() -> None:
    rounds = list(time_interleaved([Run("a", lambda _: None)], 1, Limits(rounds=9, warm_up=2, seconds=0.0)))
    assert sum(not r.warm_up for r in rounds) == timing.FEWEST_ROUNDS
    assert len(list(time_interleaved([Run("a", lambda _: None)], 1, Limits(rounds=4, warm_up=0, seconds=1e9)))) == 4


@pytest.mark.parametrize("numbers", [(0, 1), (1, -1)])
def test_impossible_limits_are_refused(numbers: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match=r"allowed: at least 1 round, and 0 or more to warm up"):
        Limits(*numbers)


def test_medians_of_named_calls() -> None:
    called: list[str] = []
    medians = median_seconds({"a": lambda: called.append("a"), "b": lambda: called.append("b")}, rounds=2)
    assert set(medians) == {"a", "b"}
    assert called == ["a", "b", "b", "a", "a", "b"]
