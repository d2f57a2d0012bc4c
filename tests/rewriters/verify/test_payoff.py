"""A stream that pruning cannot pay for is noted in the report, and only then."""

from __future__ import annotations

import pytest
import tiny_training as tiny
import torch
from small_vit import images, vit
from torch import Tensor, nn

import madtp
from madtp.errors import RewriteError


@pytest.mark.parametrize(("tokens", "noted"), [(4, False), (20_000, True)])
def test_a_stream_that_pays_for_no_guidance_is_noted(tokens: int, noted: bool) -> None:
    pruned = madtp.rewrite(vit(depth=2), {"x": images(2, 0)}, config=madtp.PruningConfig(alignment_tokens=tokens))
    assert any("costs more than it can save from blocks.0 on" in note for note in pruned.report.notes) is noted
    assert (f"than {tokens} alignment tokens pay for" in "".join(pruned.report.notes)) is noted


def test_without_guidance_there_is_nothing_to_pay() -> None:
    config = madtp.PruningConfig(alignment_tokens=20_000, alignment=False)
    assert madtp.rewrite(vit(depth=2), {"x": images(2, 0)}, config=config).report.notes == []


class Mixing(nn.Module):
    """A convolution over neighbours behind its attention: what follows the site runs on all tokens.

    twice: a layer that runs on the tokens that are kept runs on all of them for the convolution, too.
    """

    def __init__(self, twice: bool) -> None:
        super().__init__()
        self.twice = twice
        self.embed, self.qkv, self.layer = nn.Linear(4, 8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.mix = nn.Conv1d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        q, k, v = (t[:, None] for t in self.qkv(x).chunk(3, -1))
        x = x + nn.functional.scaled_dot_product_attention(q, k, v)[:, 0]
        y = self.layer(x) if self.twice else x
        mixed = self.mix(y.transpose(1, 2)).transpose(1, 2)
        return (x + y * mixed if self.twice else mixed).mean(1)


def test_a_rewrite_that_saves_nothing_says_so(caplog: pytest.LogCaptureFixture) -> None:
    pruned = madtp.rewrite(Mixing(twice=False), (torch.randn(2, 30, 4),))
    (note,) = (note for note in pruned.report.notes if "saves nothing" in note)
    assert "every position" in note
    assert note in caplog.text


def test_one_that_costs_more_than_the_original_is_refused() -> None:
    with pytest.raises(RewriteError, match=r"saves nothing.*runs on kept tokens as well: up to"):
        madtp.rewrite(Mixing(twice=True), (torch.randn(2, 30, 4),))


class TwoTexts(nn.Module):
    """Two texts about each image, whose words look at it: streams of one batch have different numbers of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.towers = tiny.towers()

    def forward(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        image = self.towers.image(self.towers.patches(pixels).flatten(2).transpose(1, 2))
        patches = image.repeat_interleave(2, 0)
        words = self.towers.text(self.towers.words(input_ids.flatten(0, 1)), attention_mask.flatten(0, 1) == 0)
        seen = nn.functional.scaled_dot_product_attention(words[:, None], patches[:, None], patches[:, None])
        return (words + seen[:, 0])[:, 0].sum(-1)


def test_streams_of_several_rows_a_sample_are_priced_by_their_rows() -> None:
    made = tiny.samples(0, range(6))
    call = {
        "pixels": made["pixels"][:3],
        "input_ids": made["input_ids"].unflatten(0, (3, 2)),
        "attention_mask": made["attention_mask"].unflatten(0, (3, 2)),
    }
    few, many = (
        madtp.rewrite(TwoTexts(), call, config=madtp.PruningConfig(alignment_tokens=tokens)).report.notes
        for tokens in (2, 20_000)
    )
    assert not any("costs more" in note for note in few)
    (note,) = (note for note in many if "costs more" in note)
    assert "towers.image" in note
    assert "towers.text" in note
