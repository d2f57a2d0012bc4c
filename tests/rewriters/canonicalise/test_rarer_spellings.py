"""Attention spelled in rarer ways: recognised, and pruned like the original in which dropped tokens are masked."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from attention_spellings import HEAD, HEADS, LENGTH, LOW, WIDTH, SpelledAttention, Speller, Spelling, inputs, sdpa
from model_case import lively
from rewritten_models import gap
from torch import Tensor, einsum, nn

import madtp
from madtp import PruningConfig
from madtp.calls.call import normalise_call
from rewriters.canonicalise.passes import canonicalise
from rewriters.capture.export import capture
from rewriters.graph.nodes import op_name

pytestmark = pytest.mark.usefixtures("plain_attention")


def scores_of(m: SpelledAttention, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Scores ``[B, H, Q, K]`` with hidden keys at minus infinity, and values."""
    q, k, v = m.split(x)
    return (q @ k.mT * 0.5).masked_fill(~mask[:, None, None, :], float("-inf")), v


def low(mask: Tensor) -> Tensor:
    """An additive mask ``[B, N]``."""
    return torch.where(mask, 0.0, LOW)


def one_key_head(m: SpelledAttention, x: Tensor, mask: Tensor) -> Tensor:
    (q, _, _), (k, v) = m.split(x), m.fewer(x).chunk(2, -1)
    scores = einsum("bhid,bjd->bhij", q * 0.5, k) + low(mask)[:, None, None, :]
    return m.join(einsum("bhij,bjd->bhid", scores.softmax(-1), v))


def one_key_head_first(m: SpelledAttention, x: Tensor, mask: Tensor) -> Tensor:
    """Keys are the first factor, and heads stand behind tokens."""
    (q, _, _), (k, v) = m.split(x), m.fewer(x).chunk(2, -1)
    scores = einsum("bjd,bihd->bhij", k, q.transpose(1, 2)) * 0.5 + low(mask)[:, None, None, :]
    weights = F.dropout(scores.softmax(-1), 0.1, m.training)
    return m.out(einsum("bhij,bjd->bihd", weights, v).flatten(2))


def five_dimensions(m: SpelledAttention, x: Tensor, mask: Tensor) -> Tensor:
    q, k, v = (t.unsqueeze(2) for t in m.split(x))
    scores = einsum("...id,...jd->...ij", q, k) * 0.5
    weights = scores.masked_fill(~mask[:, None, None, None, :], LOW).softmax(-1)
    return m.join(einsum("...ij,...jd->...id", weights, v).squeeze(2))


def five_dimensions_fused(m: SpelledAttention, x: Tensor, mask: Tensor) -> Tensor:
    q, k, v = (t.unsqueeze(1) for t in m.split(x))
    return m.join(F.scaled_dot_product_attention(q, k, v, mask[:, None, None, None, :]).squeeze(1))


def five_dimensions_of_frames(m: SpelledAttention, x: Tensor, mask: Tensor) -> Tensor:
    shape = (x.shape[0], 1, x.shape[1], HEADS, HEAD)
    q, k, v = (f(x).view(shape).permute(0, 3, 1, 2, 4) for f in (m.query, m.key, m.value))
    return m.join(((q @ k.mT * 0.5 + low(mask)[:, None, None, None, :]).softmax(-1) @ v).squeeze(2))


def exponentials(m: SpelledAttention, x: Tensor, mask: Tensor) -> Tensor:
    scores, v = scores_of(m, x, mask)
    weights = scores.exp()
    return m.join(weights / weights.sum(-1, keepdim=True) @ v)


def exponentials_shifted(m: SpelledAttention, x: Tensor, mask: Tensor) -> Tensor:
    scores, v = scores_of(m, x, mask)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return m.join(weights.sum(-1)[..., None].reciprocal() * weights @ v)


def logarithm_of_the_sum(m: SpelledAttention, x: Tensor, mask: Tensor) -> Tensor:
    scores, v = scores_of(m, x, mask)
    return m.join((scores - scores.logsumexp(-1, keepdim=True)).exp() @ v)


def off_by_one(m: SpelledAttention, x: Tensor, mask: Tensor) -> Tensor:
    scores, v = scores_of(m, x, mask)
    return m.join(scores.exp() / (1 + scores.exp().sum(-1, keepdim=True)) @ v)


def off_by_one_shifted(m: SpelledAttention, x: Tensor, mask: Tensor) -> Tensor:
    scores, v = scores_of(m, x, mask)
    top = scores.amax(-1, keepdim=True).clamp(min=0)
    weights = (scores - top).exp()
    return m.join(weights / ((-top).exp() + weights.sum(-1, keepdim=True)) @ v)


