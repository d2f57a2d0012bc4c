"""Rankings of an earlier run are repeated where what is ranked is alike."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from madtp.calls.rankings import Rankings

SCORES = torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, 4.0]])
NEAR = torch.tensor([[2.0, 1.0, 2.1], [0.0, 4.0, 4.1]])


@pytest.mark.parametrize(
    "rank",
    [
        lambda x: x.topk(2, 1).indices,
        lambda x: x.sort(1, descending=True).indices,
        lambda x: x.argsort(dim=-1, stable=True),
        lambda x: x.argmax(1),
        lambda x: x.max(1).indices,
        lambda x: x.kthvalue(2, 1).indices,
    ],
)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_order_is_repeated(rank: Callable[[Tensor], Tensor], mode: Callable[[], torch.no_grad]) -> None:
    with mode():
        with Rankings() as earlier:
            order = rank(SCORES)
        assert not torch.equal(rank(NEAR), order)
        with Rankings(earlier.found) as later:
            assert torch.equal(rank(NEAR), order)
        assert torch.equal(later.repeated[0], NEAR)


@pytest.mark.parametrize("rank", [lambda x: x.topk(2, 1), lambda x: x.max(1), lambda x: x.max(1, keepdim=True)])
def test_values_are_those_of_the_run_itself(rank: Callable[[Tensor], torch.return_types.topk]) -> None:
    with Rankings() as earlier:
        rank(SCORES)
    with Rankings(earlier.found):
        values, indices = rank(NEAR)
    width = max(1, values.shape[-1] if values.dim() == 2 else 1)
    assert torch.equal(values.reshape(2, width), NEAR.gather(1, indices.reshape(2, width)))


def test_rankings_that_a_graph_has_left_out_are_skipped() -> None:
    with Rankings() as earlier:
        (SCORES * 9).argmax(1)
        order = SCORES.argmax(1)
    with Rankings(earlier.found) as later:
        assert torch.equal(NEAR.argmax(1), order)
    assert list(later.repeated) == [1]


@pytest.mark.parametrize("other", [lambda x: x.argmin(1), lambda x: x[:, :2].argmax(1), lambda x: x.argmax(0)])
def test_other_rankings_go_by_their_own_scores(other: Callable[[Tensor], Tensor]) -> None:
    with Rankings() as earlier:
        SCORES.argmax(1)
    with Rankings(earlier.found) as later:
        assert torch.equal(other(NEAR), other(NEAR))
    assert not later.repeated


def test_whole_numbers_tie_exactly() -> None:
    with Rankings() as earlier:
        torch.tensor([1, 3, 2]).argmax()
    assert not earlier.found
