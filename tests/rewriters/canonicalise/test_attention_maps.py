"""Attention that is not a softmax of one product keeps its spelling and is pruned all the same."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_spellings import (
    HEAD,
    HEADS,
    LENGTH,
    LOW,
    WIDTH,
    SpelledAttention,
    Speller,
    inputs,
    sdpa,
    sdpa_causal,
    spelled_case,
)
from masked_oracle import expected, leaves, survivors
from model_case import Case
from rewritten_models import gap
from torch import Tensor, fx, nn

import madtp
from madtp import PruningConfig
from madtp.calls.call import normalise_call
from madtp.errors import NoSiteError
from madtp.tokens.attention_maps import shares, total, weigh
from madtp.tokens.state import TokenState
from rewriters.canonicalise.passes import canonicalise
from rewriters.capture.export import capture
from rewriters.graph.nodes import op_name

pytestmark = pytest.mark.usefixtures("plain_attention")


def hidden(mask: Tensor) -> Tensor:
    return torch.where(mask, 0.0, LOW)[:, None, None, :]


def mixer(m: SpelledAttention) -> Tensor:
    """[H, H]"""
    return m.out.weight[:HEADS, :HEADS] * 3


def talking_heads(m: SpelledAttention, x: Tensor, mask: Tensor) -> Tensor:
    q, k, v = m.split(x)
    scores = F.linear((q @ k.mT).permute(0, 2, 3, 1), mixer(m), m.out.bias[:HEADS]).permute(0, 3, 1, 2) + hidden(mask)
    weights = F.linear(scores.softmax(-1).permute(0, 2, 3, 1), mixer(m).mT).permute(0, 3, 1, 2)
    return m.join(F.dropout(weights, 0.1, m.training) @ v)


def heads_mixed_by_einsum(m: SpelledAttention, x: Tensor, mask: Tensor) -> Tensor:
    q, k, v = m.split(x)
    weights = (torch.einsum("bhqc,bhkc->bhqk", q, k) + hidden(mask)).softmax(-1)
    weights = torch.einsum("bhqk,hg->bgqk", weights, mixer(m))
    return m.join(torch.einsum("bhqk,bhkc->bhqc", weights, v))


def heads_mixed_by_convolution(m: SpelledAttention, x: Tensor, mask: Tensor) -> Tensor:
    q, k, v = m.split(x)
    weights = F.conv2d((q @ k.mT + hidden(mask)).softmax(-1), mixer(m)[:, :, None, None])
    one = m.cos.new_full((HEADS,), 0.7)
    weights = F.batch_norm(weights, one * 0, one, m.strength.flatten())
    return m.join(weights @ v)


def gated_mixture(m: SpelledAttention, x: Tensor, mask: Tensor) -> Tensor:
    """A softmax over content and one over positions, which parameters alone say."""
    q, k, v = m.split(x)
    place = (m.bias[None].expand(x.shape[0], -1, -1, -1) + 0).softmax(-1)
    gate = m.strength.sigmoid()
    weights = (1 - gate) * (q @ k.mT * 0.5 + hidden(mask)).softmax(-1) + gate * place * mask[:, None, None, :]
    return m.join((weights / weights.sum(-1).unsqueeze(-1)) @ v)


def difference(m: SpelledAttention, x: Tensor, mask: Tensor) -> Tensor:
    """Of two maps, so that weights may be negative."""
    q, k, v = m.split(x)
    first, second = ((a @ b.mT + hidden(mask)).softmax(-1, dtype=torch.float32) for a, b in ((q, k), (k, q)))
    return m.join((first - 0.7 * second) @ v)


def folded_and_multiplied(m: SpelledAttention, x: Tensor, mask: Tensor) -> Tensor:
    batch, length, _ = x.shape
    q, k, v = (t.reshape(batch * HEADS, length, HEAD) for t in m.split(x))
    scores = (torch.bmm(q, k.mT).view(batch, HEADS, length, length) + hidden(mask)).view(-1, length, length)
    weights = scores.softmax(-1) * m.bias.repeat(batch, 1, 1)
    return m.join(torch.bmm(weights, v).view(batch, HEADS, length, HEAD))


def multiplied_weights(m: SpelledAttention, x: Tensor, mask: Tensor) -> Tensor:
    q, k, v = m.split(x)
    return m.join(((q @ k.mT * 0.5 + hidden(mask)).softmax(-1) * m.bias) @ v)


def subtracted_from(m: SpelledAttention, x: Tensor, mask: Tensor) -> Tensor:
    q, k, v = m.split(x)
    return m.join((1.0 - q @ k.mT + hidden(mask)).softmax(-1) @ v)


def capped_with_bias(m: SpelledAttention, x: Tensor, mask: Tensor) -> Tensor:
    q, k, v = m.split(x)
    return m.join((2 * torch.tanh((q @ k.mT + m.bias) / 2) + hidden(mask)).softmax(-1) @ v)


def capped_by_head(m: SpelledAttention, x: Tensor, mask: Tensor) -> Tensor:
    q, k, v = m.split(x)
    return m.join(((q @ k.mT).tanh() * m.strength + hidden(mask)).softmax(-1) @ v)


def capped_to_nothing(m: SpelledAttention, x: Tensor, mask: Tensor) -> Tensor:
    q, k, v = m.split(x)
    return m.join(((q @ k.mT).tanh() * 0.0 + hidden(mask)).softmax(-1) @ v)


def soft_mask(m: SpelledAttention, x: Tensor, mask: Tensor) -> Tensor:
    q, k, v = m.split(x)
    scores = (q @ k.mT).masked_fill(m.bias > 0.5, -3.0).masked_fill(~mask[:, None, None, :], LOW)
    return m.join(scores.softmax(-1) @ v)


def two_values(m: SpelledAttention, x: Tensor, mask: Tensor) -> Tensor:
    """One map weighs two values."""
    q, k, v = m.split(x)
    weights = (q @ k.mT).masked_fill(~mask[:, None, None, :], LOW).softmax(-1).square()
    return m.join(weights @ v - weights @ k)


KEPT = (
    talking_heads,
    heads_mixed_by_einsum,
    heads_mixed_by_convolution,
    gated_mixture,
    difference,
    folded_and_multiplied,
    multiplied_weights,
    subtracted_from,
    capped_with_bias,
    capped_by_head,
    capped_to_nothing,
    soft_mask,
    two_values,
)


@cache
def kept_map(spelling: Any) -> tuple[Case, nn.Module, madtp.PrunedModel]:
    """A case of two blocks, its model and what becomes of it."""
    torch.manual_seed(0)
    case = spelled_case(spelling.__name__, spelling, spelling)
    model = case.build()
    return case, model, madtp.rewrite(model, case.inputs(3, 0), config=PruningConfig(merge=False, alignment_tokens=4))


@pytest.mark.parametrize("spelling", KEPT, ids=lambda f: f.__name__)
@torch.no_grad()
def test_kept_map_is_pruned_correctly(spelling: Any) -> None:
    case, model, pruned = kept_map(spelling)
    names = [f"blocks.{layer}" for layer in range(2)]
    assert [s.name for s in pruned.report.sites] == names
    assert not pruned.report.refusals
    for batch in (1, 2, 4):
        call = case.inputs(batch, 0)
        with pruned.dense():
            assert gap(model(**call), pruned(**call)) < 1e-5
        wanted = [torch.rand(batch, LENGTH) < 0.7 for _ in names]
        kept = survivors(case, {"image": [f & call["mask"] for f in wanted]}, call)
        pruned.madtp.control.forced = dict(zip(names, wanted, strict=True))
        found = leaves(pruned(**call))
        pruned.madtp.control.forced = None
        assert gap(expected(case, model, call, kept)[""], found[""]) < 1e-5


@pytest.mark.parametrize("spelling", KEPT, ids=lambda f: f.__name__)
def test_what_a_kept_map_computes_stays_exact_and_trains(spelling: Any) -> None:
    case, model, rewritten = kept_map(spelling)
    call, pruned = case.inputs(3, 0), copy.deepcopy(rewritten)
    pruned.madtp.control.config = replace(pruned.madtp.control.config, merge=True)
    with pruned.dense(), torch.no_grad():
        assert torch.equal(model(**call), pruned(**call))
    pruned.train()
    pruned.temperature = 1.0
    pruned(**call).square().sum().backward()
    used = [p.grad for name, p in pruned.named_parameters() if ".attn.query" in name]
    assert all(grad is not None and bool(grad.isfinite().all()) for grad in used)


def test_padding_and_statistics_are_read_off_the_map() -> None:
    torch.manual_seed(0)
    model = Speller(multiplied_weights).eval()
    call = inputs(3, 0)
    pruned = madtp.rewrite(model, call, config=PruningConfig(alignment_tokens=4))
    pruned.temperature = 4.0
    with torch.no_grad():
        pruned(**call)
    kept = pruned.token_counts()["blocks.0"]
    assert bool((kept <= call["mask"].sum(1)).all())
    assert bool((kept < LENGTH).all())


def causal_map(m: SpelledAttention, x: Tensor, mask: Tensor) -> Tensor:
    """Two masks, both of which it takes to hide later keys."""
    q, k, v = m.split(x)
    order = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
    order[2, 3] = True
    scores = torch.where(order, (q @ k.mT) * m.bias, LOW) + torch.full(order.shape, -1e4, device=x.device).triu(1)
    return m.join(scores.masked_fill(~mask[:, None, None, :], LOW).softmax(-1).square() @ v)


class Sequence(Speller):
    """Returns every position."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.embed(x) + self.positions
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x)


