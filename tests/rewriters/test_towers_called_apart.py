"""Towers that are registered inside another module, but that the host calls by themselves."""

from __future__ import annotations

from pathlib import Path

import torch
from joint_stream_models import Encoder, Patches, Words
from model_case import VOCABULARY, WIDTH, lively
from rewritten_models import gap
from torch import Tensor, nn

import madtp


class Decoder(nn.Module):
    """Reads embeddings; holds the vision tower that the host runs in front of it. inside: it runs it itself."""

    def __init__(self, inside: bool) -> None:
        super().__init__()
        self.inside = inside
        self.text, self.layers = Words(), Encoder(2)
        self.vision = nn.ModuleDict({"patches": Patches(), "tower": Encoder(2)})

    def forward(self, x: Tensor, pixels: Tensor) -> Tensor:
        return self.layers(
            torch.cat([x, self.vision["tower"](self.vision["patches"](pixels))], 1) if self.inside else x
        )


class Host(nn.Module):
    def __init__(self, inside: bool) -> None:
        super().__init__()
        self.model, self.head = Decoder(inside), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, pixels: Tensor, ids: Tensor) -> Tensor:
        x, vision = self.model.text(ids), self.model.vision
        if not self.model.inside:
            x = torch.cat([x, vision["tower"](vision["patches"](pixels))], 1)
        return self.head(self.model(x, pixels)[:, 0])

    def generate(self, pixels: Tensor, ids: Tensor) -> Tensor:
        return self(pixels, ids).argmax(-1)


def inputs(batch: int) -> dict[str, Tensor]:
    return {"pixels": torch.randn(batch, 3, 32, 32), "ids": torch.randint(0, VOCABULARY, (batch, 9))}


TOWER = [f"model.vision.tower.blocks.{n}" for n in range(2)]
LAYERS = [f"model.layers.blocks.{n}" for n in range(2)]


@torch.no_grad()
def test_a_tower_that_the_host_calls_is_a_region(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, call = lively(Host(inside=False)), inputs(3)
    pruned = madtp.rewrite(model, call, config=madtp.PruningConfig(alignment_tokens=4, temperature=4.0))
    assert set(pruned.report.regions) == {"model", "model.vision.tower"}
    assert sorted(site.name for site in pruned.report.sites) == sorted([*TOWER, *LAYERS])
    assert not pruned.report.unpruned
    with pruned.dense():
        assert gap(model(**call), pruned(**call)) < 1e-5
        dense = pruned.macs()
    found = pruned(**call)
    assert pruned.macs() < dense
    assert all(bool((count < 17).all()) for name, count in pruned.token_counts().items() if name in TOWER)
    madtp.save(pruned, tmp_path / "saved")
    assert gap(found, madtp.load(tmp_path / "saved", lively(Host(inside=False)))(**call)) < 1e-5


@torch.no_grad()
def test_a_tower_that_runs_inside_belongs_to_the_module_around_it() -> None:
    torch.manual_seed(0)
    model, call = lively(Host(inside=True)), inputs(3)
    pruned = madtp.rewrite(model, call, config=madtp.PruningConfig(alignment_tokens=4))
    assert pruned.report.regions == ("model",)
    assert sorted(site.name for site in pruned.report.sites) == sorted([*TOWER, *LAYERS])
