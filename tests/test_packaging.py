"""What the distribution holds and declares: types, weights, versions of the tools that check it."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from configparser import ConfigParser
from importlib import resources
from importlib.metadata import packages_distributions
from pathlib import Path
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


def test_tox_builds_the_site_with_what_the_extra_installs() -> None:
    tox = ConfigParser()
    tox.read(ROOT / "tox.ini")
    assert tox["testenv:docs"]["deps"].split() == PROJECT["project"]["optional-dependencies"]["docs"]


def test_every_supported_python_is_declared() -> None:
    declared = [line.rpartition(" ")[2] for line in PROJECT["project"]["classifiers"] if ":: 3." in line]
    assert declared == ["3.10", "3.11", "3.12", "3.13", "3.14"]
    assert PROJECT["project"]["requires-python"] == f">={declared[0]}"


OWN = frozenset(("madtp", "rewriters", "zoo"))


def imported_at_run_time(path: Path) -> Iterator[str]:
    """Top-level packages that a file imports, inside functions too, but not for annotations only."""
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None and node.level == 0:
            yield node.module.partition(".")[0]
        waiting.extend(ast.iter_child_nodes(node))


def plain(name: str) -> str:
    """The name of a distribution as all tools spell it."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", name).group()).lower()  # type: ignore[union-attr]


def declared() -> set[str]:
    extras = (one for listed in PROJECT["project"]["optional-dependencies"].values() for one in listed)
    return {plain(one) for one in (*PROJECT["project"]["dependencies"], *extras)}


def test_all_that_is_imported_is_declared() -> None:
    """Of what is installed here."""
    owners = packages_distributions()
    for package in sorted(OWN):
        for path in (ROOT / package).rglob("*.py"):
            for name in (set(imported_at_run_time(path)) - OWN - sys.stdlib_module_names) & owners.keys():
                names = {plain(owner) for owner in owners[name]}
                assert names & declared(), (
                    f"{path.relative_to(ROOT)} imports {name}, which pyproject.toml does not declare"
                )


def test_every_dependency_has_its_licence_in_the_documentation() -> None:
    page = (ROOT / "docs" / "licences.md").read_text(encoding="utf-8").lower()
    tools = PROJECT["project"]["optional-dependencies"]
    left_out = {plain(one) for name in ("dev", "docs", "test") for one in tools[name]} - {"tensorboard"}
    missing = {name for name in declared() - left_out if not re.search(rf"\b{re.sub('-', '[-_]', name)}\b", page)}
    assert not missing
