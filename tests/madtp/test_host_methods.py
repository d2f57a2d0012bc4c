"""Methods of a model that is rewritten whole run on its pruned towers, or say that they do not."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor, nn

import madtp
from madtp.pruned import PrunedModel
from madtp.survey.outputs import tensor_error


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.feed_forward = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.feed_forward(self.norm2(x))


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.class_token = nn.Parameter(torch.randn(1, 1, 16))
        self.blocks = nn.ModuleList([Block(16) for _ in range(2)])

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patches(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        return x[:, 0]


class Texts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 8)
        self.blocks = nn.ModuleList([Block(8) for _ in range(2)])

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        for block in self.blocks:
            x = block(x)
        return x.mean(1)


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.images, self.texts, self.head = Images(), Texts(), nn.Linear(16, 8)

    def encode_image(self, pixels: Tensor) -> Tensor:
        return self.head(self.images(pixels))

    def encode_text(self, ids: Tensor) -> Tensor:
        return self.texts(ids)

    def one_by_one(self, ids: Tensor) -> Tensor:
        x = self.texts.words(ids)
        for block in self.texts.blocks:
            x = block(x)
        return x.mean(1)

    def width(self) -> int:
        return self.head.out_features

    def forward(self, pixels: Tensor, ids: Tensor) -> Tensor:
        return self.encode_image(pixels) @ self.encode_text(ids).mT


def inputs() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {"pixels": torch.randn(3, 3, 24, 24), "ids": torch.randint(1, 50, (3, 9))}


def rewritten(model: nn.Module) -> PrunedModel:
    pruned = madtp.rewrite(model, inputs(), config=madtp.PruningConfig(alignment_tokens=4))
    pruned.temperature = 4.0
    return pruned


@torch.no_grad()
def test_a_method_runs_on_the_pruned_tower_that_it_calls() -> None:
    model = Both().eval()
    pruned = rewritten(model)
    assert pruned.report.capture == "whole"
    call = inputs()
    scores = pruned(**call)
    counts = pruned.token_counts()
    images = pruned.encode_image(call["pixels"])
    assert sorted(pruned.token_counts()) == ["images.blocks.0", "images.blocks.1"]
    assert all(torch.equal(counts[name], kept) for name, kept in pruned.token_counts().items())
    texts = pruned.encode_text(call["ids"])
    torch.testing.assert_close(images @ texts.mT, scores)
    alone = pruned.encode_image(call["pixels"][:1])
    torch.testing.assert_close(alone, images[:1])
    with pruned.dense():
        assert tensor_error(model.encode_image(call["pixels"]), pruned.encode_image(call["pixels"])) < 1e-6
    assert not pruned.report.notes


@torch.no_grad()
def test_a_method_that_runs_blocks_by_itself_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    model = Both().eval()
    pruned = rewritten(model)
    call = inputs()
    with pruned.dense():
        pruned.one_by_one(call["ids"])
    assert pruned.width() == 8
    assert not pruned.report.notes
    with caplog.at_level(logging.WARNING, "madtp"):
        found = [pruned.one_by_one(call["ids"]) for _ in range(2)]
    assert torch.equal(found[1], model.one_by_one(call["ids"]))
    assert [note for note in pruned.report.notes if "one_by_one" in note and "texts.blocks.0" in note]
    assert len(caplog.records) == 1


def test_methods_leave_state_and_training_as_they_were() -> None:
    model = Both()
    pruned = rewritten(model)
    keys = [key for key in pruned.state_dict() if not key.startswith("madtp.")]
    assert keys == list(model.state_dict())
    pruned.train()
    pruned.encode_image(inputs()["pixels"]).sum().backward()
    assert pruned.images.patches.weight.grad is not None
    assert pruned.macs() > 0