@pytest.mark.parametrize(("spelling", "left"), [(causal_map, True), (soft_mask, False)])
def test_a_causal_map_of_which_every_position_is_read_is_left_alone(spelling: Any, left: bool) -> None:
    torch.manual_seed(0)
    model = Sequence(spelling, sdpa_causal if left else sdpa, spelling).eval()
    config = PruningConfig(alignment_tokens=4)
    if not left:
        assert len(madtp.rewrite(model, inputs(3, 0), config=config).report.sites) == 3
        return
    with pytest.raises(NoSiteError, match="every position is read"):
        madtp.rewrite(model, inputs(3, 0), config=config)


def linear_attention(m: SpelledAttention, x: Tensor, mask: Tensor) -> Tensor:
    """A softmax over channels and one over tokens; no map of queries and keys."""
    q, k, v = m.split(x)
    return m.join(q.softmax(-1) @ (k.softmax(-2).mT @ v))


def read_elsewhere(m: SpelledAttention, x: Tensor, mask: Tensor) -> Tensor:
    q, k, v = m.split(x)
    weights = (q @ k.mT).softmax(-1)
    return m.join((weights * m.bias) @ v) + weights.mean(dim=1).diagonal(dim1=1, dim2=2)[:, :, None]


MISSES = {linear_attention: [2], read_elsewhere: [1, 2]}
"""Blocks that get a site all the same."""


