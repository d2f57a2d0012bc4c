"""Token counts of derived axes, evaluated for one call."""

from __future__ import annotations

import pytest
import sympy
import torch
from torch import Tensor

from madtp.cost.counts import (
    BatchPartCount,
    ConcatenationCount,
    FullCount,
    RangeCount,
    RepeatedCount,
    RestCount,
    SiteCount,
    StreamSize,
    TokenCount,
    TokenCounts,
)
from madtp.tokens.state import TokenState

LENGTH = sympy.Symbol("s0")
STREAMS = {"a": StreamSize(tokens=LENGTH + 1, entries=4), "b": StreamSize(tokens=8, entries=4)}
KEPT = torch.tensor([2, 3, 4, 5])


def counts(states: dict[str, TokenState] | None = None) -> TokenCounts:
    return TokenCounts(streams=STREAMS, kept={"a": KEPT}, states=states or {}, bound={LENGTH: 9})


@pytest.mark.parametrize(
    ("count", "tokens"),
    [
        (SiteCount("a"), [2, 3, 4, 5]),
        (SiteCount("b"), [8, 8, 8, 8]),
        (FullCount("a"), [10, 10, 10, 10]),
        (RestCount(SiteCount("a"), 1), [1, 2, 3, 4]),
        (BatchPartCount(SiteCount("a"), 0.5, 1.0), [4, 5]),
        (RepeatedCount(BatchPartCount(SiteCount("a"), 0.0, 0.5), 2), [2, 2, 3, 3]),
        (ConcatenationCount((SiteCount("a"), None), (LENGTH, 3)), [5, 6, 7, 8]),
        (RangeCount(FullCount("a"), 0, 4), [4, 4, 4, 4]),
        (RangeCount(FullCount("a"), LENGTH - 5, None), [6, 6, 6, 6]),
    ],
)
def test_counts_follow_from_the_sites(count: TokenCount, tokens: list[int]) -> None:
    assert counts().of(count).tolist() == tokens


def test_a_range_takes_the_survivors_that_stand_in_it() -> None:
    index = torch.tensor([[0, 1, 5], [0, 8, 9]])
    valid: Tensor = torch.tensor([[True, True, True], [True, True, False]])
    state = TokenState(full_length=10, length=3, batch=2, index=index, valid=valid, merged=torch.zeros_like(valid))
    assert counts({"a": state}).of(RangeCount(SiteCount("a"), 1, 9)).tolist() == [2, 1]
