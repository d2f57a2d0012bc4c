"""Structures put together again are those that were taken apart, the order of names included."""

from __future__ import annotations

from collections import OrderedDict

from torch.utils import _pytree as pytree

from madtp.calls.structures import in_declared_order, unflatten


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


class Refusing(OrderedDict):  # type: ignore[type-arg]
    """Cannot be made of what it holds."""


pytree.register_pytree_node(
    Refusing, lambda output: (list(output.values()), list(output)), lambda values, names: Refusing(*values)
)


def test_names_take_the_order_of_their_class() -> None:
    inner = Output(second=2)
    inner["first"] = 1
    again = in_declared_order({"x": (inner, 0)})
    assert list(again["x"][0]) == ["first", "second"]
    assert list(inner) == ["second", "first"], "the caller's is left alone"
    assert pytree.tree_leaves(again) == [1, 2, 0]


def test_what_has_no_declared_order_is_as_before() -> None:
    value = {"z": 1, "a": [2, OrderedDict(z=4, y=5)]}
    assert pytree.tree_flatten(in_declared_order(value)) == pytree.tree_flatten(value)
    odd, leaf = Refusing(a=1), object()
    assert in_declared_order(odd) is odd
    assert in_declared_order(leaf) is leaf
