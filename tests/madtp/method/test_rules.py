"""Rules of methods that need no training, against plain re-implementations of their papers' formulas."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from madtp.config import RULES, PruningConfig
from madtp.errors import ConfigError
from madtp.method.diversity import determinantal_order, distinct_values, max_min_order, relevance_to, similarities
from madtp.method.parts import parts_of

SIZES = st.tuples(st.integers(2, 9), st.integers(2, 6), st.integers(0, 99))


def features(count: int, width: int, seed: int) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def cosine(one: Tensor, other: Tensor) -> float:
    return float(one.double() @ other.double() / (one.double().norm() * other.double().norm()))


@given(SIZES)
def test_max_min_diversity_picks_the_farthest_token(sizes: tuple[int, int, int]) -> None:
    x = features(*sizes)
    count = len(x)
    distance = [[1 - cosine(x[i], x[j]) for j in range(count)] for i in range(count)]
    alone = [min(distance[i][j] for j in range(count) if j != i) for i in range(count)]
    order = max_min_order(similarities(x), count)
    assert alone[order[0]] == pytest.approx(max(alone), abs=1e-5)
    picked = [int(order[0])]  # two tokens may be each other's nearest
    while len(picked) < count:
        left = [i for i in range(count) if i not in picked]
        picked.append(max(left, key=lambda i: min(distance[i][j] for j in picked)))
    assert sorted(order) == list(range(count))
    nearest = [min(distance[order[at]][j] for j in order[:at]) for at in range(1, count)]
    wanted = [min(distance[picked[at]][j] for j in picked[:at]) for at in range(1, count)]
    assert nearest == pytest.approx(wanted, abs=1e-5)


@given(SIZES, st.integers(1, 4))
def test_the_determinantal_rule_adds_the_token_that_enlarges_the_determinant_most(
    sizes: tuple[int, int, int], count: int
) -> None:
    x = features(*sizes)
    count = min(count, len(x), x.shape[1] - 1)  # beyond the width, determinants vanish
    relevance = relevance_to(x, features(1, x.shape[1], sizes[2] + 1)[0])
    kernel = np.diag(relevance) @ similarities(x) @ np.diag(relevance)
    order = determinantal_order(similarities(x), relevance, count)
    assert len(set(order.tolist())) == count
    for at in range(count):
        volumes = {
            token: np.linalg.det(kernel[np.ix_([*order[:at], token], [*order[:at], token])])
            for token in range(len(x))
            if token not in order[:at]
        }
        assert volumes[order[at]] == pytest.approx(max(volumes.values()), rel=1e-4, abs=1e-9)


@given(SIZES)
def test_a_distinct_token_counts_by_its_distance_to_those_that_count_more(sizes: tuple[int, int, int]) -> None:
    x = features(*sizes)
    count = len(x)
    weight = torch.rand(count, generator=torch.Generator().manual_seed(sizes[2])).double().numpy() + 0.1
    distance = [[1 - cosine(x[i], x[j]) for j in range(count)] for i in range(count)]
    farthest = max(max(row) for row in distance)
    picked: list[int] = []
    wanted = []
    while len(picked) < count:
        left = {
            i: weight[i] * min([farthest, *(distance[i][j] for j in picked)]) for i in range(count) if i not in picked
        }
        picked.append(max(left, key=lambda i: left[i]))
        wanted.append(left[picked[-1]])
    values = distinct_values(similarities(x), weight)
    assert np.sort(values)[::-1] == pytest.approx(np.minimum.accumulate(wanted), abs=1e-5)
    for at, limit in enumerate(wanted):  # two values may differ by rounding
        if at + 1 < count and wanted[at + 1] < limit - 1e-4:
            assert set(np.flatnonzero(values > limit - 5e-5)) == set(picked[: at + 1])


def test_a_token_that_is_like_another_counts_for_nothing() -> None:
    x = torch.eye(3)[[0, 0, 1, 2]]
    values = distinct_values(similarities(x), np.array([2.0, 1.0, 1.0, 0.5]))
    assert values.tolist() == [2.0, 0.0, 1.0, 0.5]
    assert distinct_values(similarities(x[:0]), np.zeros(0)).tolist() == []
    assert distinct_values(similarities(x[:1]), np.ones(1)).tolist() == [0.0], "it is kept as the best"


def test_what_is_distinct_decides_its_counts_itself() -> None:
    with pytest.raises(ConfigError, match="decides the counts itself"):
        PruningConfig(selection="distinct", keep_ratio=0.5)
    config = PruningConfig(selection="distinct")
    assert config.merge
    assert parts_of(config).needs.importance
    assert parts_of(config).needs.features


def test_alike_tokens_are_kept_once() -> None:
    x = torch.eye(4)[[0, 0, 1, 2, 3, 3]]
    for order in (max_min_order(similarities(x), 4), determinantal_order(similarities(x), np.ones(6), 4)):
        assert {tuple(x[at].tolist()) for at in order} == {tuple(row.tolist()) for row in torch.eye(4)}
    assert sorted(determinantal_order(similarities(x), np.ones(6), 6)) == list(range(6)), "then the rest follow"


def test_relevance_is_the_scaled_cosine_with_the_text() -> None:
    x, text = features(5, 4, 0), features(1, 4, 1)[0]
    found = relevance_to(x, text)
    wanted = np.array([cosine(row, text) for row in x])
    assert found == pytest.approx((wanted - wanted.min()) / (wanted.max() - wanted.min()), abs=1e-5)
    assert relevance_to(x, None).tolist() == [1.0] * 5
    assert relevance_to(x[:1], text).tolist() == [1.0]


@pytest.mark.parametrize("selection", RULES)
def test_rules_keep_a_share_and_compute_no_importance(selection: str) -> None:
    config = PruningConfig(selection=selection, keep_ratio=0.25)
    assert not config.merge
    needs = parts_of(config).needs
    assert not any((needs.importance, needs.received, needs.guidance))
    with pytest.raises(ConfigError, match="give keep_ratio"):
        PruningConfig(selection=selection)
    assert PruningConfig.from_dict(config.to_dict()) == config
    assert PruningConfig().merge, "the method merges"


def test_every_selection_has_its_parts() -> None:
    for selection, merge in itertools.product(("random", "class_attention", *RULES), (True, False)):
        assert parts_of(PruningConfig(selection=selection, keep_ratio=0.5, merge=merge)).reducer.merges == merge
