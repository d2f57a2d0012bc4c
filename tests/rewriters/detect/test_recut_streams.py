"""Streams that are cut into parts and put together again in every layer, as queries and text are that go through
feed-forward sublayers of their own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from rewritten_models import eager_arithmetic, gap
from torch import Tensor, nn

import madtp

WIDTH, TEXT = 8, 7


@pytest.fixture(autouse=True)
def plain_attention() -> Iterator[None]:
    with eager_arithmetic():
        yield


def feed_forward() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 12), nn.GELU(), nn.Linear(12, WIDTH))


class Layer(nn.Module):
    """Post-norm; queries and text share the attention, and queries alone read the image."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.norm, self.query_norm, self.text_norm = (nn.LayerNorm(WIDTH) for _ in range(3))
        self.of_queries, self.of_text = feed_forward(), feed_forward()

    def forward(self, x: Tensor, queries: int, mask: Tensor, image: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (2, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        attended = F.scaled_dot_product_attention(q, k, v, mask[:, None, None])
        x = self.norm(x + self.out(attended.transpose(1, 2).flatten(2)))
        first, rest = x[:, :queries], x[:, queries:]
        first = self.query_norm(first + self.of_queries(first) + image)
        return torch.cat([first, self.text_norm(rest + self.of_text(rest))], 1)


class Recut(nn.Module):
    """Reads the queries. hidden: by layer, tokens ``[B, N]`` that its attention must not see."""

    def __init__(self, queries: int) -> None:
        super().__init__()
        self.queries = queries
        self.learned = nn.Parameter(torch.randn(1, queries, WIDTH))
        self.words = nn.Embedding(50, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.hidden: list[Tensor] = []

    def forward(self, ids: Tensor, mask: Tensor, image: Tensor) -> Tensor:
        batch = ids.shape[0]
        x = torch.cat([self.learned.expand(batch, -1, -1), self.words(ids)], 1)
        mask = torch.cat([mask.new_ones(batch, self.queries), mask], 1)
        for number, layer in enumerate(self.layers):
            x = layer(x, self.queries, mask & ~self.hidden[number] if self.hidden else mask, image)
        return x[:, : self.queries]


def inputs(batch: int) -> dict[str, Tensor]:
    lengths = torch.tensor([TEXT - row % 3 for row in range(batch)])
    return {
        "ids": torch.randint(0, 50, (batch, TEXT)),
        "mask": torch.arange(TEXT) < lengths[:, None],
        "image": torch.randn(batch, 1, WIDTH),
    }


@pytest.mark.parametrize("queries", [4, 12])
@torch.no_grad()
def test_parts_that_are_cut_and_joined_in_every_layer_stay_pruned(queries: int) -> None:
    torch.manual_seed(0)
    model = Recut(queries).eval()
    pruned = madtp.rewrite(model, inputs(3), config=madtp.PruningConfig(merge=False, alignment_tokens=4))
    names = [site.name for site in pruned.report.sites]
    assert names == [f"layers.{layer}" for layer in range(3)]
    assert not pruned.report.refusals
    for batch in (1, 2, 4):
        call = inputs(batch)
        with pruned.dense():
            assert gap(model(**call), pruned(**call)) < 1e-5
        seen = torch.cat([torch.ones(batch, queries, dtype=torch.bool), call["mask"]], 1)
        kept = []
        for _ in names:
            wanted = (torch.rand(batch, queries + TEXT) < 0.7) | (torch.arange(queries + TEXT) < queries)
            kept.append(wanted & seen)
            seen = kept[-1]
        pruned.madtp.control.forced = dict(zip(names, kept, strict=True))
        found = pruned(**call)
        model.hidden = [torch.zeros_like(seen), *(~k for k in kept[:-1])]
        assert gap(model(**call), found) < 1e-5
        model.hidden = []
