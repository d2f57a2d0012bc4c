"""Labels through views against brute force: which elements of the result belong to which entry of an axis."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from rewriters.axes.labels import (
    Axis,
    Factor,
    Labels,
    axes_of,
    dim_size,
    is_plain,
    plain,
    relabel_view,
    token_axis,
    unlabelled,
)
from rewriters.graph.nodes import AxisError

BATCH, TOKENS = Axis("batch", "s"), Axis("tokens", "s")


def entries(labels: Labels, axis: Axis) -> Tensor:
    """For each element of a tensor with these labels the entry of ``axis`` it belongs to."""
    factors = [f for dim in labels for f in dim]
    position = next(p for p, f in enumerate(factors) if f.axis == axis)
    line = torch.arange(factors[position].size).reshape([-1 if p == position else 1 for p in range(len(factors))])
    return line.expand([f.size for f in factors]).reshape([dim_size(d) for d in labels])


@st.composite
def factorings(draw: st.DrawFn) -> tuple[Labels, tuple[int, ...]]:
    """Labels with a batch and a token axis somewhere, and a shape with as many elements."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=2, max_size=5))
    first, second = draw(st.permutations(range(len(sizes))))[:2]
    factors = [Factor(None, n) for n in sizes]
    factors[first] = Factor(BATCH, sizes[first])
    factors[second] = Factor(TOKENS, sizes[second])
    labels, shape = _cut(draw, factors), []
    rest = math.prod(sizes)
    while rest > 1 and len(shape) < 5:
        divisors = [d for d in range(1, rest + 1) if rest % d == 0]
        shape.append(draw(st.sampled_from(divisors)))
        rest //= shape[-1]
    return labels, (*shape, rest) if rest > 1 else tuple(shape)


def _cut(draw: st.DrawFn, factors: list[Factor]) -> Labels:
    """Neighbouring factors folded into dimensions at random."""
    dims: list[tuple[Factor, ...]] = []
    for factor in factors:
        if dims and draw(st.booleans()):
            dims[-1] = (*dims[-1], factor)
        else:
            dims.append((factor,))
    return Labels(dims)


@given(factorings())
def test_view_keeps_every_element_at_its_entry(drawn: tuple[Labels, tuple[int, ...]]) -> None:
    labels, shape = drawn
    try:
        result = relabel_view(labels, shape)
    except AxisError:
        return
    assert tuple(dim_size(d) for d in result) == shape
    for axis in (BATCH, TOKENS):
        found = [f for dim in result for f in dim if f.axis == axis]
        size = next(f.size for dim in labels for f in dim if f.axis == axis)
        if size > 1:
            assert [f.size for f in found] == [size]
            assert torch.equal(entries(result, axis), entries(labels, axis).reshape(shape))


@given(factorings())
def test_view_and_its_inverse_return_the_labels(drawn: tuple[Labels, tuple[int, ...]]) -> None:
    labels, shape = drawn
    assume(all(f.size > 1 for dim in labels for f in dim))
    try:
        there = relabel_view(labels, shape)
    except AxisError:
        return
    back = relabel_view(there, [dim_size(d) for d in labels])
    for axis in (BATCH, TOKENS):
        assert torch.equal(entries(back, axis), entries(labels, axis))


@given(factorings())
def test_view_is_refused_only_where_an_axis_would_be_cut(drawn: tuple[Labels, tuple[int, ...]]) -> None:
    """A refusal is right: the result has no labels in which each axis runs along one dimension."""
    labels, shape = drawn
    try:
        relabel_view(labels, shape)
    except AxisError:
        assert any(not _expressible(entries(labels, a).reshape(shape), a, labels) for a in (BATCH, TOKENS))


def _expressible(values: Tensor, axis: Axis, labels: Labels) -> bool:
    """Whether the entries vary as one factor inside one dimension."""
    size = next(f.size for dim in labels for f in dim if f.axis == axis)
    if size == 1:
        return True
    for dim, length in enumerate(values.shape):
        line = values.movedim(dim, 0).reshape(length, -1)
        if length % size or not bool((line == line[:, :1]).all()):
            continue
        first = line[:, 0]
        for inner in (d for d in range(1, length + 1) if length % (size * d) == 0):
            pattern = torch.arange(size).repeat_interleave(inner).repeat(length // (size * inner))
            if torch.equal(first, pattern):
                return True
    return False


def test_heads_fold_into_the_batch_and_out_again() -> None:
    labels = Labels(((Factor(BATCH, 3),), plain(4), (Factor(TOKENS, 5),), plain(8)))
    folded = relabel_view(labels, (12, 5, 8))
    assert [axes_of(d) for d in folded] == [(BATCH,), (TOKENS,), ()]
    assert relabel_view(folded, (3, 4, 5, 8)) == labels


@pytest.mark.parametrize("shape", [(3, 10, 2), (15, 2, 2), (3, 5, 4), (3, 5, 2, 2), (3, 20), (60,)])
def test_views_that_keep_the_tokens_whole_pass(shape: tuple[int, ...]) -> None:
    labels = Labels(((Factor(BATCH, 3),), (Factor(TOKENS, 5),), plain(4)))
    assert tuple(dim_size(d) for d in relabel_view(labels, shape)) == shape


def test_a_view_that_cuts_the_tokens_is_refused() -> None:
    labels = Labels(((Factor(BATCH, 3),), (Factor(TOKENS, 6),), plain(4)))
    for shape in ((3, 2, 3, 4), (6, 3, 4), (9, 2, 4)):
        with pytest.raises(AxisError, match="cuts"):
            relabel_view(labels, shape)


def test_token_axis_of_folded_dimensions_is_refused() -> None:
    assert token_axis((Factor(TOKENS, 5),)) == TOKENS
    assert token_axis((Factor(None, 1), Factor(TOKENS, 5))) == TOKENS
    assert token_axis(plain(4)) is None
    with pytest.raises(AxisError, match="folded"):
        token_axis((Factor(TOKENS, 5), Factor(None, 2)))


def test_unlabelled_shapes_are_plain() -> None:
    for shape in itertools.product((1, 2), repeat=3):
        assert all(is_plain(d) for d in unlabelled(shape))
