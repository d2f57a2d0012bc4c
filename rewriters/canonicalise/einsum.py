"""Contractions written as ``einsum`` become matrix products, so that later stages know one spelling.

Start at :func:`plain_products`. What is no product of two (batches of) matrices keeps its spelling.
"""

from __future__ import annotations

import string
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from rewriters.graph.emit import emit
from rewriters.graph.nodes import AxisError, example_shape, is_tensor, op_name

aten = torch.ops.aten


@dataclass(frozen=True)
class Product:
    """An equation taken apart: letters of the batch, of the rows, of the sum and of the columns; and the result's order."""

    batch: str
    row: str
    inner: str
    column: str
    first: str
    second: str
    result: str


def plain_products(graph: fx.Graph) -> None:
    """Replace every contraction of two operands that is a matrix product, in place."""
    for node in list(graph.nodes):
        if node.op == "call_function" and op_name(node) == "einsum":
            found = _parse(node)
            if found is not None:
                _replace(graph, node, found)


def _parse(node: fx.Node) -> Product | None:
    equation: Any = node.args[0]
    operands: Any = node.args[1]
    if not isinstance(equation, str) or len(operands) != 2 or not all(is_tensor(n) for n in operands):
        return None
    left, arrow, result = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if not arrow or len(terms) != 2:
        return None
    spelled = _without_ellipsis((*terms, result), [len(example_shape(n)) for n in operands])
    if spelled is None:
        return None
    first, second, result = spelled
    if any(len(set(term)) != len(term) for term in (first, second, result)):
        return None
    shared = set(first) & set(second)
    batch = "".join(c for c in first if c in shared and c in result)
    inner = [c for c in first if c in shared and c not in result]
    rows, columns = ([c for c in term if c not in shared] for term in (first, second))
    # A letter of one operand alone that the result lacks is summed there; more than one a matrix dimension needs a reshape.
    if not len(inner) == len(rows) == len(columns) == 1 or set(result) != {*batch, *rows, *columns}:
        return None
    return Product(batch, rows[0], inner[0], columns[0], first, second, result)


def _without_ellipsis(terms: tuple[str, ...], ranks: list[int]) -> tuple[str, str, str] | None:
    """The terms with letters for dots; None where operands have different numbers of them."""
    dots = {rank - len(term.replace("...", "")) for term, rank in zip(terms, ranks, strict=False) if "..." in term}
    if len(dots) > 1 or (dots and not all("..." in term for term in terms)):
        return None
    unused = [c for c in string.ascii_letters if not any(c in term for term in terms)]
    letters = "".join(unused[: dots.pop()]) if dots else ""
    first, second, result = (term.replace("...", letters) for term in terms)
    return first, second, result


def _replace(graph: fx.Graph, node: fx.Node, found: Product) -> None:
    operands: Any = node.args[1]
    shapes = [example_shape(n) for n in operands]
    sizes = [
        dict(zip(term, shape, strict=True)) for term, shape in zip((found.first, found.second), shapes, strict=True)
    ]
    if any(sizes[0][c] != sizes[1][c] for c in found.batch):
        return
    wanted = found.batch + found.row + found.inner, found.batch + found.inner + found.column
    with graph.inserting_before(node):
        try:
            first, second = (
                _permuted(graph, operand, have, want, node)
                for operand, have, want in zip(operands, (found.first, found.second), wanted, strict=True)
            )
            product = emit(graph, aten.matmul.default, (first, second), node)
            result = _permuted(graph, product, found.batch + found.row + found.column, found.result, node)
        except AxisError:
            return
    node.replace_all_uses_with(result)
    graph.erase_node(node)


def _permuted(graph: fx.Graph, node: fx.Node, have: str, want: str, like: fx.Node) -> fx.Node:
    if have == want:
        return node
    order = [have.index(letter) for letter in want]
    moved = [place for place, letter in enumerate(order) if place != letter]
    if len(moved) == 2:
        # A transposition is what attention's spellings are read by.
        return emit(graph, aten.transpose.int, (node, moved[0], moved[1]), like)
    return emit(graph, aten.permute.default, (node, order), like)
