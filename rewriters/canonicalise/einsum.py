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
from rewriters.graph.op_sets import KEEPS_VALUES, SOFTMAXES
from rewriters.graph.walk import operand_chain

aten = torch.ops.aten
TWO_MATRICES = "a product of two operands in which one letter is summed, and each operand has one letter of its own"
# What probabilities pass on the way from the softmax to the product with the values.
_PASSED = KEEPS_VALUES | {"dropout"}


@dataclass(frozen=True)
class Product:
    """The letters of an equation.

    Attributes:
        first: letters of the first operand, in order.
        second: letters of the second operand.
        result: letters of the result.
        batch: letters that both operands and the result have.
        lone: letters of the first operand alone along which the second one is repeated: heads, where keys have none.
        row: the letter of the first operand alone that is the rows of its matrix.
        inner: letters of both operands, which are summed.
        column: letters of the second operand alone.
        operands: the operands.
    """

    first: str
    second: str
    result: str
    batch: str
    lone: str
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
    if len(columns) > 1 and len(rows) == 1:
        first, second, rows, columns, left, right = second, first, columns, rows, right, left
    # A letter of one operand alone that the result lacks is summed there. Several letters of both are several products.
    fits = len(inner) == len(columns) == 1 and (len(rows) == 1 or (len(rows) > 1 and batch))
    if not fits or set(result) != {*batch, *rows, *columns}:
        raise NoMatch(node, f"{equation!r} is not one product of matrices", TWO_MATRICES)
    # Queries stand behind heads in the map: that is the operand if a softmax made it, else the result.
    map_letters = first if _is_probabilities(left) else result
    row = max(rows, key=map_letters.index)
    lone = "".join(c for c in rows if c != row)
    return Product(first, second, result, batch, lone, row, inner[0], columns[0], (left, right))


def _is_probabilities(value: fx.Node) -> bool:
    chain = operand_chain(value, lambda n: op_name(n) in _PASSED)
    return any(op_name(n) in SOFTMAXES for n in chain)


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
        batch = product.batch + product.lone
        first = _permuted(graph, left, product.first, batch + product.row + product.inner, node)
        second = _permuted(graph, right, product.second, product.batch + product.inner + product.column, node)
        for _ in product.lone:
            second = emit(graph, aten.unsqueeze.default, (second, len(product.batch)), node)
        matrices = emit(graph, aten.matmul.default, (first, second), node)
        letters = batch + product.row + product.column
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
