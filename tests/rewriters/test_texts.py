"""Models that are called with texts, and tokenise them in forward."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from joint_stream_models import Encoder, Patches, Words
from model_case import VOCABULARY, WIDTH, lively
from rewritten_models import gap
from torch import Tensor, nn

import madtp
from madtp.calls.texts import holds_texts

LENGTH = 12


class Matcher(nn.Module):
    """loops: forward calls the blocks one by one, so that no submodule holds them. scales: it scales what they return."""

    def __init__(self, loops: bool = False, scales: bool = False) -> None:
        super().__init__()
        self.loops, self.scales = loops, scales
        self.patches, self.words = Patches(), Words()
        self.vision, self.text = Encoder(2), Encoder(2)
        self.head = nn.Linear(2 * WIDTH, 2)

    def tokenise(self, texts: Sequence[str]) -> Tensor:
        rows = [[1 + sum(map(ord, word)) % (VOCABULARY - 2) for word in text.split()] for text in texts]
        return torch.tensor([(row + [0] * LENGTH)[:LENGTH] for row in rows])

    def encode(self, encoder: Encoder, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if not self.loops:
            return encoder(x, mask)
        for block in encoder.blocks:
            x = block(x, mask)
            if self.scales:
                x = x * 0.9
        return encoder.norm(x)

    def forward(self, pixels: Tensor, texts: Sequence[str]) -> Tensor:
        ids = self.tokenise(texts).to(pixels.device)
        image = self.encode(self.vision, self.patches(pixels))
        text = self.encode(self.text, self.words(ids), (ids > 0)[:, None, None])
        return self.head(torch.cat([image[:, 0], text[:, 0]], -1))


def texts(number: int) -> list[str]:
    return [f"a photo of {number} red balls", f"two dogs and {number} cats", "people ride on a horse and wave"]


@pytest.mark.parametrize("loops", [False, True])
@torch.no_grad()
def test_other_texts_need_no_other_program(loops: bool) -> None:
    torch.manual_seed(0)
    model, pixels = lively(Matcher(loops)), torch.randn(3, 3, 32, 32)
    pruned = madtp.rewrite(model, {"pixels": pixels, "texts": texts(0)}, config=madtp.PruningConfig(alignment_tokens=4))
    chains = {f"{name}.blocks.0 to {name}.blocks.1" for name in ("vision", "text")}
    assert set(pruned.report.regions) == (chains if loops else {"vision", "text"})
    assert len(pruned.report.sites) == 4
    for number in range(3):
        with pruned.dense():
            assert gap(model(pixels, texts(number)), pruned(pixels, texts(number))) < 1e-5
    pruned(pixels, texts(5))
    assert all(len(count) == 3 for count in pruned.token_counts().values())
    assert {stream.modality for stream in pruned.report.streams} == {"image", "text"}


def test_a_model_without_regions_says_what_texts_cost() -> None:
    torch.manual_seed(0)
    call = {"pixels": torch.randn(3, 3, 32, 32), "texts": texts(0)}
    pruned = madtp.rewrite(
        lively(Matcher(loops=True, scales=True)), call, config=madtp.PruningConfig(alignment_tokens=4)
    )
    assert pruned.report.capture == "whole"
    assert any("a call with other texts makes one more" in note for note in pruned.report.notes)


def test_strings_that_are_options_are_no_texts() -> None:
    def call(**values: object) -> madtp.calls.call.Call:
        return madtp.calls.call.Call((torch.zeros(3, 2),), dict(values))

    assert holds_texts(call(texts=["a", "b", "c"]))
    assert holds_texts(call(batch={"texts": ("a", "b", "c")}))
    assert not holds_texts(call(mode="text", keys=["logits", "loss"]))
