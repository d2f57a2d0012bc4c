"""Objects and other containers in a call are opened and put together again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

import pytest
import torch
from region_hosts import Memory
from torch.utils import _pytree as pytree

from madtp.calls.call import Call
from madtp.calls.objects import unflatten_objects


class Output(OrderedDict[str, object]):
    """An output whose entries stand in the order of its fields once it is made, and are appended later on."""

    FIELDS = ("hidden", "pooled")

    def __init__(self, **entries: object) -> None:
        super().__init__((name, entries[name]) for name in self.FIELDS if name in entries)


@pytest.fixture
def registered() -> Iterator[None]:
    pytree.register_pytree_node(
        Output,
        lambda x: (list(x.values()), list(x)),
        lambda values, names: Output(**dict(zip(names, values, strict=True))),
    )
    yield
    del pytree.SUPPORTED_NODES[Output]


@pytest.mark.usefixtures("registered")
def test_entries_that_were_appended_stand_beside_a_cache() -> None:
    output, memory = Output(), Memory()
    output["pooled"], output["hidden"] = torch.ones(2, 3), torch.zeros(2, 5)
    memory.seen[0] = torch.ones(2, 1), torch.zeros(2, 1)
    call = Call((), {"features": output, "memory": memory}).flattened()
    assert [leaf.shape for leaf in call.flat()[0]] == [(2, 5), (2, 3), (2, 1), (2, 1)]
    assert call.cache_leaves() == {2, 3}
    assert call.objects is not None
    values, made = unflatten_objects((call.args, call.kwargs), call.objects)
    assert isinstance(values, tuple)
    assert list(values[1]["features"]) == ["hidden", "pooled"]
    assert torch.equal(made[0].seen[0][0], torch.ones(2, 1))
