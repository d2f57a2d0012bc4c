"""What stands in attributes that programs do not write: reading it is an error, looking at it is not."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

from madtp.errors import MadtpError
from madtp.programs.unwritten import Unwritten, UnwrittenAttributes

READS: dict[str, Callable[[Unwritten], object]] = {
    "a function of torch": lambda x: torch.cat([x, torch.ones(2)]),  # type: ignore[list-item]
    "arithmetic": lambda x: torch.ones(2) + x,  # type: ignore[operator]
    "arithmetic from the left": lambda x: x * torch.ones(2),
    "an attribute": lambda x: x.shape,
    "an index": lambda x: x[0],
    "unpacking": lambda x: [*x],
    "truth": bool,
    "length": len,
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_reading_is_an_error_that_names_the_attribute(read: Callable[[Unwritten], object]) -> None:
    with pytest.raises(MadtpError, match=r"block\.kept is written by the original's forward"):
        read(Unwritten("block.kept"))


def test_copies_and_pickles() -> None:
    one = Unwritten("block.kept")
    for again in (copy.copy(one), copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        assert type(again) is Unwritten
        assert "block.kept" in repr(again)


def test_attributes_are_marked_once_a_program_has_run() -> None:
    host = nn.Sequential(nn.Linear(1, 1))
    host[0].kept = torch.ones(1)
    unwritten = UnwrittenAttributes([("0", "kept")])
    unwritten.mark(host)
    first = host[0].kept
    assert type(first) is Unwritten
    unwritten.mark(host)
    assert host[0].kept is first