def transposed_scores(m: SpelledAttention, x: Tensor, mask: Tensor) -> Tensor:
    q, k, v = m.split(x)
    scores = (k @ q.mT * 0.5).masked_fill(~mask[:, None, :, None], LOW)
    return m.join(scores.softmax(-2).transpose(-2, -1) @ v)


def transposed_in_einsum(m: SpelledAttention, x: Tensor, mask: Tensor) -> Tensor:
    q, k, v = m.split(x)
    scores = low(mask)[:, None, :, None] + einsum("bhjd,bhid->bhji", k, q) / 2
    return m.join(einsum("bhji,bhjd->bhid", F.dropout(scores.softmax(2), 0.1, m.training), v))


def with_memory(m: SpelledAttention, x: Tensor, mask: Tensor) -> Tensor:
    q, k, v = m.split(x)
    learned = m.bias[:, :3, :HEAD].expand(x.shape[0], -1, -1, -1)
    seen = torch.cat([mask, mask.new_ones(x.shape[0], 3)], 1)
    k, v = torch.cat([k, learned], 2), torch.cat([v, 2 * learned], 2)
    return m.join(F.scaled_dot_product_attention(q, k, v, seen[:, None, None, :]))


def with_memory_first(m: SpelledAttention, x: Tensor, mask: Tensor) -> Tensor:
    q, k, v = m.split(x)
    learned = m.bias[None, :, :3, :HEAD].repeat(x.shape[0], 1, 1, 1)
    seen = torch.cat([mask.new_ones(x.shape[0], 3), mask], 1)
    k, v = torch.cat([learned, k], 2), torch.cat([learned.exp(), v], 2)
    return m.join((q @ k.mT * 0.5).masked_fill(~seen[:, None, None, :], LOW).softmax(-1) @ v)


def with_zeros(m: SpelledAttention, x: Tensor, mask: Tensor) -> Tensor:
    """As torch.nn.MultiheadAttention does: heads are folded into the batch where a zero key and value are added."""
    batch, length, _ = x.shape
    q, k, v = (t.reshape(batch * HEADS, length, HEAD) for t in m.split(x))
    k, v = (torch.cat([t, t.new_zeros(batch * HEADS, 1, HEAD)], 1) for t in (k, v))
    hide = F.pad(low(mask), (0, 1))[:, None, None, :].expand(-1, HEADS, -1, -1).reshape(batch * HEADS, 1, length + 1)
    return m.join((torch.baddbmm(hide, q, k.mT, alpha=0.5).softmax(-1) @ v).view(batch, HEADS, length, HEAD))


SPELLINGS: tuple[Spelling, ...] = (
    one_key_head,
    five_dimensions,
    exponentials,
    one_key_head_first,
    five_dimensions_fused,
    exponentials_shifted,
    five_dimensions_of_frames,
    logarithm_of_the_sum,
    off_by_one,
    transposed_scores,
    with_memory,
    off_by_one_shifted,
    transposed_in_einsum,
    with_memory_first,
    with_zeros,
)
# Their map keeps its spelling.
MAPS = (off_by_one, off_by_one_shifted)
# A few spellings a model: most of the time of a test is its capture.
GROUPS = [SPELLINGS[n : n + 3] for n in range(0, len(SPELLINGS), 3)]


class Hiding(Speller):
    """hidden: by block, tokens ``[B, N]`` that its attention must not see."""

    hidden: tuple[Tensor, ...] = ()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.embed(x) + self.positions
        for number, block in enumerate(self.blocks):
            x = block(x, mask & ~self.hidden[number] if self.hidden else mask)
        return self.norm(x)[:, 0]


@pytest.mark.parametrize("spellings", GROUPS, ids=lambda group: "-".join(f.__name__ for f in group))
@torch.no_grad()
def test_spellings_are_recognised_and_pruned_correctly(spellings: tuple[Spelling, ...]) -> None:
    torch.manual_seed(0)
    model = lively(Hiding(sdpa, *spellings))
    assert isinstance(model, Hiding)
    pruned = madtp.rewrite(model, inputs(3, 0), config=PruningConfig(merge=False, alignment_tokens=4))
    names = [site.name for site in pruned.report.sites]
    assert names == [f"blocks.{number}" for number in range(4)]
    assert not pruned.report.refusals
    for batch in (1, 4):
        call = inputs(batch, 0)
        with pruned.dense():
            assert gap(model(**call), pruned(**call)) < 1e-5
        kept, seen = [], call["mask"]
        for _ in names:
            seen = seen & ((torch.rand(batch, LENGTH) < 0.8) | (torch.arange(LENGTH) == 0))
            kept.append(seen)
        pruned.madtp.control.forced = dict(zip(names, kept, strict=True))
        found = pruned(**call)
        pruned.madtp.control.forced = None
        model.hidden = (torch.zeros_like(seen), *(~k for k in kept[:-1]))
        assert gap(model(**call), found) < 1e-5
        model.hidden = ()


