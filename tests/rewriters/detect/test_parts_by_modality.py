"""A joint stream whose layers are one for each modality: split at a fixed position, put together behind."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from rewritten_models import gap
from torch import Tensor, nn

import madtp

pytestmark = pytest.mark.usefixtures("plain_attention")
# A cut after few tokens would protect them.
WIDTH, TEXT, PATCHES = 8, 10, 16
Make = Callable[[], nn.Module]


class ByModality(nn.Module):
    """A layer for the first tokens, another for those behind."""

    def __init__(self, make: Make, first: int, sliced: bool) -> None:
        super().__init__()
        self.one, self.other = make(), make()
        self.first, self.sliced = first, sliced

    def forward(self, x: Tensor) -> Tensor:
        if self.sliced:
            a, b = x[:, : self.first], x[:, self.first :]
        else:
            a, b = torch.split(x, [self.first, x.shape[1] - self.first], dim=1)
        return torch.cat([self.one(a), self.other(b)], dim=1)


class Block(nn.Module):
    def __init__(self, where: str, make: Callable[[Make], nn.Module], post: bool) -> None:
        super().__init__()

        def layer(name: str, one: Make) -> nn.Module:
            return make(one) if name in where.split() else one()

        def linear() -> nn.Module:
            return nn.Linear(WIDTH, WIDTH)

        self.post = post
        self.norm1, self.norm2 = (layer("norm", lambda: nn.LayerNorm(WIDTH)) for _ in range(2))
        self.query, self.key, self.value = (layer("qkv", linear) for _ in range(3))
        self.out = layer("out", linear)
        self.mlp = layer("mlp", lambda: nn.Sequential(nn.Linear(WIDTH, 12), nn.GELU(), nn.Linear(12, WIDTH)))

    def attend(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (2, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        return self.out(F.scaled_dot_product_attention(q, k, v, mask[:, None, None]).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        if self.post:
            x = self.norm1(x + self.attend(x, mask))
            return self.norm2(x + self.mlp(x))
        x = x + self.attend(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))


class Joint(nn.Module):
    """hidden: by layer, tokens ``[B, N]`` that its attention must not see."""

    def __init__(self, where: str, *, image_first: bool = True, sliced: bool = False, post: bool = False) -> None:
        super().__init__()
        self.patches, self.words = nn.Conv2d(3, WIDTH, 4, 4), nn.Embedding(50, WIDTH)
        self.positions = nn.Parameter(torch.randn(1, PATCHES + TEXT, WIDTH))
        self.image_first = image_first
        first = PATCHES if image_first else TEXT
        self.blocks = nn.ModuleList(Block(where, lambda make: ByModality(make, first, sliced), post) for _ in range(2))
        self.hidden: list[Tensor] = []

    def forward(self, image: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        parts = [self.patches(image).flatten(2).transpose(1, 2), self.words(ids)]
        masks = [mask.new_ones(mask.shape[0], PATCHES), mask]
        order = 1 if self.image_first else -1
        x, mask = torch.cat(parts[::order], 1) + self.positions, torch.cat(masks[::order], 1)
        for number, block in enumerate(self.blocks):
            x = block(x, mask & ~self.hidden[number] if self.hidden else mask)
        return x[:, PATCHES if self.image_first else 0]


def inputs(batch: int) -> dict[str, Tensor]:
    lengths = torch.tensor([TEXT - row % 3 for row in range(batch)])
    return {
        "image": torch.randn(batch, 3, 16, 16),
        "ids": torch.randint(0, 50, (batch, TEXT)),
        "mask": torch.arange(TEXT) < lengths[:, None],
    }


@pytest.mark.parametrize(
    ("where", "image_first", "sliced", "post"),
    [
        ("norm qkv out mlp", True, True, False),
        ("qkv out", False, False, False),
        ("mlp", True, False, True),
        ("norm", False, True, True),
    ],
)
@torch.no_grad()
def test_layers_by_modality_prune_like_others(where: str, image_first: bool, sliced: bool, post: bool) -> None:
    torch.manual_seed(0)
    model = Joint(where, image_first=image_first, sliced=sliced, post=post).eval()
    pruned = madtp.rewrite(model, inputs(3), config=madtp.PruningConfig(merge=False, alignment_tokens=4))
    assert [site.name for site in pruned.report.sites] == ["blocks.0", "blocks.1"]
    assert not pruned.report.refusals
    assert len(pruned.report.streams) == 1
    for batch in (1, 3):
        call = inputs(batch)
        with pruned.dense():
            assert gap(model(**call), pruned(**call)) < 1e-5
            dense = pruned.macs()
        masks = [torch.ones(batch, PATCHES, dtype=torch.bool), call["mask"]]
        seen = torch.cat(masks if image_first else masks[::-1], 1)
        read = torch.arange(PATCHES + TEXT) == (PATCHES if image_first else 0)
        kept = []
        for _ in range(2):
            seen = seen & ((torch.rand(batch, PATCHES + TEXT) < 0.5) | read)
            kept.append(seen)
        pruned.madtp.control.forced = dict(zip(("blocks.0", "blocks.1"), kept, strict=True))
        found = pruned(**call)
        assert pruned.macs() < dense
        pruned.madtp.control.forced = None
        model.hidden = [torch.zeros_like(seen), ~kept[0]]
        assert gap(model(**call), found) < 1e-5
        model.hidden = []
