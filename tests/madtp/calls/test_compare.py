"""Comparing outputs: what counts as equal, and what no comparison may let through."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from madtp.calls.compare import compare, relative_difference, rounds_alike
from madtp.errors import RewriteError

INF, NAN = float("inf"), float("nan")
HIDDEN = torch.finfo(torch.float32).min


def test_equal_outputs_pass() -> None:
    compare({"a": torch.tensor([1.0, -INF, NAN])}, {"a": torch.tensor([1.0, -INF, NAN])})


@pytest.mark.parametrize("wrong", [NAN, INF, HIDDEN, 3.1])
def test_numbers_that_are_wrong_or_none_are_found(wrong: float) -> None:
    with pytest.raises(RewriteError, match="differs from the original"):
        compare(torch.tensor([1.0, 3.0]), torch.tensor([1.0, wrong]))


def test_masked_values_do_not_set_the_scale() -> None:
    want = torch.tensor([1.0, HIDDEN])
    assert relative_difference(want, torch.tensor([1.5, HIDDEN])) == pytest.approx(0.5)
    assert relative_difference(want, torch.tensor([1.5, 2.0])) == INF


def test_complex_numbers_differ_in_both_parts() -> None:
    want: Tensor = torch.tensor([2 + 0j])
    assert relative_difference(want, torch.tensor([2 + 1j])) == pytest.approx(0.5)


def test_the_floor_is_the_least_scale() -> None:
    assert relative_difference(torch.tensor([1e-4]), torch.tensor([2e-4]), floor=1e-2) == pytest.approx(1e-2)
    assert relative_difference(torch.zeros(0), torch.zeros(0)) == 0.0


def test_what_is_kept_by_name_is_compared_by_name() -> None:
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([[3.0]])
    compare({"a": a, "b": (b, None)}, {"b": (b, None), "a": a})
    with pytest.raises(RewriteError, match="shape"):
        compare({"a": a, "b": b}, {"b": a, "a": b})


def test_texts_are_compared_also_inside_objects() -> None:
    said = SimpleNamespace(note="batch 4", scores=torch.ones(1))
    compare({"a": "batch 4", "b": said}, {"a": "batch 4", "b": SimpleNamespace(note="batch 4", scores=torch.ones(1))})
    with pytest.raises(RewriteError, match="batch s77"):
        compare("batch 4", "batch s77")
    with pytest.raises(RewriteError, match="batch s77"):
        compare(said, SimpleNamespace(note="batch s77", scores=torch.ones(1)))


def test_a_tensor_that_is_missing_is_found() -> None:
    with pytest.raises(RewriteError, match="NoneType instead of a tensor"):
        compare((torch.ones(1), None), (None, torch.ones(1)))


def test_containers_without_names_are_compared_in_order() -> None:
    pair = type("Pair", (), {"values": ()})

    def made(values: object) -> object:
        value = pair()
        value.values = tuple(values)  # type: ignore[call-overload]
        return value

    pytree.register_pytree_node(pair, lambda x: (list(x.values), None), lambda values, _: made(values))
    compare(made([torch.ones(1), torch.zeros(1)]), made([torch.ones(1), torch.zeros(1)]))
    with pytest.raises(RewriteError, match="differs"):
        compare(made([torch.ones(1), torch.zeros(1)]), made([torch.zeros(1), torch.ones(1)]))


EXACT = {"a": torch.tensor([1.0, 2.0], dtype=torch.float64), "n": torch.tensor([3])}


def _off(by: float) -> dict[str, Tensor]:
    return {"a": EXACT["a"].float() + by, "n": EXACT["n"]}


def test_what_is_as_near_to_the_exact_result_rounds_alike() -> None:
    assert rounds_alike(EXACT, _off(1e-3), _off(-2e-3))
    assert rounds_alike(EXACT, _off(0.0), _off(0.0))


@pytest.mark.parametrize("own", [_off(4e-3), _off(NAN), {"a": EXACT["a"].float()}])
def test_what_is_farther_from_the_exact_result_does_not(own: dict[str, Tensor]) -> None:
    assert not rounds_alike(EXACT, _off(1e-3), own)


def test_what_is_within_the_tolerance_rounds_alike_however_near_the_original_is() -> None:
    assert rounds_alike(EXACT, _off(0.0), _off(5e-5))
    assert not rounds_alike(EXACT, _off(0.0), _off(1e-3))
