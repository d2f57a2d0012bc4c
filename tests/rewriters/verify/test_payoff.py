"""A stream that pruning cannot pay for is noted in the report, and only then."""

from __future__ import annotations

import pytest
import tiny_training as tiny
from small_vit import images, vit
from torch import Tensor, nn

import madtp


@pytest.mark.parametrize(("tokens", "noted"), [(4, False), (20_000, True)])
def test_a_stream_that_pays_for_no_guidance_is_noted(tokens: int, noted: bool) -> None:
    pruned = madtp.rewrite(vit(depth=2), {"x": images(2, 0)}, config=madtp.PruningConfig(alignment_tokens=tokens))
    assert any("costs more than it can save from blocks.0 on" in note for note in pruned.report.notes) is noted
    assert (f"than {tokens} alignment tokens pay for" in "".join(pruned.report.notes)) is noted


def test_without_guidance_there_is_nothing_to_pay() -> None:
    config = madtp.PruningConfig(alignment_tokens=20_000, alignment=False)
    assert madtp.rewrite(vit(depth=2), {"x": images(2, 0)}, config=config).report.notes == []


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
