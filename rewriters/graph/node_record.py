"""Facts that a pass records at a node for later passes.

Start at :func:`record`. torch keeps its own facts in ``node.meta`` (``"val"``, ``"nn_module_stack"``); everything that
the rewriter adds is a field of :class:`NodeRecord`. Copies of a graph copy ``meta`` shallowly, so a record is frozen and
replaced as a whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

if TYPE_CHECKING:
    from rewriters.graph.match import Miss

KEY = "madtp"


@dataclass(frozen=True)
class RowwiseModule:
    """A submodule that works row by row, and that a graph calls as one operation.

    Attributes:
        path: Module path of the submodule.
        spec: Structure of its call, ``(args, kwargs)``.
        constants: Position and value of each leaf of the call that is not a tensor.
        rank: Number of leading dimensions that are rows.
        results: Data type and sizes behind the rows of each result.
        result_numbers: For each entry of the tuple that it returns, the number of a result or None; None as a whole if it
            returns a single tensor.
        macs: Multiply-accumulates per row.
    """

    path: str
    spec: pytree.TreeSpec
    constants: tuple[tuple[int, Any], ...]
    rank: int
    results: tuple[tuple[torch.dtype, tuple[int, ...]], ...]
    result_numbers: tuple[int | None, ...] | None
    macs: float


@dataclass(frozen=True)
class NodeRecord:
    """Facts about one node that its graph does not show.

    Attributes:
        number: Value of a scalar constant of the graph.
        modalities: Modalities that a floating-point input of a region descends from.
        image_positions: For an input that holds a text sequence: the input that is true at its
            image positions.
        cache_paths: On the output node: path, in the returned object, of each output that a later call reads again,
            by position among the outputs.
        rowwise: The submodule that the operation represents.
        special_cut: Whether a slice separates learned tokens from those behind them.
        site_attention: Whether a module call computes the attention of a site's block.
        nearest_miss: Where the search for a known pattern that starts at the node came farthest and failed.
        without_gradients: Whether the model computes it in a block of code without gradients.
        recomputed: The node over surviving tokens whose values the operation computes once more for all tokens.
    """

    number: float | None = None
    modalities: frozenset[str] | None = None
    image_positions: fx.Node | None = None
    cache_paths: Mapping[int, str] | None = None
    rowwise: RowwiseModule | None = None
    special_cut: bool = False
    site_attention: bool = False
    nearest_miss: Miss | None = None
    recomputed: fx.Node | None = None
    without_gradients: bool = False


NOTHING_RECORDED = NodeRecord()


def record(node: fx.Node) -> NodeRecord:
    """What was recorded at ``node``; all fields are at their defaults where nothing was."""
    found: NodeRecord = node.meta.get(KEY, NOTHING_RECORDED)
    return found


def set_record(node: fx.Node, new: NodeRecord) -> None:
    """Replace the record of ``node``; start from ``dataclasses.replace(record(node), ...)``."""
    node.meta[KEY] = new


def rowwise_module(node: fx.Node) -> RowwiseModule:
    """The submodule that a row-by-row operation represents."""
    module = record(node).rowwise
    assert module is not None, f"{node.name} does not stand for a module"
    return module
