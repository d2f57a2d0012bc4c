"""A stream is named after what it descends from, however words are looked up."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from joint_stream_models import Encoder, Patches
from model_case import VOCABULARY, WIDTH, lively
from torch import Tensor, nn

import madtp

one_hot = nn.functional.one_hot


class Words(nn.Module):
    """Embeds token ids in one of several ways."""

    def __init__(self, embed: Callable[[Words, Tensor], Tensor]) -> None:
        super().__init__()
        self.embed = embed
        self.table = nn.Parameter(torch.randn(VOCABULARY, WIDTH))
        self.words, self.project = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(VOCABULARY, WIDTH)
        self.neighbours = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, ids: Tensor) -> Tensor:
        return self.embed(self, ids)


class Towers(nn.Module):
    def __init__(self, embed: Callable[[Words, Tensor], Tensor]) -> None:
        super().__init__()
        self.words, self.text, self.patches, self.image = Words(embed), Encoder(2), Patches(), Encoder(2)

    def forward(self, pixels: Tensor, ids: Tensor) -> Tensor:
        return self.image(self.patches(pixels))[:, 0] @ self.text(self.words(ids))[:, 0].T


class Bytes(nn.Module):
    """Patches of pixels that come as bytes, without a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.image, self.head = nn.Linear(192, WIDTH), Encoder(2), nn.Linear(WIDTH, 3)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = (pixels / 255).unflatten(2, (4, 8)).unflatten(4, (4, 8)).permute(0, 2, 4, 1, 3, 5)
        return self.head(self.image(self.project(patches.flatten(3).flatten(1, 2))).mean(1))


@pytest.mark.parametrize(
    "embed",
    [
        pytest.param(lambda words, ids: words.words(ids), id="embedding"),
        pytest.param(lambda words, ids: words.table[ids], id="indexing"),
        pytest.param(
            lambda words, ids: words.table.index_select(0, ids.flatten()).view(*ids.shape, -1), id="selecting"
        ),
        pytest.param(lambda words, ids: one_hot(ids, VOCABULARY).float() @ words.table, id="product"),
        pytest.param(lambda words, ids: words.project(one_hot(ids, VOCABULARY).float()), id="layer"),
        pytest.param(lambda words, ids: words.neighbours(words.words(ids).mT).mT, id="convolution"),
    ],
)
def test_words_make_a_text_stream(embed: Callable[[Words, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    inputs = {"pixels": torch.randn(3, 3, 32, 32), "ids": torch.randint(0, VOCABULARY, (3, 12))}
    pruned = madtp.rewrite(lively(Towers(embed)), inputs, config=madtp.PruningConfig(alignment_tokens=4))
    assert {site.name.partition(".")[0]: site.modality for site in pruned.report.sites} == {
        "image": "image",
        "text": "text",
    }


def test_bytes_make_an_image_stream() -> None:
    torch.manual_seed(0)
    pixels = torch.randint(0, 255, (3, 3, 32, 32), dtype=torch.uint8)
    pruned = madtp.rewrite(lively(Bytes()), (pixels,), config=madtp.PruningConfig(alignment_tokens=4))
    assert {site.modality for site in pruned.report.sites} == {"image"}
