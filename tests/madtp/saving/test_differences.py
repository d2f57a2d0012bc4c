"""What differs between two configs, in words."""

from __future__ import annotations

from madtp.saving.differences import differences


def test_each_difference_is_named_by_its_path() -> None:
    there = {"a": {"b": 1, "c": {}}, "same": [1, {"x": 2}], "free": 1}
    here = {"a": {"b": 2}, "d": None, "same": [1, {"x": 2}], "free": 2}
    assert differences(there, here, ["free"]).split("; ") == [
        "a.b is 1 there and 2 here",
        "a.c is {} there and not set here",
        "d is not set there and None here",
    ]
    assert differences(there, there) == ""


def test_many_and_long_ones_are_cut() -> None:
    text = differences({f"v{number}": "x" * 1000 for number in range(20)}, {})
    assert text.endswith("; and 12 more")
    assert len(text) < 1500
