"""Numbers that no setting takes, for every number that a class of settings has: :func:`absurd_values`."""

from __future__ import annotations

import dataclasses
from typing import Any

NONSENSE = (float("nan"), float("inf"), -float("inf"), -1, -0.5, 10**12, 1e30, 10**400, True, "3")


def number_fields(settings: type[Any]) -> list[str]:
    """Names of the fields that hold a number, whatever else they may hold."""
    named = dataclasses.fields(settings)
    return [f.name for f in named if {"int", "float"} & set(str(f.type).replace("|", " ").split())]


def absurd_values(settings: type[Any]) -> list[tuple[str, object]]:
    """Every number of the settings with everything that it must not be."""
    return [(name, value) for name in number_fields(settings) for value in NONSENSE]
