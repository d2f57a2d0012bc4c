"""Every rule of the table against two experiments: change one token, and prune tokens."""

from __future__ import annotations

import operator
from collections import Counter

import pytest

pytest.register_assert_rewrite("rule_harness")

import torch  # noqa: E402
from rule_forms import FORMS, NEAR_MISSES  # noqa: E402
from rule_harness import Sample, build, check, outcome, sample  # noqa: E402
from rule_samples import REFUSED, SAMPLES, x  # noqa: E402

from rewriters.axes.labels import ResultLabels, is_plain  # noqa: E402
from rewriters.axes.table import RULES, apply  # noqa: E402
from rewriters.graph.nodes import AxisError  # noqa: E402
from rewriters.graph.op_sets import DRAWS  # noqa: E402

# Names that are not operations of torch: a builtin, and spellings of Python that export may leave.
ELSEWHERE = {"getitem", "float", "mod"}
# Stands for submodules, see tests/rewriters/capture/test_mixture_of_experts.py. Draws do not repeat in an experiment, see
# tests/rewriters/test_stochastic_depth.py.
APART = {"rowwise", "new_empty"} | DRAWS
# Rules that cover every form of their operations: there is nothing that they must not let pass.
TOTAL = {
    "to",
    "new_zeros",
    "transpose",
    "permute",
    "unsqueeze",
    "squeeze",
    "one_hot",
    "expand",
    "view_as_complex",
    "view_as_real",
    "getitem",
}
FIRING, MISSING = [*SAMPLES, *FORMS], [*REFUSED, *NEAR_MISSES]


def _label(one: Sample) -> str:
    shapes = ",".join("x".join(str(d) for d in o.dims) for o in one.operands())
    return f"{one.name}-{shapes}"


@pytest.mark.parametrize("one", FIRING, ids=_label)
def test_rule_agrees_with_experiments(one: Sample) -> None:
    for seed in range(2):
        check(one, seed)


@pytest.mark.parametrize(("one", "word"), MISSING, ids=lambda p: _label(p) if isinstance(p, Sample) else p)
def test_near_miss_is_refused(one: Sample, word: str) -> None:
    with pytest.raises(AxisError, match=word):
        outcome(one)


def test_every_operation_fires_in_two_forms() -> None:
    times = Counter(one.name for one in FIRING)
    assert {name for name in RULES if times[name] < 2} <= ELSEWHERE | APART


def test_every_rule_refuses_a_near_miss() -> None:
    refused = {RULES[one.name] for one, _ in MISSING if one.name in RULES}
    total = {RULES[name] for name in TOTAL}
    assert not [name for name, rule in RULES.items() if rule not in refused | total and name not in APART]


def test_one_of_several_results_has_its_own_labels() -> None:
    made = build(sample(torch.ops.aten.split_with_sizes.default, x(), [1, 3], 2))
    results = apply(made.node, made.insertion.labels).labels
    assert isinstance(results, ResultLabels)
    made.insertion.labels[made.node] = results
    for number in range(2):
        part = made.graph.call_function(operator.getitem, (made.node, number))
        assert apply(part, made.insertion.labels).labels == results[number]
        assert not is_plain(results[number][1])
    beyond = made.graph.call_function(operator.getitem, (made.node, 2))
    with pytest.raises(AxisError, match="does not cover this form"):
        apply(beyond, made.insertion.labels)
