"""Fixed token counts."""

from __future__ import annotations

import pytest
import timm
import torch

import madtp
from madtp.errors import ConfigError


def _pruned() -> tuple[madtp.PrunedModel, torch.Tensor]:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=64, num_classes=5).eval()
    images = torch.randn(4, 3, 64, 64)
    return madtp.rewrite(model, (images,), config=madtp.PruningConfig(temperature=4.0, alignment_tokens=8)), images


def test_frozen_counts_are_the_same_for_every_sample_and_batch() -> None:
    pruned, images = _pruned()
    counts = madtp.freeze(pruned, [(images,)])
    assert set(counts) == {site.name for site in pruned.report.sites}
    for batch in (images[:1], torch.randn(3, 3, 64, 64)):
        with torch.no_grad():
            pruned(batch)
        for name, kept in pruned.token_counts().items():
            assert set(kept.tolist()) <= {counts[name] + 1, counts[name] + 2}, name


def test_nothing_to_freeze_is_an_error() -> None:
    pruned, images = _pruned()
    with pytest.raises(ConfigError, match="no batches"):
        madtp.freeze(pruned, [])
    pruned.temperature = 0.0
    with pytest.raises(ConfigError, match="pruning is off"):
        madtp.freeze(pruned, [(images,)])
