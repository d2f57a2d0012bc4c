"""Registries: taken, malformed and unknown names, and lists by pattern."""

from __future__ import annotations

import pytest

from madtp.errors import ConfigError, DataError
from zoo.named import SNAKE_CASE, Registry


@pytest.fixture
def fruit() -> Registry[int]:
    registry: Registry[int] = Registry("fruit", names=SNAKE_CASE, advice="use lower case", unknown=DataError)
    for number, name in enumerate(("pear", "apple", "pine_apple")):
        registry.add(name, number)
    return registry


def test_entries_are_found_and_listed(fruit: Registry[int]) -> None:
    assert fruit.find("apple") == fruit["apple"] == 1
    assert fruit.matching() == ["apple", "pear", "pine_apple"]
    assert fruit.matching("*apple") == ["apple", "pine_apple"]
    assert fruit.matching("plum") == []
    assert len(fruit) == 3
    assert "plum" not in fruit
    fruit.remove("apple")
    assert list(fruit) == ["pear", "pine_apple"]


def test_a_taken_name_is_refused_and_the_first_entry_stays(fruit: Registry[int]) -> None:
    with pytest.raises(ConfigError, match=r"The fruit 'pear' is registered already; choose another name"):
        fruit.add("pear", 7)
    assert fruit["pear"] == 0


@pytest.mark.parametrize("name", ["", "Pear", "pear\n", "_pear", "pear__2", "2pears"])
def test_a_malformed_name_is_refused(fruit: Registry[int], name: str) -> None:
    with pytest.raises(ConfigError, match=r"cannot name a fruit: use lower case\."):
        fruit.add(name, 7)


def test_an_unknown_name_lists_near_matches_or_all(fruit: Registry[int]) -> None:
    with pytest.raises(DataError, match=r"The zoo has no fruit 'appel'\. Did you mean 'apple'"):
        fruit.find("appel")
    with pytest.raises(DataError, match=r"no fruit 'xyz'\. Known fruits: apple, pear, pine_apple\."):
        fruit.find("xyz")