@pytest.mark.parametrize("spellings", GROUPS, ids=lambda group: "-".join(f.__name__ for f in group))
def test_each_becomes_one_attention(spellings: tuple[Spelling, ...]) -> None:
    graph = capture(model := Hiding(*spellings).eval(), normalise_call(model, (), inputs(2, 0))).graph
    canonicalise(graph)
    names = [op_name(node) for node in graph.nodes if node.op == "call_function"]
    assert names.count("attention") == sum(f not in MAPS for f in spellings)
    assert names.count("weigh") == sum(f in MAPS for f in spellings)
    assert not {"softmax", "scaled_dot_product_attention"} & set(names)


def over_the_queries(m: SpelledAttention, x: Tensor, mask: Tensor) -> Tensor:
    scores, v = scores_of(m, x, mask)
    weights = scores.exp()
    return m.join(weights / weights.sum(-2, keepdim=True) @ v)


def of_other_scores(m: SpelledAttention, x: Tensor, mask: Tensor) -> Tensor:
    scores, v = scores_of(m, x, mask)
    return m.join(scores.exp() / scores.cosh().cumsum(-1) @ v)


def of_transposed_heads(m: SpelledAttention, x: Tensor, mask: Tensor) -> Tensor:
    q, k, v = m.split(x)
    return m.join((k @ q.mT).softmax(-2) @ v)


def with_given_keys(m: SpelledAttention, x: Tensor, mask: Tensor) -> Tensor:
    """The keys that are added come from the input, so they are tokens of another sequence."""
    q, k, v = m.split(x)
    more = k.amax(2, keepdim=True)
    return m.join(F.scaled_dot_product_attention(q, torch.cat([k, more], 2), torch.cat([v, more], 2)))


MISSES = (over_the_queries, of_other_scores, of_transposed_heads, with_given_keys)


@pytest.mark.parametrize("miss", MISSES, ids=lambda f: f.__name__)
@torch.no_grad()
def test_near_miss_gets_no_site_and_stays_correct(miss: Spelling) -> None:
    torch.manual_seed(0)
    model = lively(Hiding(miss, sdpa, sdpa))
    call = inputs(3, 0)
    call["mask"][:] = True
    pruned = madtp.rewrite(model, call, config=PruningConfig(merge=False, alignment_tokens=4))
    assert [site.name for site in pruned.report.sites] == ["blocks.1", "blocks.2"]
    with pruned.dense():
        assert gap(model(**call), pruned(**call)) < 1e-5


class Causal(nn.Module):
    """Attention that is causal if it has more than one query; text [B, T] of any length."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.image = nn.Embedding(20, WIDTH), nn.Linear(5, WIDTH)
        self.qkv, self.norms = (nn.ModuleList(make() for _ in range(2)) for make in (self.wide, self.normed))

    def wide(self) -> nn.Module:
        return nn.Linear(WIDTH, 3 * WIDTH)

    def normed(self) -> nn.Module:
        return nn.LayerNorm(WIDTH)

    def forward(self, image: Tensor, ids: Tensor) -> Tensor:
        x = torch.cat([self.image(image), self.words(ids)], 1)
        for qkv, norm in zip(self.qkv, self.norms, strict=True):
            q, k, v = (t.unflatten(-1, (HEADS, HEAD)).transpose(1, 2) for t in qkv(norm(x)).chunk(3, -1))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1 and k.shape[-2] == q.shape[-2])
            x = x + y.transpose(1, 2).flatten(2)
        return x


@torch.no_grad()
def test_a_comparison_of_sizes_says_whether_attention_is_causal() -> None:
    torch.manual_seed(0)
    model = lively(Causal())
    calls = [{"image": torch.randn(b, LENGTH, 5), "ids": torch.randint(0, 20, (b, n))} for b, n in ((3, 7), (2, 4))]
    pruned = madtp.rewrite(model, calls[0], config=PruningConfig(alignment_tokens=4, temperature=4.0))
    assert len(pruned.report.sites) == 2
    for call in calls:
        assert pruned(**call).shape == model(**call).shape
        with pruned.dense():
            assert gap(model(**call), pruned(**call)) < 1e-5
