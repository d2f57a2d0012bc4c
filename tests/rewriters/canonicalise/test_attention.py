"""Every spelling of attention becomes one node that computes the same; what only looks like attention is left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_spellings import (
    HEAD,
    HEADS,
    LENGTH,
    LOW,
    SPELLINGS,
    SpelledAttention,
    Speller,
    inputs,
    sdpa,
    spelled_case,
)
from masked_oracle import expected, leaves, survivors
from rewritten_models import gap
from torch import Tensor, fx, nn

import madtp
from madtp import PruningConfig
from madtp.calls.call import normalise_call
from rewriters.canonicalise.passes import canonicalise
from rewriters.capture.export import capture
from rewriters.graph.nodes import op_name

pytestmark = pytest.mark.usefixtures("plain_attention")


def canonical(model: nn.Module, call: dict[str, Any]) -> fx.Graph:
    """The canonical graph of a model."""
    graph = capture(model, normalise_call(model, (), call)).graph
    canonicalise(graph)
    return graph


def attentions(graph: fx.Graph) -> list[fx.Node]:
    """Its attention nodes."""
    return [n for n in graph.nodes if n.op == "call_function" and op_name(n) == "attention"]


@pytest.mark.parametrize("name", SPELLINGS)
@torch.no_grad()
def test_spelling_is_recognised_and_pruned_correctly(name: str) -> None:
    torch.manual_seed(0)
    case = spelled_case(name, SPELLINGS[name], sdpa)
    model = case.build()
    pruned = madtp.rewrite(model, case.inputs(3, 0), config=PruningConfig(merge=False, alignment_tokens=4))
    assert [s.name for s in pruned.report.sites] == ["blocks.0", "blocks.1"]
    assert not pruned.report.refusals
    for batch in (1, 2, 4):
        call = case.inputs(batch, 0)
        with pruned.dense():
            assert gap(model(**call), pruned(**call)) < 1e-5
        forced = {"image": [torch.rand(batch, LENGTH) < 0.7 for _ in range(2)]}
        kept = survivors(case, forced, call) if name == "sdpa_causal" else _without_padding(case, forced, call)
        pruned.madtp.control.forced = dict(zip(("blocks.0", "blocks.1"), forced["image"], strict=True))
        found = leaves(pruned(**call))
        pruned.madtp.control.forced = None
        assert gap(expected(case, model, call, kept)[""], found[""]) < 1e-5


def _without_padding(case: Any, forced: dict[str, list[Tensor]], call: dict[str, Tensor]) -> dict[str, list[Tensor]]:
    return survivors(case, {"image": [f & call["mask"] for f in forced["image"]]}, call)


@pytest.mark.parametrize("name", SPELLINGS)
def test_spelling_becomes_one_attention_node(name: str) -> None:
    graph = canonical(Speller(SPELLINGS[name]).eval(), inputs(2, 0))
    assert len(attentions(graph)) == 1
    assert not [n for n in graph.nodes if n.op == "call_function" and "softmax" in op_name(n)]


def wrong_dimension(m: SpelledAttention, x: Tensor, mask: Tensor) -> Tensor:
    q, k, v = m.split(x)
    return m.join((q @ k.mT).softmax(-2) @ v)


def over_channels(m: SpelledAttention, x: Tensor, mask: Tensor) -> Tensor:
    q, k, v = m.split(x)
    return m.join(v @ (q.mT @ k).softmax(-1))


def soft_mask(m: SpelledAttention, x: Tensor, mask: Tensor) -> Tensor:
    q, k, v = m.split(x)
    scores = (q @ k.mT).masked_fill(~mask[:, None, None, :], -3.0)
    return m.join(scores.softmax(-1) @ v)


MISSES = (
    wrong_dimension,
    over_channels,
)


@pytest.mark.parametrize("miss", MISSES, ids=lambda f: f.__name__)
@torch.no_grad()
def test_near_miss_costs_sites_and_never_correctness(miss: Any) -> None:
    torch.manual_seed(0)
    case = spelled_case(miss.__name__, sdpa, miss, sdpa)
    model = case.build()
    call = case.inputs(3, 0)
    pruned = madtp.rewrite(model, call, config=PruningConfig(merge=False, alignment_tokens=4))
    assert [s.name for s in pruned.report.sites] == ["blocks.2"]
    refused = [r for r in pruned.report.refusals if r.block.startswith("blocks.0")]
    assert refused
    assert all(r.reason and r.node and r.help for r in refused)
    with pruned.dense():
        assert gap(model(**call), pruned(**call)) < 1e-5
    wanted = torch.rand(3, LENGTH) < 0.6
    pruned.madtp.control.forced = {"blocks.2": wanted}
    everything = torch.ones_like(wanted)
    kept = {"image": [everything, everything, (wanted & call["mask"]) | case.protected(call)["image"]]}
    assert gap(expected(case, model, call, kept)[""], pruned(**call)) < 1e-5


def test_soft_mask_above_the_hiding_bound_is_no_mask() -> None:
    assert len(attentions(canonical(Speller(soft_mask).eval(), inputs(2, 0)))) == 0


def blind_queries(m: SpelledAttention, x: Tensor, mask: Tensor) -> Tensor:
    q, k, v = m.split(x)
    pairs = mask[:, None, :, None] & mask[:, None, None, :]
    return m.join((q @ k.mT * 0.5).masked_fill(~pairs, LOW).softmax(-1) @ v)


def blind_queries_where(m: SpelledAttention, x: Tensor, mask: Tensor) -> Tensor:
    q, k, v = m.split(x)
    pairs = mask[:, None, :, None] & mask[:, None, None, :]
    return m.join(torch.where(pairs, q @ k.mT * 0.5, -1e9).softmax(-1) @ v)


def blind_queries_by_a_modest_number(m: SpelledAttention, x: Tensor, mask: Tensor) -> Tensor:
    q, k, v = m.split(x)
    pairs = mask[:, None, :, None] & mask[:, None, None, :]
    return m.join((q @ k.mT * 0.5).masked_fill(~pairs, -1e4).softmax(-1) @ v)


def blind_queries_hidden_twice(m: SpelledAttention, x: Tensor, mask: Tensor) -> Tensor:
    q, k, v = m.split(x)
    pairs = mask[:, None, :, None] & mask[:, None, None, :]
    order = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
    return m.join((q @ k.mT * 0.5).masked_fill(~pairs, LOW).masked_fill(~order, LOW).softmax(-1) @ v)


def blind_queries_added_and_filled(m: SpelledAttention, x: Tensor, mask: Tensor) -> Tensor:
    q, k, v = m.split(x)
    pairs = mask[:, None, :, None] & mask[:, None, None, :]
    order = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
    return m.join((q @ k.mT * 0.5 + torch.where(pairs, 0.0, LOW)).masked_fill(~order, LOW).softmax(-1) @ v)


BLIND = (
    blind_queries,
    blind_queries_where,
    blind_queries_by_a_modest_number,
    blind_queries_hidden_twice,
    blind_queries_added_and_filled,
)


@pytest.mark.parametrize("spelling", BLIND, ids=lambda f: f.__name__)
@torch.no_grad()
def test_a_query_that_sees_no_key_weighs_all_alike(spelling: Any) -> None:
    model = Speller(spelling).eval()
    model.forward = lambda x, mask: model.blocks[0](model.embed(x), mask)  # every position, padded ones too
    graph = canonical(model, inputs(3, 0))
    assert len(attentions(graph)) == 1
    call = inputs(3, 0)
    assert gap(model(**call), fx.GraphModule(model, graph)(*call.values())[0]) < 1e-5


class HandsOutMaps(Speller):
    """Returns its attention maps, too."""

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        x = self.embed(x) + self.positions
        maps = []
        for block in self.blocks:
            q, k, v = block.attn.split(block.norm1(x))
            scores = (q @ k.mT * 0.5).masked_fill(~mask[:, None, None, :], LOW)
            maps.append(F.dropout(scores.softmax(-1), 0.1, self.training))
            x = x + block.attn.join(maps[-1] @ v)
            x = x + block.mlp(block.norm2(x))
        return (self.norm(x)[:, 0], *maps)


@torch.no_grad()
def test_attention_maps_that_are_handed_out_keep_their_shape_and_hinder_no_site() -> None:
    torch.manual_seed(0)
    model = HandsOutMaps(SPELLINGS["sdpa"], SPELLINGS["sdpa"]).eval()
    call = inputs(3, 0)
    pruned = madtp.rewrite(model, call, config=PruningConfig(merge=False, alignment_tokens=4))
    assert len(pruned.report.sites) == 2
    with pruned.dense():
        assert all(gap(one, other) < 1e-5 for one, other in zip(model(**call), pruned(**call), strict=True))
    pruned.temperature = 4.0
    found = pruned(**call)
    assert [f.shape for f in found] == [f.shape for f in model(**call)]
    assert gap(found[1], model(**call)[1]) < 1e-5  # nothing was dropped in front of the first map
    assert min(int(counts.min()) for counts in pruned.token_counts().values()) < LENGTH


def folded_with_bias_of_heads(m: SpelledAttention, x: Tensor, mask: Tensor) -> Tensor:
    batch, length, _ = x.shape
    q, k, v = (t.reshape(batch * HEADS, length, HEAD) for t in m.split(x))
    scores = torch.bmm(q, k.transpose(1, 2)).view(batch, HEADS, length, length) * 0.5 + m.bias
    weights = scores.view(batch * HEADS, length, length).softmax(-1)
    return m.join(torch.bmm(weights, v).view(batch, HEADS, length, HEAD))


@pytest.mark.parametrize("batch", [HEADS, HEADS + 1])
@torch.no_grad()
def test_a_bias_of_each_head_is_none_of_each_sample(batch: int) -> None:
    model = Speller(folded_with_bias_of_heads).eval()
    captured = capture(model, normalise_call(model, (), inputs(batch, 0)))
    canonicalise(captured.graph)
    assert len(attentions(captured.graph)) == 1
    call = inputs(batch, 0)
    found = fx.GraphModule(model, captured.graph)(*call.values())[0]
    assert gap(model(**call), found) < 1e-5