@pytest.mark.parametrize("miss", MISSES, ids=lambda f: f.__name__)
@torch.no_grad()
def test_near_miss_costs_sites_and_never_correctness(miss: Any) -> None:
    torch.manual_seed(0)
    case = spelled_case(miss.__name__, sdpa, miss, sdpa)
    model = case.build()
    call = case.inputs(3, 0)
    pruned = madtp.rewrite(model, call, config=PruningConfig(merge=False, alignment_tokens=4))
    assert [s.name for s in pruned.report.sites] == [f"blocks.{layer}" for layer in MISSES[miss]]
    refused = [r for r in pruned.report.refusals if r.block.startswith("blocks.0")]
    assert refused
    assert all(r.reason and r.node and r.help for r in refused)
    with pruned.dense():
        assert gap(model(**call), pruned(**call)) < 1e-5
    wanted = torch.rand(3, LENGTH) < 0.6
    everything = torch.ones_like(wanted)
    pruned.madtp.control.forced = {f"blocks.{layer}": everything for layer in range(2)} | {"blocks.2": wanted}
    kept = {"image": [everything, everything, (wanted & call["mask"]) | case.protected(call)["image"]]}
    assert gap(expected(case, model, call, kept)[""], pruned(**call)) < 1e-5


class Early(nn.Module):
    """A softmax over parameters is made before there are scores, and read before them, too."""

    def __init__(self, read: bool) -> None:
        super().__init__()
        self.inner, self.read = Speller(sdpa), read
        self.attn = SpelledAttention(sdpa)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        place = self.attn.bias[None].softmax(-1)
        if self.read:
            place = place * 2
        x = self.inner.embed(x)
        q, k, v = self.attn.split(x)
        x = x + self.attn.join(((q @ k.mT).softmax(-1) + place) @ v)
        return self.inner.blocks[0](x, mask)[:, 0]


@pytest.mark.parametrize("read", [False, True])
@torch.no_grad()
def test_a_softmax_over_parameters_is_over_the_keys_that_are_left(read: bool) -> None:
    torch.manual_seed(0)
    model, call = Early(read).eval(), inputs(2, 0)
    graph = capture(model, normalise_call(model, (), call)).graph
    canonicalise(graph)
    names = [op_name(n) for n in graph.nodes if n.op == "call_function"]
    assert names.count("shares") == (0 if read else 2)
    assert gap(model(**call), fx.GraphModule(model, graph)(*call.values())[0]) < 1e-6


def test_keys_that_are_padding_take_no_part() -> None:
    state = TokenState(
        full_length=3,
        length=2,
        batch=2,
        index=torch.tensor([[0, 2], [1, 0]]),
        valid=torch.tensor([[True, True], [True, False]]),
    )
    scores, values = torch.randn(2, HEADS, 2, 2), torch.randn(2, HEADS, 2, WIDTH)
    weights = shares(scores, None, state)
    assert torch.equal(weights[0], scores[0].softmax(-1))
    assert torch.equal(weights[1], torch.tensor([1.0, 0.0]).expand(HEADS, 2, 2))
    assert torch.equal(total(scores, True, state)[1], scores[1, :, :, :1])
    assert torch.allclose(weigh(scores, values, state)[1], scores[1, :, :, :1] * values[1, :, :1])
    folded = shares(scores.flatten(0, 1), torch.float64, state)
    assert folded.dtype == torch.float64
    assert torch.allclose(folded.view_as(scores).float(), weights)
    assert not shares(scores.masked_fill(torch.tensor([True, False]), float("-inf")), None, state)[1].any()
