"""What the distribution holds and declares: types, weights, versions of the tools that check it."""

from __future__ import annotations

import sys
from configparser import ConfigParser
from importlib import resources
from typing import Any

import pytest
from project_paths import ROOT

import zoo

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("package", ["madtp", "rewriters", "zoo"])
def test_types_are_part_of_the_installed_package(package: str) -> None:
    assert (resources.files(package) / "py.typed").is_file()


def test_weights_are_part_of_the_installed_package() -> None:
    for name in zoo.list_models():
        for checkpoint in zoo.describe(name).shipped:
            path = checkpoint.verified(name)
            assert (path / "card.json" if checkpoint.is_pruned else path.with_suffix(".json")).is_file()


def test_the_weights_fit_into_a_small_wheel() -> None:
    sizes = [checkpoint.size for name in zoo.list_models() for checkpoint in zoo.describe(name).shipped]
    assert sum(sizes) < 42e6


@pytest.mark.parametrize(("tool", "environment"), [("ruff", "lint"), ("mypy", "types")])
def test_tox_checks_with_the_versions_of_the_development_environment(tool: str, environment: str) -> None:
    tox = ConfigParser()
    tox.read(ROOT / "tox.ini")
    pins = [pin for pin in PROJECT["project"]["optional-dependencies"]["dev"] if pin.startswith(tool)]
    assert pins == [tox[f"testenv:{environment}"]["deps"]]


def test_every_supported_python_is_declared() -> None:
    declared = [line.rpartition(" ")[2] for line in PROJECT["project"]["classifiers"] if ":: 3." in line]
    assert declared == ["3.10", "3.11", "3.12", "3.13", "3.14"]
    assert PROJECT["project"]["requires-python"] == f">={declared[0]}"
