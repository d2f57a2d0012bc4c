"""What has to hold of importance, threshold, selection and merging for any input: one property a test."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from selecting import select
from torch import Tensor

from madtp.config import PruningConfig
from madtp.errors import ConfigError
from madtp.method.arrays import on_host
from madtp.method.importance import (
    AttentionStatistics,
    ImportanceTerms,
    attention_statistics,
    best_of,
    importance_terms,
)
from madtp.method.merging import merge_weights, merged_position, merged_token
from madtp.method.scorers import SCORERS, Evidence
from madtp.method.selection import candidates_of, survivor_order
from madtp.method.threshold import keep_mask, straight_through_gate, threshold

WIDTH, HEADS, KINDS = 8, 2, 5
OURS = PruningConfig()


@dataclass(frozen=True)
class Layer:
    """One layer's inputs: token 0 is the class token, padding stands last."""

    tokens: Tensor
    probabilities: Tensor
    output: Tensor
    guidance: Tensor
    valid: Tensor

    @property
    def protected(self) -> Tensor:
        return (torch.arange(self.valid.shape[1]) == 0).expand_as(self.valid)

    @property
    def candidates(self) -> Tensor:
        return candidates_of(self.valid, self.protected, OURS)

    def statistics(self) -> AttentionStatistics:
        return attention_statistics(self.probabilities, self.output, self.candidates, 0)

    def terms(self, config: PruningConfig = OURS) -> ImportanceTerms:
        return importance_terms(self.statistics(), best_of(self.guidance), self.candidates, config)

    def take(self, order: Tensor) -> Layer:
        """The layer with its tokens in another order, the same for every sample."""
        attention = self.probabilities[:, :, order][:, :, :, order]
        return Layer(
            self.tokens[:, order], attention, self.output[:, :, order], self.guidance[:, order], self.valid[:, order]
        )

    def sample(self, index: int, length: int) -> Layer:
        """One sample alone, cut to its first ``length`` tokens."""
        row = slice(index, index + 1)
        return Layer(
            self.tokens[row, :length],
            self.probabilities[row, :, :length, :length],
            self.output[row, :, :length],
            self.guidance[row, :length],
            self.valid[row, :length],
        )


