"""``PruningConfig(layers=...)``: tokens are dropped in the chosen blocks alone, and the others keep their fused attention."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from rewritten_models import gap
from small_vit import images, rewritten, vit

import madtp
from madtp.errors import NoSiteError


def test_tokens_are_dropped_in_the_chosen_layers_alone() -> None:
    pruned = rewritten(layers=(1, 3), temperature=4.0)
    assert [site.name for site in pruned.report.sites] == ["blocks.1", "blocks.3"]
    assert [site.layer for site in pruned.report.sites] == [1, 3]
    assert {refusal.block for refusal in pruned.report.refusals} == {"blocks.0", "blocks.2"}
    assert all(refusal.by_policy for refusal in pruned.report.refusals)
    assert not pruned.report.notes, "it was asked for"
    pruned(images(2, 1))
    counts = pruned.token_counts()
    assert list(counts) == ["blocks.1", "blocks.3"]
    assert all(int(n) < 65 for n in counts["blocks.1"])
    with pruned.dense(), torch.no_grad():
        assert gap(pruned(images(2, 1)), vit()(images(2, 1))) < 1e-5


def test_the_others_compute_no_statistics() -> None:
    pruned, attend = rewritten(layers=(3,)), torch.nn.functional.scaled_dot_product_attention
    with torch.no_grad(), patch.object(torch.nn.functional, "scaled_dot_product_attention", wraps=attend) as fused:
        pruned(images(2, 1))
    assert fused.call_count == 3


def test_a_path_may_choose() -> None:
    pruned = rewritten(layers={"blocks.[01]": (), "*": (2,)})
    assert [site.name for site in pruned.report.sites] == ["blocks.2"]


def test_a_layer_that_is_not_there_is_told(caplog: pytest.LogCaptureFixture) -> None:
    pruned = madtp.rewrite(vit(2), (images(2, 0),), config=madtp.PruningConfig(layers={"blocks.*": (1, 7)}))
    assert any("config.layers names 7 of 'blocks.*'" in note for note in pruned.report.notes)
    assert "config.layers names 7" in caplog.text
    for nothing in ((), (7,)):
        with pytest.raises(NoSiteError, match="leaves out all of its blocks"):
            madtp.rewrite(vit(2), (images(2, 0),), config=madtp.PruningConfig(layers=nothing))
