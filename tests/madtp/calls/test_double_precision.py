"""Operations that are asked for single precision compute in double precision."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from madtp.calls.double_precision import DoublePrecision

THIRD = torch.full((2,), 1 / 3, dtype=torch.float64)


@pytest.mark.parametrize(
    "run",
    [
        lambda x: x.float() + 0,
        lambda x: x.to(torch.bfloat16).sum(),
        lambda x: x.sum(dtype=torch.float32),
        lambda x: torch.arange(3, dtype=torch.float32) * x[0],
        lambda x: x.softmax(0, dtype=torch.float32),
        lambda x: torch.ones(2).div(3),
    ],
)
def test_less_precision_is_not_used(run: Callable[[Tensor], Tensor]) -> None:
    with DoublePrecision():
        exact = run(THIRD)
    assert exact.dtype == torch.float64
    torch.testing.assert_close(exact, run(THIRD).double(), rtol=1e-2, atol=0)


def test_what_is_no_number_with_a_fraction_stays() -> None:
    with DoublePrecision():
        assert torch.arange(3).dtype == torch.int64
        assert (THIRD > 0).dtype == torch.bool
        assert THIRD.to(torch.complex64).dtype == torch.complex64
