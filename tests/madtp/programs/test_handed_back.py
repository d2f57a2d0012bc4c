"""Features that a pruned call returned and a later call is given: they hold the dropped tokens, and a note says so."""

from __future__ import annotations

import copy

import pytest
import torch
from small_vit import images, vit
from torch import Tensor, nn

import madtp


class Reusing(nn.Module):
    """Computes features of images, or takes them from an earlier call."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = vit(depth=3)
        self.head = nn.Linear(self.tower.embed_dim, 5)

    def forward(self, images: Tensor, features: Tensor | None = None) -> dict[str, Tensor]:
        if features is None:
            features = self.tower.forward_features(images)
        return {"features": features, "scores": self.head(features[:, 1:].amax(1))}


@pytest.fixture(scope="module")
def pruned() -> madtp.PrunedModel:
    torch.manual_seed(0)
    return madtp.rewrite(
        Reusing().eval(), {"images": images(2, 0)}, config=madtp.PruningConfig(alignment_tokens=5, gain=2.0)
    )


def notes(pruned: madtp.PrunedModel) -> list[str]:
    return [note for note in pruned.report.notes if "it sees the dropped tokens" in note]


@torch.no_grad()
def test_a_note_tells_features_that_come_back(pruned: madtp.PrunedModel) -> None:
    own = copy.deepcopy(pruned)
    found = own(images=images(2, 1))["features"]
    own(images=images(2, 1), features=found.clone())
    assert not notes(own), "other features may be whole"
    found = own(images=images(2, 1))["features"]
    own(images=images(2, 1), features=found.view_as(found))
    assert notes(own) == [notes(own)[0]]
    assert notes(own)[0].startswith("Reusing is given features that a pruned call of it has returned")


@torch.no_grad()
def test_unpruned_features_come_back_without_a_note(pruned: madtp.PrunedModel) -> None:
    own = copy.deepcopy(pruned)
    with own.dense():
        found = own(images=images(2, 1))["features"]
    own(images=images(2, 1), features=found)
    assert not notes(own)


@torch.no_grad()
def test_features_that_are_gone_are_not_kept_alive(pruned: madtp.PrunedModel) -> None:
    own = copy.deepcopy(pruned)
    own(images=images(2, 1))
    own(images=images(2, 1), features=torch.randn_like(own(images=images(2, 1))["features"]))
    assert not notes(own)
