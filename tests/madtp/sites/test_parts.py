"""A site computes what its parts ask for, and no more."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import madtp

DEPTH = 3
FUSED = "aten._scaled_dot_product_flash_attention_for_cpu.default"


class Calls(TorchDispatchMode):
    """Counts the operations that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[str(func)] += 1
        return func(*args, **(kwargs or {}))


def transformer() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", depth=DEPTH, num_classes=7).eval()


@torch.no_grad()
def calls_of(model: nn.Module, images: torch.Tensor) -> Counter[str]:
    model(images)
    with Calls() as calls:
        model(images)
    return calls.count


def test_a_site_costs_at_most_sixty_calls() -> None:
    model, images = transformer(), torch.randn(2, 3, 224, 224)
    pruned = madtp.rewrite(model, (images,)).eval()
    extra = calls_of(pruned, images[:1]).total() - calls_of(model, images[:1]).total()
    assert set(pruned.token_counts()) == {f"blocks.{layer}" for layer in range(DEPTH)}
    assert extra / DEPTH <= 60


@pytest.mark.parametrize(
    ("settings", "fused", "guided"),
    [
        ({}, False, True),
        ({"alignment": False}, False, False),
        ({"selection": "class_attention"}, False, True),  # as many as the method keeps
        ({"selection": "class_attention", "keep_ratio": 0.5}, False, True),  # merged by importance
        ({"selection": "class_attention", "keep_ratio": 0.5, "merge": False}, True, False),
        ({"score_queries": 16}, True, True),
    ],
)
def test_only_what_is_asked_for_is_computed(settings: dict[str, Any], fused: bool, guided: bool) -> None:
    images = torch.randn(2, 3, 224, 224)
    pruned = madtp.rewrite(transformer(), (images,), config=madtp.PruningConfig(**settings)).eval()
    asked: list[int] = []
    alignment = pruned._control.alignment
    if alignment is not None:
        alignment.register_forward_hook(lambda *given: asked.append(1))
    count = calls_of(pruned, images)
    assert (count[FUSED] >= DEPTH) == fused
    assert bool(asked) == guided
    kept = pruned.token_counts()["blocks.2"]
    assert bool((kept < 197).all())
