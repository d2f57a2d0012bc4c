"""Contractions that are matrix products become ones; others keep their spelling."""

from __future__ import annotations

import pytest
import torch
from rewritten_models import gap
from torch import Tensor, fx, nn

from madtp.calls.call import normalise_call
from rewriters.canonicalise.einsum import plain_products
from rewriters.capture.export import capture
from rewriters.graph.nodes import op_name

SIZES = {"b": 2, "h": 3, "i": 5, "j": 4, "d": 6, "c": 7}


class Contraction(nn.Module):
    """einsum by an equation."""

    def __init__(self, equation: str) -> None:
        super().__init__()
        self.equation = equation

    def forward(self, *operands: Tensor) -> Tensor:
        return torch.einsum(self.equation, *operands)


def run(equation: str, *shapes: str) -> tuple[list[str], float]:
    """Operations that are left of a contraction, and its error."""
    torch.manual_seed(0)
    terms = shapes or tuple(equation.partition("->")[0].replace(" ", "").split(","))
    model = Contraction(equation)
    operands = tuple(torch.randn([SIZES[c] for c in term]) for term in terms)
    graph = capture(model, normalise_call(model, operands, {})).graph
    plain_products(graph)
    graph.lint()
    found = fx.GraphModule(model, graph)(*operands)[0]
    return [op_name(n) for n in graph.nodes if n.op == "call_function"], gap(model(*operands), found)


@pytest.mark.parametrize(
    "equation",
    [
        "bhid,bhjd->bhij",
        "bihd,bjhd->bhij",
        "bhij,bhjd->bihd",
        "bhij , bjhd -> bhid",
        "bid,bjd->bij",
        "id,dj->ij",
        "bhid,bhjd->bhji",
        "hbid,bhjd->bhij",
        "bhid,bjd->bhij",
        "bjd,bihd->bhij",
        "bhij,bjd->bihd",
    ],
)
def test_a_matrix_product_becomes_one(equation: str) -> None:
    left, error = run(equation)
    assert "matmul" in left
    assert "einsum" not in left
    assert error < 1e-6


def test_dots_stand_for_the_dimensions_of_the_batch() -> None:
    left, error = run("...id,...jd->...ij", "bhid", "bhjd")
    assert "einsum" not in left
    assert error < 1e-6


@pytest.mark.parametrize(
    "equation",
    [
        "bid,bjd->bj",
        "bid,bid->bi",
        "bihd,hdc->bic",
        "bii,bij->bij",
        "bid->bdi",
        "bid,bjd,bjc->bic",
        "bid,jc->bidjc",
        "bid,dc->bic",
        "bhid,bcjd->bhicj",
        "bhid,bjd->bij",
    ],
)
def test_other_contractions_keep_their_spelling(equation: str) -> None:
    left, error = run(equation)
    assert "einsum" in left
    assert error == 0.0
