"""Changed inputs of every reader: loaded as they should be, or refused by an error of madtp, within limits."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .changes import Attempt, attempts
from .judging import Bench
from .readers import READERS
from .verdicts import LOADED, Limits

EXAMPLES = 25
"""Of each reader: all of them take less than a minute."""

Benches = Callable[[str], Bench]


@pytest.fixture(scope="module")
def benches(tmp_path_factory: pytest.TempPathFactory) -> Benches:
    """The bench of each reader, made once."""
    return cache(lambda reader: Bench(READERS[reader], tmp_path_factory.mktemp(reader), Limits()))


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
@settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_changed_inputs_are_loaded_or_refused(reader: str, benches: Benches, data: st.DataObject) -> None:
    bench = benches(reader)
    verdict = bench.judge(data.draw(attempts(tuple(bench.formats))))
    assert verdict.allowed, f"{verdict.kind}: {verdict.message} ({verdict.where})"


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
def test_inputs_that_nothing_changes_are_loaded(reader: str, benches: Benches) -> None:
    """What is refused before anything is changed would hide every fault."""
    verdict = benches(reader).judge(Attempt((), sealed=False))
    assert verdict.kind == LOADED, verdict
    assert benches(reader).judge(Attempt((), sealed=True)).kind == LOADED
