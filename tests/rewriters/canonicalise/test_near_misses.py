"""Attention whose spelling nearly fits is refused with the node where the search ended, what was found there, and what would
fit."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from attention_spellings import LENGTH, SpelledAttention, Spelling, inputs, sdpa, spelled_case
from rewritten_models import gap
from torch import Tensor, fx, nn

import madtp
from madtp import PruningConfig
from madtp.errors import NoSiteError
from rewriters.graph.match import Miss, NoMatch, attempt, described, farthest, nearest_miss, remember
from rewriters.graph.nodes import AxisError

UNKNOWN = "attention in a spelling that the rewriter does not know: "


def wrong_dimension(m: SpelledAttention, x: Tensor, mask: Tensor) -> Tensor:
    q, k, v = m.split(x)
    return m.join((q @ k.mT).softmax(-2) @ v)


def second_factor(m: SpelledAttention, x: Tensor, mask: Tensor) -> Tensor:
    q, k, v = m.split(x)
    return m.join((v.mT @ (k @ q.mT).softmax(-1)).mT)


def sorted_scores(m: SpelledAttention, x: Tensor, mask: Tensor) -> Tensor:
    q, k, v = m.split(x)
    return m.join((q @ k.mT * 0.5).sort(-1).values.softmax(-1) @ v)


def sorted_under_a_mask(m: SpelledAttention, x: Tensor, mask: Tensor) -> Tensor:
    """The mask is an operand that leads farther from the softmax than the scores do."""
    q, k, v = m.split(x)
    hidden = (1 - mask[:, None, None, :].float()) * -10000.0 / 1.0
    return m.join((hidden + (q @ k.mT).sort(-1).values).softmax(-1) @ v)


def three_factors(m: SpelledAttention, x: Tensor, mask: Tensor) -> Tensor:
    q, k, v = m.split(x)
    weights = F.dropout((q @ k.mT).softmax(-1), 0.1, m.training)
    return m.join(torch.einsum("bhqk,bhkc,c->bhqc", weights, v, m.cos[1]))


def over_all_pairs(m: SpelledAttention, x: Tensor, mask: Tensor) -> Tensor:
    q, k, v = m.split(x)
    scores = q @ k.mT
    return m.join(scores.flatten(2).softmax(-1).view_as(scores) @ v)


def sorted_filled_softly(m: SpelledAttention, x: Tensor, mask: Tensor) -> Tensor:
    q, k, v = m.split(x)
    scores = (q @ k.mT).sort(-1).values.masked_fill(~mask[:, None, None, :], -3.0)
    return m.join(scores.softmax(-1) @ v)


def sorted_probabilities(m: SpelledAttention, x: Tensor, mask: Tensor) -> Tensor:
    q, k, v = m.split(x)
    return m.join((q @ k.mT).softmax(-1).sort(-1).values @ v)


@dataclass(frozen=True)
class Expected:
    """What a refusal says: the operation that its node stands for, and parts of its reason and of its help."""

    node: str
    reason: str
    steps: str
    help: str


NEAR_MISSES: dict[Spelling, Expected] = {
    wrong_dimension: Expected(
        "softmax", f"runs over dimension -2 of scores [3, 2, {LENGTH}, {LENGTH}]", "softmax", "last"
    ),
    second_factor: Expected("matmul", "the second factor of aten.matmul", "softmax", "one product with the values"),
    sorted_scores: Expected(
        "sort",
        "its scores pass aten.sort on the way from the product to the softmax",
        "softmax, product with the values",
        "scale",
    ),
    sorted_under_a_mask: Expected(
        "sort", "its scores pass aten.sort on the way", "softmax, product with the values, mask", "mask"
    ),
    three_factors: Expected(
        "einsum",
        "pass aten.einsum ('bhqk,bhkc,c->bhqc' does not multiply two operands)",
        "softmax, dropout",
        "one product with the values",
    ),
    over_all_pairs: Expected(
        "softmax",
        f"its softmax is over {LENGTH**2} scores, which are not one for each key",
        "softmax, product with the values",
        "scaled_dot_product_attention",
    ),
    sorted_filled_softly: Expected(
        "masked_fill",
        "filled with -3 where a mask says so, which hides no key",
        "softmax, product with the values, mask",
        "-inf",
    ),
    sorted_probabilities: Expected(
        "sort",
        "its probabilities pass aten.sort on the way from the softmax to the product with the values",
        "softmax",
        "one product with the values",
    ),
}


@pytest.mark.parametrize("spelling", NEAR_MISSES, ids=lambda f: f.__name__)
@torch.no_grad()
def test_a_near_miss_says_where_and_why(spelling: Spelling) -> None:
    torch.manual_seed(0)
    wanted = NEAR_MISSES[spelling]
    model = spelled_case(spelling.__name__, sdpa, spelling, sdpa).build()
    call = inputs(3, 0)
    pruned = madtp.rewrite(model, call, config=PruningConfig(merge=False, alignment_tokens=4))
    assert [s.name for s in pruned.report.sites] == ["blocks.2"]
    (refusal,) = (r for r in pruned.report.refusals if r.block.startswith("blocks.1"))
    assert refusal.node.rstrip("_0123456789") == wanted.node
    assert refusal.reason.startswith(UNKNOWN)
    assert wanted.reason in refusal.reason
    assert f"(recognised up to there: {wanted.steps})" in refusal.reason
    assert wanted.help in refusal.help
    with pruned.dense():
        assert gap(model(**call), pruned(**call)) < 1e-5


def test_a_model_of_near_misses_alone_has_no_site_for_that_reason() -> None:
    torch.manual_seed(0)
    model = spelled_case("sorted", sorted_scores).build()
    with pytest.raises(NoSiteError, match=r"node sort\): attention in a spelling .* its scores pass aten\.sort"):
        madtp.rewrite(model, inputs(3, 0))


class FourProducts(nn.Module):
    """scaled_dot_product_attention of six dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (1, 1, 2, 4)).movedim(1, -2) for t in self.qkv(x).chunk(3, -1))
        return x + self.out(F.scaled_dot_product_attention(q, k, v).movedim(-2, 1).flatten(2))


