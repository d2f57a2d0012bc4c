"""Hooks of the user run, and see and change what they would of the original; hooks of the model's own are part of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_vit import images, rewritten, vit
from torch import Tensor, nn

import madtp
from madtp import PrunedModel

BATCH = images(2, 0)


def called(model: nn.Module) -> list[str]:
    names: list[str] = []
    handles = [
        module.register_forward_hook(lambda module, args, output, name=name: names.append(name))
        for name, module in model.named_modules()
        if name.partition(".")[0] not in ("", "madtp")
    ]
    with torch.no_grad():
        model(BATCH)
    for handle in handles:
        handle.remove()
    return names


def test_hooks_on_all_modules_run_as_in_the_original_and_the_report_says_why() -> None:
    model, pruned = vit(2), rewritten(2)
    assert called(pruned) == called(model)
    assert any("hooks on" in note and "blocks.0" in note for note in pruned.report.notes)
    pruned(BATCH)
    assert all((kept < 65).any() for kept in pruned.token_counts().values())


def zeroed(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * 0


def doubled(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    return (args[0] * 2,)


@pytest.mark.parametrize("path", ["blocks.1", "blocks.1.attn", ""])
@torch.no_grad()
def test_a_hook_changes_what_it_would_change(path: str) -> None:
    model, pruned = vit(2), rewritten(2)
    for one in (model, pruned):
        one.get_submodule(path).register_forward_hook(zeroed)
        one.get_submodule(path).register_forward_pre_hook(doubled)
    with pruned.dense():
        torch.testing.assert_close(pruned(BATCH), model(BATCH))


def test_strict_makes_it_an_error() -> None:
    pruned = rewritten(1, strict=True)
    handle = pruned.get_submodule("blocks.0").register_forward_hook(zeroed)
    with pytest.raises(madtp.MadtpError, match=r"hooks on blocks\.0"):
        pruned(BATCH)
    handle.remove()
    pruned(BATCH)


def test_hooks_that_were_there_at_the_rewrite_see_no_tracing() -> None:
    model, seen = vit(1), []
    handle = model.get_submodule("blocks.0").register_forward_hook(lambda module, args, output: seen.append(output))
    pruned = madtp.rewrite(model, (BATCH,), config=madtp.PruningConfig(alignment_tokens=4))
    assert all(type(output) is Tensor for output in seen)
    handle.remove()
    seen.clear()
    with torch.no_grad():
        pruned(BATCH)
    assert len(seen) == 1, "the pruned model has a hook of its own"


class Reading(nn.Module):
    """Reads what a hook has kept of its second block, as feature extractors do."""

    def __init__(self) -> None:
        super().__init__()
        self.tower, self.kept = vit(2), []
        self.tower.get_submodule("blocks.1").register_forward_hook(self.keep)

    def keep(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.kept.append(output)

    def forward(self, pixels: Tensor) -> Tensor:
        self.tower(pixels)
        return self.kept.pop()[:, 0]


def test_a_hook_that_the_model_needs_is_part_of_it() -> None:
    model = Reading().eval()
    pruned = madtp.rewrite(model, (BATCH,), config=madtp.PruningConfig(alignment_tokens=4))
    with torch.no_grad(), pruned.dense():
        torch.testing.assert_close(pruned(BATCH), model(BATCH))
    pruned(BATCH).sum().backward()
    assert not pruned.report.unpruned
    assert any((kept < 65).any() for kept in pruned.token_counts().values())
    assert pruned.get_parameter("tower.blocks.0.attn.qkv.weight").grad is not None


def test_weights_that_torch_computes_in_a_hook_are_followed() -> None:
    model = vit(1)
    mlp = model.get_submodule("blocks.0.mlp.fc1")
    nn.utils.weight_norm(mlp)
    pruned: PrunedModel = madtp.rewrite(model, (BATCH,), config=madtp.PruningConfig(alignment_tokens=4))
    with torch.no_grad():
        pruned.get_parameter("blocks.0.mlp.fc1.weight_g").mul_(2)
        with pruned.dense():
            torch.testing.assert_close(pruned(BATCH), model(BATCH))
    assert not pruned.report.unpruned
