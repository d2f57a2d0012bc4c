"""Pointwise operations: which values lie on a grid and depend, at each position, on that position alone.

Start at :func:`grid_around`; ``flatten_grids.py`` moves such values to flat tokens. Channels come last,
``[B, H, W, C]``, or first, ``[B, C, H, W]``; a permutation leads from one to the other.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from rewriters.axes.channel_rules import is_pointwise_conv2d
from rewriters.axes.table import RULES, elementwise, like_first
from rewriters.graph.nodes import (
    call_argument,
    example_shape,
    int_argument,
    is_tensor,
    normal_dim,
    op_name,
    permutation,
)
from rewriters.graph.op_sets import NORMS, SIZED_VIEWS

# They mix channels that come last.
LAST_DIMENSION = NORMS | {"linear"}
# They need channels in dimension 1.
CHANNELS_FIRST = frozenset("conv2d batch_norm".split())
# Views that can make a grid of flat tokens.
GRID_VIEWS = SIZED_VIEWS | {"unflatten"}


@dataclass(frozen=True)
class Order:
    """The order of dimensions of a value of rank 4 on a grid.

    Attributes:
        first: the first of the two dimensions of the grid.
    """

    first: int

    @property
    def turned(self) -> Order:
        """The other order."""
        return FIRST if self is LAST else LAST

    @property
    def permutation(self) -> tuple[int, ...]:
        """Dimensions that lead to this order from the other one."""
        return (0, 2, 3, 1) if self is LAST else (0, 3, 1, 2)

    def grid_size(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Batch size, height and width of a value of that shape."""
        return shape[0], shape[self.first], shape[self.first + 1]

    def flat(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape with both dimensions of the grid as one."""
        return (*shape[: self.first], shape[self.first] * shape[self.first + 1], *shape[self.first + 2 :])


LAST, FIRST = Order(1), Order(2)


def grid_around(seeds: tuple[fx.Node, ...]) -> dict[fx.Node, Order] | None:
    """Find all values that pointwise operations connect with ``seeds``, and their order of dimensions.

    Returns None where no operation shows which dimension holds the channels.
    """
    for order in (LAST, FIRST):
        found = _around(seeds, order)
        if found is not None and _tells_channels(found):
            return found
    return None


def _around(seeds: tuple[fx.Node, ...], order: Order) -> dict[fx.Node, Order] | None:
    size = order.grid_size(example_shape(seeds[0]))
    found: dict[fx.Node, Order] = {}
    seen = dict.fromkeys(seeds, order)
    waiting = list(seeds)
    while waiting:
        node = waiting.pop()
        if _is_pointwise(node, size, seen[node]):
            found[node] = seen[node]
        # What is not such a value hands the grid on to its users.
        for other in (*(node.all_input_nodes if node in found else ()), *node.users):
            own = _order_of_neighbour(node, seen[node], other)
            if other in seen:
                if seen[other] is not own and _is_pointwise(other, size, own):
                    return None
            elif _is_pointwise(other, size, own) or (other in node.all_input_nodes and _hands_on(other, size, own)):
                seen[other] = own
                waiting.append(other)
    return found


def _hands_on(node: fx.Node, size: tuple[int, ...], order: Order) -> bool:
    return node.op == "call_function" and is_tensor(node) and stands_on(node, size, order)


def _order_of_neighbour(node: fx.Node, order: Order, other: fx.Node) -> Order:
    """The order that ``other``, an operand or a user of ``node``, must have."""
    turns = node if other in node.all_input_nodes else other
    return order.turned if op_name(turns) == "permute" else order


def _tells_channels(found: dict[fx.Node, Order]) -> bool:
    """Whether an operation shows which dimension holds the channels."""
    for node, order in found.items():
        if order is LAST and op_name(node) in LAST_DIMENSION:
            return True
        if order is FIRST and (op_name(node) in CHANNELS_FIRST or any(_reads_maps(u) for u in node.users)):
            return True
    return False


def _reads_maps(user: fx.Node) -> bool:
    """Whether ``user`` takes maps ``[B, C, H, W]``: it convolves them, or flattens them into tokens."""
    if op_name(user) == "flatten":
        return normal_dim(int_argument(user, 1, "start_dim", 0), 4) == 2
    return op_name(user) in CHANNELS_FIRST


def stands_on(node: fx.Node, size: tuple[int, ...], order: Order) -> bool:
    """Whether a value has the size of the grid."""
    shape = example_shape(node)
    return len(shape) == 4 and order.grid_size(shape) == size


def _is_pointwise(node: fx.Node, size: tuple[int, ...], order: Order) -> bool:
    """Whether a value lies on the grid, and its entry at a position depends only on the operands' entries at that position."""
    if node.op != "call_function" or not is_tensor(node) or not stands_on(node, size, order):
        return False
    name, first = op_name(node), node.args[0] if node.args else None
    if name == "permute":
        return permutation(node, 4) == order.permutation
    if name in LAST_DIMENSION or name in CHANNELS_FIRST:
        return is_tensor(first) and _mixes_channels_alone(node, order) and stands_on(first, size, order)
    if RULES.get(name) not in (elementwise, like_first):
        return False
    return all(_fits(n, size, order) for n in node.all_input_nodes if is_tensor(n))


def _mixes_channels_alone(node: fx.Node, order: Order) -> bool:
    """Whether an operation mixes channels, and nothing else."""
    name = op_name(node)
    if name in LAST_DIMENSION:
        return order is LAST and (name == "linear" or len(call_argument(node, 1, "normalized_shape", ())) == 1)
    if order is LAST:
        return False
    return name == "batch_norm" or is_pointwise_conv2d(node)


def _fits(operand: fx.Node, size: tuple[int, ...], order: Order) -> bool:
    """Whether an operand has an entry for each position of the grid, or one for all."""
    shape = example_shape(operand)
    behind = 3 - order.first - 1  # dimensions behind the grid
    grid = shape[-2 - behind : len(shape) - behind]
    return grid in (size[1:], (1, 1)) or len(shape) <= behind or set(shape) <= {1}
