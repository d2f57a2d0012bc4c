"""Contractions written as ``einsum`` become matrix products, so that later stages know one spelling.

Start at :func:`plain_products`. What is not a product of two (batches of) matrices keeps its spelling, and remembers why.
"""

from __future__ import annotations

import string
from dataclasses import dataclass

import torch
from torch import fx

from rewriters.graph.emit import emit
from rewriters.graph.match import NoMatch, attempt
from rewriters.graph.nodes import example_shape, is_tensor, op_name

aten = torch.ops.aten
TWO_MATRICES = "a product of two operands in which one letter is summed, and each operand has one letter of its own"


@dataclass(frozen=True)
class Product:
    """The letters of an equation.

    Attributes:
        first: letters of the first operand, in order.
        second: letters of the second operand.
        result: letters of the result.
        batch: letters that both operands and the result have.
        row: letters of the first operand alone.
        inner: letters of both operands, which are summed.
        column: letters of the second operand alone.
        operands: the operands.
    """

    first: str
    second: str
    result: str
    batch: str
    row: str
    inner: str
    column: str
    operands: tuple[fx.Node, fx.Node]


def plain_products(graph: fx.Graph) -> None:
    """Replace every contraction of two operands that is a matrix product, in place."""
    for node in list(graph.nodes):
        if node.op == "call_function" and op_name(node) == "einsum":
            with attempt(node, TWO_MATRICES):
                _replace(graph, node, _parse(node))


def _parse(node: fx.Node) -> Product:
    equation, operands = node.args[:2]
    if not isinstance(equation, str) or not isinstance(operands, (list, tuple)) or len(operands) != 2:
        raise NoMatch(node, f"{equation!r} does not multiply two operands", TWO_MATRICES)
    left, right = operands
    if not is_tensor(left) or not is_tensor(right):
        raise NoMatch(node, f"an operand of {equation!r} is not a tensor", TWO_MATRICES)
    letters, arrow, result = equation.replace(" ", "").partition("->")
    terms = letters.split(",")
    if not arrow or len(terms) != 2:
        raise NoMatch(node, f"{equation!r} does not name its result", TWO_MATRICES)
    spelled = _without_ellipsis((*terms, result), [len(example_shape(n)) for n in (left, right)])
    if spelled is None:
        raise NoMatch(node, f"the dots of {equation!r} stand for different dimensions", TWO_MATRICES)
    first, second, result = spelled
    if any(len(set(term)) != len(term) for term in spelled):
        raise NoMatch(node, f"{equation!r} repeats a letter in one operand", TWO_MATRICES)
    shared = set(first) & set(second)
    batch = "".join(c for c in first if c in shared and c in result)
    inner = [c for c in first if c in shared and c not in result]
    rows, columns = ([c for c in term if c not in shared] for term in (first, second))
    # A letter of one operand alone that the result lacks is summed there; more than one a matrix dimension needs a reshape.
    if not len(inner) == len(rows) == len(columns) == 1 or set(result) != {*batch, *rows, *columns}:
        raise NoMatch(node, f"{equation!r} is not one product of matrices", TWO_MATRICES)
    return Product(first, second, result, batch, rows[0], inner[0], columns[0], (left, right))


def _without_ellipsis(terms: tuple[str, ...], ranks: list[int]) -> tuple[str, str, str] | None:
    """The terms with letters for dots; None where operands have different numbers of them."""
    dots = {rank - len(term.replace("...", "")) for term, rank in zip(terms, ranks, strict=False) if "..." in term}
    if len(dots) > 1 or (dots and not all("..." in term for term in terms)):
        return None
    unused = [c for c in string.ascii_letters if not any(c in term for term in terms)]
    letters = "".join(unused[: dots.pop()]) if dots else ""
    first, second, result = (term.replace("...", letters) for term in terms)
    return first, second, result


def _replace(graph: fx.Graph, node: fx.Node, product: Product) -> None:
    left, right = product.operands
    sizes = [
        dict(zip(term, example_shape(n), strict=True)) for term, n in ((product.first, left), (product.second, right))
    ]
    if any(sizes[0][c] != sizes[1][c] for c in product.batch):
        raise NoMatch(node, "a batch dimension of an operand broadcasts", TWO_MATRICES)
    with graph.inserting_before(node):
        first = _permuted(graph, left, product.first, product.batch + product.row + product.inner, node)
        second = _permuted(graph, right, product.second, product.batch + product.inner + product.column, node)
        matrices = emit(graph, aten.matmul.default, (first, second), node)
        letters = product.batch + product.row + product.column
        result = _permuted(graph, matrices, letters, product.result, node)
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