@st.composite
def layers(draw: st.DrawFn, min_tokens: int = 1) -> Layer:
    lengths = draw(st.lists(st.integers(min_tokens, 9), min_size=1, max_size=4))
    count = max(lengths) + draw(st.integers(0, 2)) + 1
    torch.manual_seed(draw(st.integers(0, 10_000)))
    scale = draw(st.sampled_from([0.1, 1.0, 10.0]))
    batch = len(lengths)
    valid = torch.arange(count) < torch.tensor(lengths)[:, None] + 1
    logits = scale * torch.randn(batch, HEADS, count, count)
    probabilities = logits.masked_fill(~valid[:, None, None], float("-inf")).softmax(-1)
    tokens = torch.randn(batch, count, WIDTH)
    output = probabilities @ torch.randn(batch, HEADS, count, WIDTH // HEADS)
    return Layer(tokens, probabilities, output, scale * torch.randn(batch, count, KINDS), valid)


TEMPERATURES = st.floats(0.05, 50.0)
GAINS = st.floats(0.0, 3.0)


def _decide(layer: Layer, config: PruningConfig, temperature: float, gain: float) -> tuple[Tensor, Tensor, Tensor]:
    terms = layer.terms(config)
    theta = threshold(layer.guidance, terms.mean(), layer.candidates, temperature)
    kept = select(terms, theta, layer.candidates, config, gain=gain)
    return terms.mean(), theta, kept


@given(layers(), st.booleans())
def test_terms_sum_to_one_over_candidates_and_vanish_elsewhere(layer: Layer, class_token: bool) -> None:
    statistics = layer.statistics() if class_token else replace(layer.statistics(), class_attention=None)
    terms = importance_terms(statistics, best_of(layer.guidance), layer.candidates, OURS)
    assert (terms.class_attention is not None) == class_token
    for term in (*terms.present(), terms.mean()):
        torch.testing.assert_close(term.sum(1), torch.ones(len(term)))
        assert bool((term >= 0).all())
        assert bool((term[~layer.candidates] == 0).all())


@given(layers(), st.floats(0.5, 1000.0), st.floats(-50.0, 50.0))
def test_the_scale_of_the_residual_stream_leaves_the_alignment_term_alone(
    layer: Layer, scale: float, shift: float
) -> None:
    grown = importance_terms(
        layer.statistics(), best_of(layer.guidance * scale + shift), layer.candidates, OURS
    ).alignment
    torch.testing.assert_close(grown, layer.terms().alignment, atol=2e-3, rtol=2e-3)


@given(layers(), st.booleans(), st.sampled_from([OURS, PruningConfig.official()]))
def test_arrays_on_the_host_give_what_tensors_give(layer: Layer, padded: bool, config: PruningConfig) -> None:
    statistics, best = layer.statistics(), best_of(layer.guidance)
    candidates = layer.candidates if padded else None
    wanted = importance_terms(statistics, best, candidates, config)
    on_arrays = AttentionStatistics(on_host(statistics.received), on_host(statistics.class_attention))
    found = importance_terms(on_arrays, on_host(best), None if candidates is None else on_host(candidates), config)
    for one, other in zip(found.present(), wanted.present(), strict=True):
        assert one.dtype == np.float32
        torch.testing.assert_close(torch.from_numpy(one), other)
    for name in ("importance", "class_attention", "random", "class_token_attention", "last_token_attention"):
        ranked = SCORERS[name].score(Evidence(found, found.mean()), config)
        # The random control is a hash, which rounding changes.
        importance = torch.from_numpy(found.mean()) if name == "random" else wanted.mean()
        same = SCORERS[name].score(Evidence(wanted, importance), config)
        torch.testing.assert_close(torch.from_numpy(ranked), same)


def test_equal_guidance_gives_equal_shares_whatever_the_rounding() -> None:
    guidance = torch.full((1, 5, 2), 7.0)
    guidance[0, 2] += 1e-6
    statistics = AttentionStatistics(torch.ones(1, 5), None)
    candidates = torch.tensor([[False, True, True, True, True]])
    terms = importance_terms(statistics, best_of(guidance), candidates, OURS)
    assert terms.alignment is not None
    assert terms.alignment.tolist() == [[0.0, 0.25, 0.25, 0.25, 0.25]]


@given(layers(), st.data())
def test_importance_moves_with_the_tokens(layer: Layer, data: st.DataObject) -> None:
    count = layer.valid.shape[1]
    order = torch.tensor([0, *data.draw(st.permutations(range(1, count)))])
    torch.testing.assert_close(layer.take(order).terms().mean(), layer.terms().mean()[:, order])


@given(layers(), TEMPERATURES, GAINS)
def test_batch_mates_and_padding_change_nothing(layer: Layer, temperature: float, gain: float) -> None:
    scores, theta, kept = _decide(layer, OURS, temperature, gain)
    for index, length in enumerate(layer.valid.sum(1).tolist()):
        alone_scores, alone_theta, alone_kept = _decide(layer.sample(index, length), OURS, temperature, gain)
        torch.testing.assert_close(alone_scores[0], scores[index, :length])
        torch.testing.assert_close(alone_theta[0], theta[index])
        undecided = (scores[index, :length] - gain * theta[index]).abs() < 1e-6
        if not bool(undecided.any()):
            assert torch.equal(alone_kept[0], kept[index, :length])
        assert not bool(kept[index, length:].any())


@given(layers(), TEMPERATURES)
def test_threshold_lies_between_smallest_and_largest_importance(layer: Layer, temperature: float) -> None:
    scores = layer.terms().mean()
    theta = threshold(layer.guidance, scores, layer.candidates, temperature)
    assert bool((theta >= scores.masked_fill(~layer.candidates, math.inf).amin(1) - 1e-6).all())
    assert bool((theta <= scores.amax(1) + 1e-6).all())


@given(layers())
def test_threshold_at_the_limits_of_temperature(layer: Layer) -> None:
    scores = layer.terms().mean()
    mean = threshold(None, scores, layer.candidates, 1.0)
    torch.testing.assert_close(mean, 1.0 / layer.candidates.sum(1))
    torch.testing.assert_close(threshold(layer.guidance, scores, layer.candidates, 1e6), mean, rtol=1e-4, atol=1e-6)
    liked = layer.guidance.masked_fill(~layer.candidates[..., None], -math.inf).argmax(1)
    coldest = scores.gather(1, liked).amin(1)
    torch.testing.assert_close(threshold(layer.guidance, scores, layer.candidates, 1e-12), coldest)


@given(layers(), TEMPERATURES, GAINS, GAINS, st.integers(0, 3), st.sampled_from(["ragged", "uniform"]))
def test_counts_do_not_rise_with_gain(
    layer: Layer, temperature: float, one: float, other: float, least: int, batching: str
) -> None:
    config = replace(OURS, min_tokens=least, batching=batching)
    few = _decide(layer, config, temperature, max(one, other))[2]
    many = _decide(layer, config, temperature, min(one, other))[2]
    assert bool((few.sum(1) <= many.sum(1)).all())


@given(layers(), TEMPERATURES, GAINS, st.integers(0, 4), st.booleans(), st.data())
def test_minimum_survives_and_no_single_token_is_merged(
    layer: Layer, temperature: float, gain: float, least: int, merge: bool, data: st.DataObject
) -> None:
    selection = data.draw(st.sampled_from(["threshold", "random", "class_attention"]))
    batching = data.draw(st.sampled_from(["ragged", "uniform"]))
    config = replace(OURS, min_tokens=least, merge=merge, selection=selection, batching=batching)
    kept = _decide(layer, config, temperature, gain)[2]
    total = layer.candidates.sum(1)
    assert bool((kept <= layer.candidates).all())
    assert bool((kept.sum(1) >= total.clamp_max(least)).all())
    if merge:
        assert 1 not in (total - kept.sum(1)).tolist()


@given(layers(), TEMPERATURES)
def test_gain_zero_keeps_everything(layer: Layer, temperature: float) -> None:
    assert torch.equal(_decide(layer, OURS, temperature, 0.0)[2], layer.candidates)


@given(layers(), TEMPERATURES, GAINS)
def test_uniform_gives_every_sample_its_own_best_of_the_largest_count(
    layer: Layer, temperature: float, gain: float
) -> None:
    scores, theta, kept = _decide(layer, replace(OURS, batching="uniform", merge=False), temperature, gain)
    own = torch.from_numpy(keep_mask(scores.numpy(), theta.numpy(), gain, layer.candidates.numpy(), smallest_drop=1))
    assert torch.equal(kept.sum(1), own.sum(1).amax().expand(len(kept)).minimum(layer.candidates.sum(1)))
    for row, keep, candidate in zip(scores, kept, layer.candidates, strict=True):
        dropped = row[candidate & ~keep]
        if len(dropped) and bool(keep.any()):
            assert row[keep].min() >= dropped.max()


@given(layers(), TEMPERATURES, GAINS, st.sampled_from(["random", "class_attention"]))
def test_controls_keep_as_many_tokens_as_the_method(layer: Layer, temperature: float, gain: float, name: str) -> None:
    method = _decide(layer, OURS, temperature, gain)[2]
    control = _decide(layer, replace(OURS, selection=name), temperature, gain)[2]
    assert torch.equal(control.sum(1), method.sum(1))


@given(layers(min_tokens=4), st.floats(0.1, 1.0), st.sampled_from(["random", "class_attention"]))
def test_controls_keep_the_asked_ratio(layer: Layer, ratio: float, name: str) -> None:
    config = replace(OURS, selection=name, keep_ratio=ratio, merge=False)
    kept = _decide(layer, config, 1.0, 1.0)[2]
    wanted = [max(1, math.ceil(torch.tensor(ratio).mul(total).item())) for total in layer.candidates.sum(1).tolist()]
    assert kept.sum(1).tolist() == wanted


@given(layers(), TEMPERATURES, GAINS)
def test_merge_weights_sum_to_one_over_the_dropped(layer: Layer, temperature: float, gain: float) -> None:
    scores, _, kept = _decide(layer, OURS, temperature, gain)
    dropped = layer.candidates & ~kept
    weights = merge_weights(scores, dropped)
    torch.testing.assert_close(weights.sum(1), dropped.any(1).float())
    assert bool((weights[~dropped] == 0).all())
    merged = merged_token(layer.tokens, weights).squeeze(1)
    for row, drop, vector in zip(layer.tokens, dropped, merged, strict=True):
        if bool(drop.any()):
            assert bool((vector <= row[drop].amax(0) + 1e-5).all())
            assert bool((vector >= row[drop].amin(0) - 1e-5).all())
        else:
            assert bool((vector == 0).all())


@given(layers(), TEMPERATURES, GAINS, st.sampled_from(["position", "topk"]))
def test_survivors_come_first_and_every_token_once(layer: Layer, temperature: float, gain: float, rule: str) -> None:
    scores, _, kept = _decide(layer, OURS, temperature, gain)
    survivors = kept | layer.protected
    order = survivor_order(survivors, scores, layer.candidates, rule)  # type: ignore[arg-type]
    assert torch.equal(order.sort(1).values, torch.arange(order.shape[1]).expand_as(order))
    for row, survivor in zip(order, survivors, strict=True):
        count = int(survivor.sum())
        assert bool(survivor[row[:count]].all())
        assert row[0] == 0
        if rule == "position":
            assert row[:count].tolist() == sorted(row[:count].tolist())


@pytest.mark.parametrize(("rule", "position", "valid"), [("any", 1, True), ("best", 2, False)])
def test_merged_token_of_content_and_padding(rule: str, position: int, valid: bool) -> None:
    scores = torch.tensor([[0.0, 0.2, 0.3, 0.5]])
    dropped = torch.tensor([[False, True, True, False]])
    seen = torch.tensor([[True, True, False, True]])
    where, is_valid = merged_position(scores, dropped, seen, rule)  # type: ignore[arg-type]
    assert where.tolist() == [position]
    assert is_valid.tolist() == [valid]


def test_a_sample_of_nothing_but_padding_is_harmless() -> None:
    torch.manual_seed(0)
    candidates = torch.tensor([[False, True, True, True], [False] * 4])
    statistics = AttentionStatistics(torch.rand(2, 4), torch.zeros(2, 4))
    for config in (OURS, PruningConfig.official()):
        terms = importance_terms(statistics, torch.randn(2, 4), candidates, config)
        theta = threshold(torch.randn(2, 4, KINDS), terms.mean(), candidates, 1.0)
        kept = select(terms, theta, candidates, config, gain=1.0)
        weights = merge_weights(terms.mean(), candidates & ~kept)
        assert bool(torch.isfinite(torch.cat([terms.mean(), weights, theta[:, None]], 1)).all())
        assert not bool(kept[1].any())
        assert float(theta[1]) == 0.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_inputs_are_judged_in_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    candidates = torch.ones(2, 600, dtype=torch.bool)
    received, seen = torch.rand(2, 600), torch.rand(2, 600)
    guidance = 30 * torch.randn(2, 600, KINDS)
    low = AttentionStatistics(received.to(dtype), seen.to(dtype))
    terms = importance_terms(low, best_of(guidance.to(dtype)), candidates, OURS)
    theta = threshold(guidance.to(dtype), terms.mean(), candidates, 1.0)
    assert terms.mean().dtype == theta.dtype == torch.float32
    torch.testing.assert_close(terms.mean().sum(1), torch.ones(2))
    assert bool((theta > 0).all())


def test_gradients_reach_scores_by_merging_and_guidance_by_the_gate() -> None:
    torch.manual_seed(0)
    candidates = torch.ones(1, 6, dtype=torch.bool)
    guidance = torch.randn(1, 6, KINDS, requires_grad=True)
    statistics = AttentionStatistics(torch.rand(1, 6), torch.rand(1, 6))
    scores = importance_terms(statistics, best_of(guidance), candidates, OURS).mean()
    theta = threshold(guidance, scores, candidates, 4.0)
    kept = torch.from_numpy(keep_mask(on_host(scores), on_host(theta), 1.1, None))
    tokens = torch.randn(1, 6, WIDTH)
    (by_merging,) = torch.autograd.grad(
        merged_token(tokens, merge_weights(scores, ~kept)).sum(), guidance, retain_graph=True
    )
    gate = straight_through_gate(scores, theta, 1.1, kept)
    assert torch.equal(gate.detach(), kept.float())
    (by_gate,) = torch.autograd.grad((gate * tokens.sum(-1)).sum(), guidance)
    assert bool(by_merging.any())
    assert bool(by_gate.any())


def test_random_control_draws_by_seed_and_sample() -> None:
    torch.manual_seed(0)
    candidates = torch.ones(2, 40, dtype=torch.bool)
    scores = torch.rand(2, 40)
    terms = ImportanceTerms(scores, None, None)

    def draw(seed: int) -> Tensor:
        config = PruningConfig(selection="random", keep_ratio=0.5, seed=seed)
        return select(terms, torch.zeros(2), candidates, config, gain=1.0)

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert not torch.equal(draw(1)[0], draw(1)[1])
    assert draw(1).sum(1).tolist() == [20, 20]


def test_selection_refuses_what_it_cannot_do() -> None:
    scores, candidates = torch.rand(1, 4), torch.ones(1, 4, dtype=torch.bool)
    terms = ImportanceTerms(scores, None, None)
    config = PruningConfig(selection="class_attention", keep_ratio=0.5)
    with pytest.raises(ConfigError, match="needs a class token"):
        select(terms, torch.zeros(1), candidates, config, gain=1.0)
    with pytest.raises(ConfigError, match=r"needs counts for each site.*madtp\.freeze"):
        select(terms, torch.zeros(1), candidates, PruningConfig(batching="static"), gain=1.0)


def test_scores_of_tokens_that_are_all_alike_have_gradients() -> None:
    guidance = torch.ones(2, 6, KINDS, requires_grad=True)
    probabilities = torch.full((2, HEADS, 6, 6), 1 / 6)
    statistics = attention_statistics(probabilities, torch.ones(2, HEADS, 6, WIDTH), torch.ones(2, 6).bool(), None)
    terms = importance_terms(statistics, best_of(guidance), torch.ones(2, 6).bool(), OURS)
    assert terms.alignment is not None
    assert torch.equal(terms.alignment.detach(), torch.full((2, 6), 1 / 6))
    (terms.alignment * torch.arange(6.0)).sum().backward()
    assert guidance.grad is not None
    assert bool(guidance.grad.isfinite().all())


@pytest.mark.parametrize("padding", range(12))
def test_of_equal_tokens_the_first_survives_whatever_the_batch_is_padded_to(padding: int) -> None:
    candidates = torch.tensor([[False, True, True, True] + [False] * padding])
    scores = torch.tensor([[0.0, 0.2, 0.4, 0.4] + [0.0] * padding])
    kept = keep_mask(scores, torch.tensor([0.4]), 1.0, candidates)
    assert kept.nonzero().tolist() == [[0, 2]]