def test_fused_attention_of_too_many_dimensions_is_refused_and_not_overlooked() -> None:
    with pytest.raises(NoSiteError, match=r"spelling that the rewriter does not know: its result has 6 dimensions"):
        madtp.rewrite(FourProducts().eval(), (torch.randn(2, 7, 8),))


def detached_scores(m: SpelledAttention, x: Tensor, mask: Tensor) -> Tensor:
    q, k, v = m.split(x)
    return m.join((q @ k.mT).detach().softmax(-1) @ v)


def test_scores_that_pass_no_gradient_on_still_pass_none() -> None:
    torch.manual_seed(0)
    model = spelled_case("detached", sdpa, detached_scores).build()
    call = inputs(3, 0)
    pruned = madtp.rewrite(model, call, config=PruningConfig(alignment_tokens=4))
    assert [s.name for s in pruned.report.sites] == ["blocks.0", "blocks.1"]
    with pruned.dense():
        pruned(**call).square().sum().backward()
    assert model.blocks[1].attn.value.weight.grad is not None
    assert model.blocks[1].attn.query.weight.grad is None or not model.blocks[1].attn.query.weight.grad.any()


def _placeholders() -> tuple[fx.Node, fx.Node]:
    graph = fx.Graph()
    return graph.placeholder("first"), graph.placeholder("second")


def test_the_miss_that_came_farthest_is_kept_the_first_of_several() -> None:
    node, other = _placeholders()
    short, long, late = Miss(other, "a", "", ("x",)), Miss(other, "b", "", ("x", "y")), Miss(other, "c", "", ("z", "y"))
    for miss in (short, long, late):
        remember(node, miss)
    assert nearest_miss(node) is long
    assert nearest_miss(other) is None
    assert farthest((short, late, long)) is late
    assert str(long) == "b (recognised up to there: x, y)"


def test_an_attempt_remembers_both_kinds_of_failure_and_goes_on() -> None:
    node, other = _placeholders()
    with attempt(node, "help"):
        raise AxisError("sizes differ")
    assert nearest_miss(node) == Miss(node, "sizes differ", "help")
    with attempt(node, "help"):
        raise NoMatch(other, "no product", "a product", ("softmax",))
    assert nearest_miss(node) == Miss(other, "no product", "a product", ("softmax",))
    with pytest.raises(ValueError, match="a bug"), attempt(node, "help"):
        raise ValueError("a bug")


def test_an_operation_is_described_with_its_own_miss() -> None:
    graph = fx.Graph()
    node = graph.call_function(torch.ops.aten.einsum.default, ("ij->", [graph.placeholder("x")]))
    assert described(node) == "aten.einsum"
    remember(node, Miss(node, "it sums one operand", ""))
    assert described(node) == "aten.einsum (it sums one operand)"
