"""Methods of a model that is rewritten whole run on its pruned towers, or say that they do not."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import madtp
from madtp.errors import UnprunedError
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

    def by_value(self, ids: Tensor) -> Tensor:
        x = self.texts.words(ids)
        for block in self.texts.blocks:
            x = block(x) if x[0, 0, 0].item() < 1e9 else -block(x)
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
def test_a_method_that_runs_blocks_by_itself_is_a_program(caplog: pytest.LogCaptureFixture) -> None:
    model = Both().eval()
    pruned, call = rewritten(model), inputs()
    wanted = pruned.encode_text(call["ids"])
    counts = pruned.token_counts()
    for given in (call["ids"], call["ids"], call["ids"][:1], call["ids"][:, :7]):
        found = pruned.one_by_one(given)
        torch.testing.assert_close(found, pruned.encode_text(ids=given))
    torch.testing.assert_close(pruned.one_by_one(ids=call["ids"]), wanted)
    assert all(torch.equal(counts[name], kept) for name, kept in pruned.token_counts().items())
    with pruned.dense():
        assert tensor_error(model.one_by_one(call["ids"]), pruned.one_by_one(call["ids"])) < 1e-6
    assert not pruned.report.notes
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    twin = copy.deepcopy(pruned)
    torch.testing.assert_close(twin.one_by_one(call["ids"]), wanted)


@torch.no_grad()
def test_a_method_that_cannot_be_captured_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    model = Both().eval()
    pruned = rewritten(model)
    call = inputs()
    with pruned.dense():
        pruned.by_value(call["ids"])
    assert pruned.width() == 8
    assert not pruned.report.notes
    with caplog.at_level(logging.WARNING, "madtp"):
        found = [pruned.by_value(call["ids"]) for _ in range(2)]
    assert torch.equal(found[1], model.by_value(call["ids"]))
    assert [note for note in pruned.report.notes if "by_value" in note and "texts.blocks.0" in note]
    assert len(caplog.records) == 1
    pruned.madtp.config = replace(pruned.madtp.config, strict=True)
    with pytest.raises(UnprunedError, match=r"texts\.blocks\.0"):
        pruned.by_value(call["ids"])


class Blocks(nn.Module):
    """Causal blocks, whose every position is returned."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([CausalBlock() for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class CausalBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.project, self.out = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.feed_forward = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.project(self.norm(x)).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        seen = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return x + self.feed_forward(x)


class EndOfText(nn.Module):
    """Reads texts at their end, whose id is the largest, as the CLIP models of open_clip do."""

    def __init__(self) -> None:
        super().__init__()
        self.images, self.words, self.texts, self.head = Images(), nn.Embedding(50, 8), Blocks(), nn.Linear(16, 8)

    def encode_image(self, pixels: Tensor) -> Tensor:
        return self.head(self.images(pixels))

    def encode_text(self, ids: Tensor, scale: float = 1.0) -> Tensor:
        x = self.texts(self.words(ids))
        return scale * x[torch.arange(len(ids)), ids.argmax(-1)]

    def all_states(self, ids: Tensor) -> Tensor:
        return self.texts(self.words(ids))

    def forward(self, pixels: Tensor, ids: Tensor) -> Tensor:
        return self.encode_image(pixels) @ self.encode_text(ids).mT


@torch.no_grad()
def test_a_method_prunes_a_text_that_it_reads_at_one_position() -> None:
    model = EndOfText().eval()
    pruned, call = rewritten(model), inputs()
    scores, counts = pruned(**call), pruned.token_counts()
    images = pruned.encode_image(call["pixels"])
    texts = pruned.encode_text(call["ids"])
    kept = pruned.token_counts()
    assert sorted(kept) == ["texts.blocks.0", "texts.blocks.1"]
    assert all(torch.equal(counts[name], kept[name]) for name in kept)
    torch.testing.assert_close(images @ texts.mT, scores)
    torch.testing.assert_close(pruned.encode_text(call["ids"], scale=2.0), 2 * texts)
    assert not pruned.report.notes
    states = pruned.all_states(call["ids"])
    assert torch.equal(states, model.all_states(call["ids"])), "a language model's states are left alone"
    assert any("every position is read" in note for note in pruned.report.notes)


def test_methods_leave_state_and_training_as_they_were() -> None:
    model = Both()
    pruned = rewritten(model)
    keys = [key for key in pruned.state_dict() if not key.startswith("madtp.")]
    assert keys == list(model.state_dict())
    pruned.train()
    pruned.encode_image(inputs()["pixels"]).sum().backward()
    assert pruned.images.patches.weight.grad is not None
    assert pruned.macs() > 0
