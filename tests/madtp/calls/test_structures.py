"""Structures put together again are those that were taken apart, the order of names included."""

from __future__ import annotations

from collections import OrderedDict

from torch.utils import _pytree as pytree

from madtp.calls.structures import unflatten


class Output(OrderedDict):  # type: ignore[type-arg]
    """An output class whose constructor has its own order of names."""

    def __init__(self, first: object = None, second: object = None) -> None:
        super().__init__((name, value) for name, value in (("first", first), ("second", second)) if value is not None)


pytree.register_pytree_node(
    Output,
    lambda output: (list(output.values()), list(output)),
    lambda values, names: Output(**dict(zip(names, values, strict=True))),
)


def test_names_keep_the_order_in_which_they_were_set() -> None:
    inner = Output(second=2)
    inner["first"] = 1
    for value in (inner, (0, [inner]), {"x": inner}):
        again = unflatten(*pytree.tree_flatten(value))
        assert pytree.tree_leaves(again) == pytree.tree_leaves(value)
    assert list(unflatten(*pytree.tree_flatten(inner))) == ["second", "first"]


def test_other_containers_are_as_before() -> None:
    value = (1, {"b": [2, None], "a": (3,)}, OrderedDict(z=4, y=5))
    assert unflatten(*pytree.tree_flatten(value)) == value
