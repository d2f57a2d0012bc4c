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


def transformer(size: int = 224) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", depth=DEPTH, img_size=size, num_classes=7).eval()


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
    alignment = pruned.madtp.control.alignment
    if alignment is not None:
        alignment.register_forward_hook(lambda *given: asked.append(1))
    count = calls_of(pruned, images)
    assert (count[FUSED] >= DEPTH) == fused
    assert bool(asked) == guided
    kept = pruned.token_counts()["blocks.2"]
    assert bool((kept < 197).all())


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"alignment": False},
        {"alignment": False, "merge": False},
        {"min_tokens": 12},
        {"score_queries": 16},
        {"selection": "class_attention"},
        {"selection": "class_attention", "keep_ratio": 0.4, "merge": False},
        {"temperature": 1e5},
    ],
)
@torch.no_grad()
def test_a_sample_does_not_depend_on_its_batch(settings: dict[str, Any]) -> None:
    torch.manual_seed(1)
    images = torch.randn(4, 3, 112, 112).cumsum(-1).mul(torch.tensor([0.01, 0.1, 1.0, 3.0])[:, None, None, None])
    pruned = madtp.rewrite(transformer(112), (images,), config=madtp.PruningConfig(**settings)).eval()
    together = pruned(images)
    kept = pruned.kept_tokens()
    assert len({int(own.sum()) for own in kept["blocks.1"]}) > 1 or "keep_ratio" in settings
    for sample in range(4):
        alone = pruned(images[sample : sample + 1])
        for site, own in pruned.kept_tokens().items():
            assert torch.equal(own[0], kept[site][sample]), site
        torch.testing.assert_close(alone[0], together[sample], rtol=1e-3, atol=1e-4)


def test_a_gain_beyond_all_numbers_warns_of_nothing(recwarn: pytest.WarningsRecorder) -> None:
    images = torch.randn(2, 3, 224, 224)
    pruned = madtp.rewrite(transformer(), (images,)).eval()
    pruned.gain = 1e300
    assert bool(pruned(images).isfinite().all())
    assert not [warning for warning in recwarn if issubclass(warning.category, RuntimeWarning)]
