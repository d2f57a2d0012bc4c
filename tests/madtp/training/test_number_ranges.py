"""Every number of a training config is checked: NaN, signs, absurd sizes and other types are refused by name."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from settings_numbers import absurd_values, number_fields

from madtp.errors import ConfigError
from madtp.training import TrainingConfig
from madtp.training.compression import Budget
from madtp.training.number_ranges import Range, check_numbers, whole


@pytest.mark.parametrize("settings", [TrainingConfig, Budget])
def test_no_number_takes_nonsense(settings: type[Any]) -> None:
    assert len(number_fields(settings)) >= 4
    start = {"reduction": 0.5} if settings is Budget else {}
    for name, value in absurd_values(settings):
        with pytest.raises(ConfigError, match=rf"\.{name} is "):
            settings(**{**start, name: value})


@pytest.mark.parametrize("threads", [1025, 100_000, 2**40])
def test_more_threads_than_any_machine_has_are_refused_before_torch_makes_them(threads: int) -> None:
    with pytest.raises(ConfigError, match=r"training\.threads is .* at most 1,024"):
        TrainingConfig.from_dict({"threads": threads})
    TrainingConfig(threads=1024)


@pytest.mark.parametrize("betas", [0.9, [0.9, float("nan")], [0.9, 1.0], [-0.1, 0.9], ["a", "b"], [True, 0.9]])
def test_betas_are_two_momenta(betas: Any) -> None:
    with pytest.raises(ConfigError, match=r"training\.betas is "):
        TrainingConfig(betas=betas)


def test_a_learning_rate_of_zero_divides_nothing() -> None:
    with pytest.raises(ConfigError, match=r"training\.learning_rate is 0"):
        TrainingConfig(learning_rate=0.0)


@given(st.one_of(st.integers(), st.floats(), st.booleans(), st.none(), st.text(max_size=2)))
def test_a_range_holds_what_lies_between_its_bounds_and_nothing_else(value: object) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    assert (value in Range(0, 1)) == (number and 0 <= value <= 1)  # type: ignore[operator]
    assert (value in Range(0, 1, above=True, below=True)) == (number and 0 < value < 1)  # type: ignore[operator]
    assert (value in whole(0, 5)) == (number and isinstance(value, int) and 0 <= value <= 5)
    assert (value in dataclasses.replace(whole(0), optional=True)) == (value is None or value in whole(0))


def test_the_message_says_what_is_allowed() -> None:
    with pytest.raises(ConfigError, match=r"^size is -2; it has to be a whole number of at least 1 and at most 10\.$"):
        check_numbers(type("Settings", (), {"size": -2}), {"size": whole(1, 10)})
    with pytest.raises(
        ConfigError, match=r"^a\.size is a number of 1329 bits; it has to be a number above 0 and below 1"
    ):
        check_numbers(type("Settings", (), {"size": 10**400}), {"size": Range(0, 1, above=True, below=True)}, "a")
