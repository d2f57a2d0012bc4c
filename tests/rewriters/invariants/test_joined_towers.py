"""Towers that are pruned, and whose tokens are joined for a further encoder: no sample depends on its batch."""

from __future__ import annotations

import pytest
import torch
from joint_stream_models import Encoder, Patches, Words
from model_case import VOCABULARY, Tensors
from torch import Tensor, nn

import madtp


class JoinedTowers(nn.Module):
    """Two towers whose tokens a third encoder takes; it alone knows which words are padding, and reads the last word."""

    def __init__(self, image_first: bool) -> None:
        super().__init__()
        self.image_first = image_first
        self.image, self.text = Patches(), Words()
        self.image_encoder, self.text_encoder, self.fusion = Encoder(2), Encoder(1), Encoder(2)

    def forward(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        image = self.image_encoder(self.image(pixels)[:, 1:])  # without a class token
        text = self.text_encoder(self.text(input_ids))
        seen = torch.ones(image.shape[:2], dtype=torch.bool)
        parts, masks = [image, text], [seen, attention_mask.bool()]
        last = attention_mask.sum(1) - 1
        if self.image_first:
            last = last + image.shape[1]
        else:
            parts, masks = parts[::-1], masks[::-1]
        x = self.fusion(torch.cat(parts, 1), torch.cat(masks, 1)[:, None, None, :])
        return x[torch.arange(len(x)), last]


class ByRegions(JoinedTowers):
    """A method of its own for words, so that towers and fusion become regions. The text tower knows its padding."""

    def __init__(self, image_first: bool) -> None:
        super().__init__(image_first)
        self.text_encoder = Encoder(2)

    def forward(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        image = self.image_encoder(self.image(pixels))
        words = attention_mask.bool()
        text = self.text_encoder(self.text(input_ids), words[:, None, None, :])
        parts, masks = [image, text], [torch.ones(image.shape[:2], dtype=torch.bool), words]
        if not self.image_first:
            parts, masks = parts[::-1], masks[::-1]
        return self.fusion(torch.cat(parts, 1), torch.cat(masks, 1)[:, None, None, :])[:, 0]

    def generate(self, **inputs: Tensor) -> Tensor:
        return self(**inputs).argmax(-1)


def batch_of(size: int, seed: int) -> Tensors:
    """Images of very different contrast, and texts of different lengths."""
    chance = torch.Generator().manual_seed(seed)
    pixels = torch.randn(size, 3, 32, 32, generator=chance, dtype=torch.double).cumsum(-1)
    contrast = 10 ** torch.linspace(-2, 1, size, dtype=torch.double)[torch.randperm(size, generator=chance)]
    input_ids = torch.randint(VOCABULARY, (size, 12), generator=chance)
    lengths = torch.randint(4, 13, (size,), generator=chance)
    return {
        "pixels": pixels * contrast[:, None, None, None],
        "input_ids": input_ids,
        "attention_mask": (torch.arange(12) < lengths[:, None]).long(),
    }


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, {"score_queries": 4}], ids=str)
@pytest.mark.parametrize("image_first", [True, False])
@pytest.mark.parametrize("host", [JoinedTowers, ByRegions])
def test_a_sample_does_not_depend_on_its_batch(
    host: type[JoinedTowers], image_first: bool, settings: dict[str, object]
) -> None:
    """Neither where others of the batch lost tokens before they were joined, nor where what is read is not the tower's."""
    torch.manual_seed(0)
    model = host(image_first).double().eval()
    config = madtp.PruningConfig(**settings)
    pruned = madtp.rewrite(model, batch_of(4, 0), config=config)
    assert pruned.madtp.report.capture == ("whole" if host is JoinedTowers else "regions")
    assert {site.name.partition(".")[0] for site in pruned.madtp.report.sites} >= {"image_encoder", "fusion"}
    for seed in range(1, 4):
        batch = batch_of(5, seed)
        together, kept = pruned(**batch), pruned.kept_tokens()
        for sample in range(5):
            alone = pruned(**{name: value[sample : sample + 1] for name, value in batch.items()})
            for site, own in pruned.kept_tokens().items():
                assert torch.equal(own[0], kept[site][sample]), (seed, sample, site)
            torch.testing.assert_close(alone[0], together[sample], rtol=1e-6, atol=1e-6)
