"""``benchmarks/scaling.py``: the passes that it times exist."""

from __future__ import annotations

import importlib

import pytest
from project_paths import ROOT


def test_every_timed_pass_is_a_function_of_its_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    for path in importlib.import_module("scaling").PASSES.values():
        module, _, function = path.rpartition(".")
        assert callable(getattr(importlib.import_module(module), function)), path
