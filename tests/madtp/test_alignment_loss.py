"""The alignment loss of rewritten models: with several rows a sample, and where there is nothing to align."""

from __future__ import annotations

import logging

import pytest
import torch
from joint_stream_models import Encoder, Patches, Words
from model_case import WIDTH
from torch import Tensor, nn

import madtp
from madtp.errors import MadtpError
from madtp.pruned import PrunedModel


class SeveralImages(nn.Module):
    """Views or frames of a sample ``[B, V, 3, 32, 32]`` through one tower, then joined for a second encoder; a text beside."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches, self.words = Patches(), Words()
        self.first, self.second, self.text = Encoder(2), Encoder(2), Encoder(2)
        self.narrow, self.wide = nn.Linear(WIDTH, WIDTH // 2), nn.Linear(WIDTH // 2, WIDTH)
        self.head = nn.Linear(2 * WIDTH, 3)

    def forward(self, views: Tensor, input_ids: Tensor) -> Tensor:
        batch = views.shape[0]
        x = self.first(self.patches(views.flatten(0, 1)))
        x = self.second(self.wide(self.narrow(x)).reshape(batch, -1, WIDTH))
        found: Tensor = self.head(torch.cat([x.mean(1), self.text(self.words(input_ids)).mean(1)], 1))
        return found


def inputs(batch: int, views: int) -> dict[str, Tensor]:
    return {"views": torch.randn(batch, views, 3, 32, 32), "input_ids": torch.randint(1, 40, (batch, 12))}


def rewritten(**settings: object) -> PrunedModel:
    config = madtp.PruningConfig(alignment_tokens=8, **settings)  # type: ignore[arg-type]
    return madtp.rewrite(SeveralImages().eval(), inputs(3, 2), config=config)


def test_several_rows_of_a_sample_count_with_their_mean() -> None:
    pruned, given = rewritten(), inputs(3, 2)
    output = pruned(**given)
    loss = pruned.alignment_loss()
    (output.square().mean() + loss).backward()
    alignment = pruned.madtp.control.alignment
    assert alignment is not None
    assert bool(alignment.tokens.grad.any())
    assert 0 < loss.item() < 2
    # The mean over samples is that of the samples one by one.
    alone = []
    for sample in range(3):
        pruned(**{name: value[sample : sample + 1] for name, value in given.items()})
        alone.append(pruned.alignment_loss())
    torch.testing.assert_close(torch.stack(alone).mean(), loss)


@pytest.mark.parametrize("tower", ["image", "text"])
def test_with_one_modality_it_is_zero_and_a_note_says_so_once(tower: str, caplog: pytest.LogCaptureFixture) -> None:
    pruned = rewritten(towers=(tower,))
    with caplog.at_level(logging.WARNING, "madtp"):
        for _ in range(2):
            output = pruned(**inputs(3, 2))
            loss = pruned.alignment_loss()
            assert loss.item() == 0.0
            (output.square().mean() + loss).backward()
    assert [note for note in pruned.report.notes if f"only the {tower} is pruned" in note] == pruned.report.notes[-1:]
    assert caplog.text.count(f"only the {tower} is pruned") == 1


@pytest.mark.parametrize("why", ["no gradients", "no pruning", "no alignment tokens"])
def test_without_features_it_says_what_is_missing(why: str) -> None:
    pruned = rewritten(alignment=why != "no alignment tokens")
    if why == "no pruning":
        pruned.temperature = 0.0
    with torch.set_grad_enabled(why != "no gradients"):
        pruned(**inputs(2, 2))
    with pytest.raises(MadtpError, match="gradients enabled and temperature above 0 on a model with alignment tokens"):
        pruned.alignment_loss()
