"""Quantised weights: a pruned model runs with them, and what does not work says so and how to do it."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from small_vit import images, rewritten, vit
from torch import nn

import madtp

BATCH = images(2, 0)
# torch announces that its own quantisation moves to a library.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


def quantised(model: nn.Module) -> nn.Module:
    found: nn.Module = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    return found


@torch.no_grad()
def test_a_pruned_model_can_be_quantised_and_captures_nothing_anew() -> None:
    pruned = rewritten(2)
    found = quantised(pruned)
    assert isinstance(found, madtp.PrunedModel)
    before = found.madtp.programs
    torch.testing.assert_close(found(BATCH), pruned(BATCH), atol=0.05, rtol=0.05)
    assert found.madtp.programs == before
    assert all((kept < 65).any() for kept in found.madtp.token_counts().values())


def test_it_cannot_be_saved_and_the_message_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(madtp.MadtpError, match=r"LinearPackedParams.*Save the model before it is quantised"):
        madtp.save(quantised(rewritten(2)), tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_a_quantised_model_is_not_rewritten_and_the_message_says_what_to_do() -> None:
    with pytest.raises(madtp.MadtpError, match=r"quantised weights \(.*rewrite the model before it is quantised"):
        madtp.rewrite(quantised(vit(1)), (BATCH,))


@torch.no_grad()
def test_weights_of_torchao(tmp_path: Path) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    pruned = rewritten(1)
    for config in (torchao.Int8WeightOnlyConfig(), torchao.Int8DynamicActivationInt8WeightConfig()):
        found = copy.deepcopy(pruned)
        torchao.quantize_(found, config)
        before = found.madtp.programs
        torch.testing.assert_close(found(BATCH), pruned(BATCH), atol=0.05, rtol=0.05)
        assert found.madtp.programs == before
        with pytest.raises(madtp.MadtpError, match=r"quantise what madtp\.load returns"):
            madtp.save(found, tmp_path / "folder")
