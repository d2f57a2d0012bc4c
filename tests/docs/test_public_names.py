"""Every public name has an entry in the API reference and a docstring that says what it takes, returns and raises."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import itertools
import re
import textwrap
import types
from collections.abc import Callable
from typing import Any

import pytest
from pages import DOCS

from madtp import errors

PACKAGES = (
    "madtp madtp.benchmark madtp.evaluation madtp.pictures madtp.pruned madtp.training madtp.tuning.calibration "
    "zoo zoo.datasets zoo.metrics zoo.scenes zoo.tasks"
).split()
"""Packages whose ``__all__`` is public."""
ENTRY = re.compile(r"^::: ([\w.]+)$", re.M)


@functools.cache
def listed() -> frozenset[str]:
    """What the pages of the API reference list."""
    texts = [page.read_text(encoding="utf-8") for page in (DOCS / "api").glob("*.md")]
    return frozenset(name for text in texts for name in ENTRY.findall(text))


def find(path: str) -> Any:
    """The object behind a dotted path."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


PUBLIC = sorted(
    f"{package}.{name}" for package in PACKAGES for name in importlib.import_module(package).__all__ if name[:2] != "__"
)


def identity(path: str) -> tuple[int, str]:
    """What two paths to one object share."""
    return id(find(path)), path.rpartition(".")[2]


@pytest.mark.parametrize("path", PUBLIC)
def test_a_public_name_has_an_entry(path: str) -> None:
    assert identity(path) in {identity(entry) for entry in listed()}, f"no page of docs/api lists {path}"


def test_entries_name_each_object_once() -> None:
    found = [identity(path) for path in listed()]
    assert len(found) == len(set(found))


def test_every_error_has_an_entry() -> None:
    own = {
        name for name, value in vars(errors).items() if inspect.isclass(value) and issubclass(value, errors.MadtpError)
    }
    assert {path.rpartition(".")[2] for path in listed()} >= own


@pytest.mark.parametrize("path", sorted(listed()))
def test_an_entry_is_documented(path: str) -> None:
    thing = find(path)
    thing = inspect.unwrap(thing) if callable(thing) else thing
    if not (inspect.isclass(thing) or inspect.isfunction(thing)):
        assert text_behind(path), f"{path} has no docstring below its assignment"
        return
    assert "__doc__" in vars(thing) or inspect.isfunction(thing)
    text = inspect.getdoc(thing) or ""
    assert text, f"{path} has no docstring"
    if inspect.isfunction(thing):
        assert not missing_in(thing, text), f"the docstring of {path} says nothing of {missing_in(thing, text)}"


def missing_in(function: Callable[..., Any], text: str) -> list[str]:
    """Parameters and errors of a function that its docstring does not name."""
    parameters = [name for name in inspect.signature(function).parameters if name not in ("self", "args", "kwargs")]
    words = set(re.findall(r"\w+", text.lower()))
    silent = [name for name in parameters if name.lower() not in words and not set(name.lower().split("_")) & words]
    raised = raises(function) - set(re.findall(r"\w+", text))
    return silent + sorted(raised)


def raises(function: types.FunctionType | Callable[..., Any]) -> set[str]:
    """Errors of the library that a function raises itself."""
    body = ast.parse(textwrap.dedent(inspect.getsource(function)))
    calls = [node.exc.func for node in ast.walk(body) if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)]
    return {call.id for call in calls if isinstance(call, ast.Name) and hasattr(errors, call.id)}


def text_behind(path: str) -> str:
    """The docstring below the assignment of a constant or a type, in the module that assigns it."""
    module, _, name = path.rpartition(".")
    body = ast.parse(inspect.getsource(importlib.import_module(module))).body
    for node in body:
        if isinstance(node, ast.ImportFrom) and node.module and name in {alias.name for alias in node.names}:
            return text_behind(f"{node.module}.{name}")
    for node, following in itertools.pairwise(body):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if name in {target.id for target in targets if isinstance(target, ast.Name)} and isinstance(
            following, ast.Expr
        ):
            return ast.literal_eval(following.value) if isinstance(following.value, ast.Constant) else ""
    return ""


def test_a_function_that_hides_an_argument_or_an_error_is_found() -> None:
    def careless(model: object, batch: int) -> None:
        """Do something to a model."""
        raise errors.DataError("no")

    def direct(batch: int) -> None:
        """Do something."""
        raise DataError("no")

    assert missing_in(careless, inspect.getdoc(careless) or "") == ["batch"]
    assert missing_in(direct, inspect.getdoc(direct) or "") == ["batch", "DataError"]


DataError = errors.DataError
