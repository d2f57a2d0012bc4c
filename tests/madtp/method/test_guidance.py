"""Alignment tokens, pooled features and the alignment loss."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from madtp.errors import ConfigError
from madtp.method.guidance import AlignmentTokens, alignment_loss, mean_over_images, pooled_features, query_projection


def test_alignment_tokens_are_standard_normal_and_follow_the_seed() -> None:
    torch.manual_seed(5)
    tokens = AlignmentTokens(100, 768, seed=3).tokens.detach()
    assert tokens.shape == (100, 768)
    assert abs(float(tokens.mean())) < 0.02
    assert abs(float(tokens.std()) - 1.0) < 0.02
    assert torch.equal(tokens, AlignmentTokens(100, 768, seed=3).tokens)
    assert not torch.equal(tokens, AlignmentTokens(100, 768, seed=4).tokens)


def test_making_alignment_tokens_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    AlignmentTokens(3, 4)
    assert torch.equal(torch.rand(1), expected)


@given(st.integers(1, 6), st.integers(0, 3), st.integers(0, 1000))
def test_padding_changes_no_pooled_feature(count: int, padding: int, seed: int) -> None:
    torch.manual_seed(seed)
    queries = torch.randn(2, count + padding, 8)
    tokens = AlignmentTokens(5, 8)
    pooled = (torch.arange(count + padding) < count).expand(2, -1)
    padded = pooled_features(queries, tokens(queries), pooled)
    torch.testing.assert_close(padded, pooled_features(queries[:, :count], tokens(queries[:, :count])))


def test_pooling_over_no_token_is_zero_and_has_finite_gradients() -> None:
    queries = torch.randn(2, 3, 8, requires_grad=True)
    pooled = torch.tensor([[True, True, False], [False] * 3])
    features = pooled_features(queries, AlignmentTokens(5, 8)(queries), pooled)
    assert bool((features[1] == 0).all())
    features.sum().backward()
    assert queries.grad is not None
    assert bool(torch.isfinite(queries.grad).all())
    assert bool((queries.grad[~pooled] == 0).all())


@given(st.integers(1, 3), st.integers(1, 3))
def test_both_orders_of_images_group_alike(batch: int, images: int) -> None:
    features = torch.randn(images, batch, 5, 8)
    expected = features.mean(0)
    torch.testing.assert_close(mean_over_images(features.flatten(0, 1), images, "blocked"), expected)
    torch.testing.assert_close(
        mean_over_images(features.transpose(0, 1).flatten(0, 1), images, "interleaved"), expected
    )


def test_alignment_loss_is_one_minus_cosine() -> None:
    features = torch.randn(2, 5, 8)
    assert float(alignment_loss(features, 3 * features)) == pytest.approx(0.0, abs=1e-6)
    assert float(alignment_loss(features, -features)) == pytest.approx(2.0, abs=1e-6)


def test_query_projection_stands_only_where_widths_differ() -> None:
    assert isinstance(query_projection(8, 8), nn.Identity)
    linear = query_projection(256, 8, seed=1)
    scale = float(linear(torch.randn(500, 256)).detach().std())
    assert 0.8 < scale < 1.2
    assert torch.equal(linear.weight, query_projection(256, 8, seed=1).weight)  # type: ignore[arg-type]


def test_query_projection_stands_everywhere_if_asked_to() -> None:
    assert isinstance(query_projection(8, 8, always=True), nn.Linear)
    assert isinstance(query_projection(9, 8, always=True), nn.Linear)


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="3 feature maps cannot be grouped into samples of 2 images"):
        mean_over_images(torch.zeros(3, 5, 8), 2)
    with pytest.raises(ConfigError, match="group them with mean_over_images"):
        alignment_loss(torch.zeros(4, 5, 8), torch.zeros(2, 5, 8))
    with pytest.raises(ConfigError, match="both have to be at least 1"):
        AlignmentTokens(0, 8)


class Adapted(nn.Linear):
    """A projection that somebody wrapped: more happens in its forward than its weights say."""

    def forward(self, values: Tensor) -> Tensor:
        return super().forward(values) + 1


@pytest.mark.parametrize("projection", [nn.Linear(6, 8), nn.Linear(6, 8, bias=False), Adapted(6, 8), nn.Identity()])
def test_guidance_of_projected_values_is_that_of_their_queries(projection: nn.Module) -> None:
    torch.manual_seed(0)
    tokens = AlignmentTokens(5, 8)
    values = torch.randn(2, 7, 8 if isinstance(projection, nn.Identity) else 6, requires_grad=True)
    wanted = (values, tokens.tokens, *projection.parameters())
    results = [tokens(projection(values)), tokens(values, projection)]
    torch.testing.assert_close(*results)
    weights = torch.randn(2, 7, 5)
    plain, folded = (torch.autograd.grad((result * weights).sum(), wanted) for result in results)
    torch.testing.assert_close(folded, plain)


class Wrapped(nn.Module):
    """A projection in a wrapper, as adapters put it into one."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, values: Tensor) -> Tensor:
        found: Tensor = self.inner(values)
        return found


@pytest.mark.parametrize("kind", ["none", "identity", "linear", "wrapped"])
def test_massive_activations_keep_their_order_in_float16(kind: str) -> None:
    tokens = AlignmentTokens(6, 16).half()
    made = {
        "none": None,
        "identity": nn.Identity(),
        "linear": query_projection(16, 16, always=True).half(),
        "wrapped": Wrapped(nn.Identity()),
    }
    projection = made[kind]
    torch.manual_seed(0)
    values = torch.randn(1, 9, 16).half()
    values[0, 4, 3] = 60_000
    found = tokens(values, projection)
    exact = tokens.double()(values.double(), None if projection is None else projection.double())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-2, atol=1e-1)
