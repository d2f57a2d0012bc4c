"""Training a pruned model as the original is trained: checkpoints, functions with a backward of their own, autocast, modes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_vit import images, rewritten, vit
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from two_towers import TwoTowers

import madtp
from madtp import PrunedModel

BATCH = images(2, 0)
CONFIG = madtp.PruningConfig(alignment_tokens=4)


def without_gradient(model: nn.Module) -> set[str]:
    return {
        name for name, parameter in model.named_parameters() if parameter.grad is None and not name.startswith("madtp.")
    }


def learns_what_the_original_does(model: nn.Module) -> PrunedModel:
    """The rewritten model, of which the same parameters get a gradient."""
    model(BATCH).sum().backward()
    wanted = without_gradient(model)
    model.zero_grad()
    pruned = madtp.rewrite(model, (BATCH,), config=CONFIG)
    pruned(BATCH).sum().backward()
    assert without_gradient(pruned) == wanted
    return pruned


def test_the_first_call_after_a_rewrite_captures_nothing() -> None:
    pruned = madtp.rewrite(vit(1), (BATCH,), config=CONFIG)
    before = pruned.madtp.programs
    pruned(BATCH)
    assert pruned.madtp.programs == before


class Checkpointed(nn.Module):
    """Runs its blocks inside checkpoints, in training or always."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.tower, self.reentrant = vit(2), reentrant

    def forward(self, pixels: Tensor) -> Tensor:
        tower: Any = self.tower
        x = tower._pos_embed(tower.patch_embed(pixels))
        for block in tower.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return tower.head(tower.norm(x)[:, 0])


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_inside_the_model_keep_their_gradients(reentrant: bool) -> None:
    pruned = learns_what_the_original_does(Checkpointed(reentrant).train())
    assert all((kept < 65).any() for kept in pruned.token_counts().values())


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_around_the_first_training_step(reentrant: bool) -> None:
    pruned = rewritten(2).train()
    pixels = BATCH.clone().requires_grad_()
    checkpoint(pruned, pixels, use_reentrant=reentrant).sum().backward()
    assert without_gradient(pruned) == set()


class Rounded(torch.autograd.Function):
    """Rounds, and passes gradients on as if it did not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (x * 64).round() / 64

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


rounded = Rounded.apply


def halved(x: Tensor) -> Tensor:
    if x.requires_grad:
        x.register_hook(lambda gradient: gradient / 2)
    return x


class Rounding(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.tower, self.function = vit(2), function

    def forward(self, pixels: Tensor) -> Tensor:
        return self.tower.forward_head(self.function(self.tower.forward_features(pixels)))


@pytest.mark.parametrize(
    ("function", "name"),
    [(lambda x: Rounded.apply(x), "Rounded"), (rounded, "Rounded"), (halved, "register_hook")],
    ids=["by its class", "by another name", "a hook on a tensor"],
)
def test_a_backward_pass_of_ones_own_is_kept_and_told(function: Callable[[Tensor], Tensor], name: str) -> None:
    pruned = learns_what_the_original_does(Rounding(function))
    (note,) = pruned.report.unpruned
    assert name in str(note)
    with torch.no_grad():
        pruned(BATCH)
    assert all((kept < 65).any() for kept in pruned.token_counts().values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_outputs_have_the_originals_dtypes_under_autocast(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = TwoTowers(batch_first=True, norm_first=True, mean=False).eval()
    inputs = {
        "pixels": torch.randn(4, 3, 32, 32),
        "input_ids": torch.randint(1, 90, (4, 7)),
        "attention_mask": torch.ones(4, 7, dtype=torch.long),
    }
    pruned: PrunedModel = madtp.rewrite(model, inputs, config=CONFIG)
    with torch.autocast("cpu", dtype):
        wanted, found = model(**inputs), pruned(**inputs)
        with pruned.dense():
            dense = pruned(**inputs)
    assert {name: x.dtype for name, x in found.items()} == {name: x.dtype for name, x in wanted.items()}
    for name, value in wanted.items():
        torch.testing.assert_close(dense[name], value, atol=0.05, rtol=0.05)
    assert all(x.dtype == torch.float32 for x in pruned(**inputs).values())
