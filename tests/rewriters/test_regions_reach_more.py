"""A model that is captured whole, but of which regions show more: image features that a mask puts among text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from joint_stream_models import Encoder, Patches
from model_case import VOCABULARY, WIDTH, lively
from rewritten_models import gap
from torch import Tensor, nn

import madtp

IMAGE = 17


class Layer(nn.Module):
    """Causal self-attention and a feed-forward."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(y.transpose(1, 2).flatten(2)).relu()


class Scattered(nn.Module):
    """Writes image features into the text by a boolean mask; selected: it reads them by another one."""

    def __init__(self, selected: bool) -> None:
        super().__init__()
        self.selected = selected
        self.patches, self.vision = Patches(), Encoder(2)
        self.words, self.lm = nn.Embedding(VOCABULARY, WIDTH), nn.Sequential(Layer(), Layer())
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, pixels: Tensor, ids: Tensor, place: Tensor, real: Tensor) -> Tensor:
        features = self.vision(self.patches(pixels))
        x = self.words(ids).clone()
        x[place] = features[real] if self.selected else features.flatten(0, 1)
        return self.head(self.lm(x))


def inputs(batch: int) -> dict[str, Tensor]:
    place = torch.zeros(batch, IMAGE + 6, dtype=torch.bool)
    place[:, 2 : 2 + IMAGE] = True
    return {
        "pixels": torch.randn(batch, 3, 32, 32),
        "ids": torch.randint(0, VOCABULARY, place.shape),
        "place": place,
        "real": torch.ones(batch, IMAGE, dtype=torch.bool),
    }


@pytest.mark.parametrize("selected", [False, True])
@torch.no_grad()
def test_regions_are_taken_where_they_have_more_sites(selected: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, call = lively(Scattered(selected)), inputs(3)
    config = madtp.PruningConfig(alignment_tokens=4, temperature=4.0)
    pruned = madtp.rewrite(model, call, config=config)
    assert pruned.report.capture == "regions"
    names = [site.name for site in pruned.report.sites]
    assert names == ["vision.blocks.0", "vision.blocks.1", "lm.0", "lm.1"]
    with pruned.dense():
        assert gap(model(**call), pruned(**call)) < 1e-5
        dense = pruned.macs()
    found = pruned(**call)
    assert pruned.macs() < dense
    kept = pruned.kept_tokens()["lm.0"]
    assert bool(kept[~call["place"]].all()), "the text of a language model is kept"
    assert not bool(kept.all())
    madtp.save(pruned, tmp_path / "saved")
    assert gap(found, madtp.load(tmp_path / "saved", lively(Scattered(selected)))(**call)) < 1e-5
