"""Every rule of the table against two experiments: change one token, and prune tokens."""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite("rule_harness")

from rule_harness import Sample, check, outcome  # noqa: E402
from rule_samples import REFUSED, SAMPLES  # noqa: E402

from rewriters.axes import AxisError  # noqa: E402
from rewriters.rules import RULES  # noqa: E402

# Names that are no operations of torch's own: a builtin and spellings of Python that export may leave.
ELSEWHERE = {"getitem", "float", "mod"}


def _label(one: Sample) -> str:
    shapes = ",".join("x".join(str(d) for d in o.dims) for o in one.operands())
    return f"{one.name}-{shapes}"


@pytest.mark.parametrize("one", SAMPLES, ids=_label)
def test_rule_agrees_with_experiments(one: Sample) -> None:
    for seed in range(2):
        check(one, seed)


@pytest.mark.parametrize(("one", "word"), REFUSED, ids=lambda p: _label(p) if isinstance(p, Sample) else p)
def test_near_miss_is_refused(one: Sample, word: str) -> None:
    with pytest.raises(AxisError, match=word):
        outcome(one)


def test_every_operation_of_the_table_has_a_sample() -> None:
    assert RULES.keys() - {s.name for s in SAMPLES} <= ELSEWHERE
