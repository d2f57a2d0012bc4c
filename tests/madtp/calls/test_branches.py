"""Python's ``if`` on tensors: fixed to what it was, checked at every call, and captured anew where it goes another way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rewritten_models import gap
from small_vit import images, vit
from torch import Tensor, nn

import madtp
from madtp.programs.program_cache import BRANCHES, MANY_WAYS


class Guarded(nn.Module):
    """Clamps what overflows, as models in half precision do; darkens bright images."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = vit(depth=2)

    def forward(self, x: Tensor) -> Tensor:
        if x.mean() > 1:
            x = x / 2
        tokens: Any = self.vit._pos_embed(self.vit.patch_embed(x))  # type: ignore[operator]
        for block in self.vit.blocks:  # type: ignore[union-attr]
            tokens = block(tokens)
            if torch.isinf(tokens).any() or torch.isnan(tokens).any():
                tokens = tokens.clamp(-1e4, 1e4)
        return tokens.mean(1)


class Wandering(Guarded):
    """Goes another way for every tenth of brightness."""

    def forward(self, x: Tensor) -> Tensor:
        for step in range(10):
            if x.mean() > step / 10:
                x = x + 0.01
        return super().forward(x)


class Host(nn.Module):
    """Python that reads a number stays in charge; the guarded part is a region."""

    def __init__(self) -> None:
        super().__init__()
        self.part = Guarded()

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x * int(x.abs().sum().item() > 0))


@pytest.mark.parametrize("kind", [Guarded, Host])
@torch.no_grad()
def test_each_way_is_pruned(kind: type[nn.Module]) -> None:
    model = kind().eval()
    pruned = madtp.rewrite(model, (images(2, 0),))
    assert pruned.report.capture == ("whole" if kind is Guarded else "regions")
    for inputs in (images(2, 1), images(2, 1) + 3, images(2, 2)):
        with pruned.dense():
            assert gap(model(inputs), pruned(inputs)) < 1e-5
        pruned(inputs)
        assert all(int(count.max()) < 65 for count in pruned.token_counts().values())
    assert not pruned.report.notes


@pytest.mark.slow
@torch.no_grad()
def test_an_exported_model_keeps_the_way_of_its_example_and_refuses_the_other(tmp_path: Path) -> None:
    pruned = madtp.rewrite(Guarded().eval(), (images(2, 0),))
    madtp.freeze(pruned, [(images(2, 1),), (images(2, 1) + 3,)])
    for inputs, other in ((images(2, 1), images(2, 1) + 3), (images(2, 1) + 3, images(2, 1))):
        madtp.export(pruned, tmp_path / "model.pt2", (inputs,))
        module = torch.export.load(tmp_path / "model.pt2").module()
        assert gap(pruned(inputs), module(inputs)) < 1e-5
        with pytest.raises(RuntimeError, match="goes another way"):
            module(other)


@torch.no_grad()
def test_one_sample_may_go_another_way() -> None:
    model = Guarded().eval()
    inputs = torch.cat([images(1, 0) + 1.5, images(1, 1)])
    pruned = madtp.rewrite(model, (inputs,))
    for row in range(2):
        with pruned.dense():
            assert gap(model(inputs[row : row + 1]), pruned(inputs[row : row + 1])) < 1e-5


@torch.no_grad()
def test_too_many_ways_run_as_the_original_and_say_so() -> None:
    model = Wandering().eval()
    pruned = madtp.rewrite(model, (images(2, 0),))
    for step in range(BRANCHES + 2):
        inputs = images(2, 0) - images(2, 0).mean() + step / 10
        with pruned.dense():
            assert gap(model(inputs), pruned(inputs)) < 1e-5
    assert any(MANY_WAYS in note for note in pruned.report.notes)


def test_training_goes_its_own_way() -> None:
    pruned = madtp.rewrite(Guarded().train(), (images(2, 0),))
    pruned(images(2, 0)).sum().backward()
    assert pruned.get_parameter("vit.pos_embed").grad is not None


class LayerDrop(Guarded):
    """Leaves blocks out at random in training."""

    def forward(self, x: Tensor) -> Tensor:
        tokens: Any = self.vit._pos_embed(self.vit.patch_embed(x))  # type: ignore[operator]
        for block in self.vit.blocks:  # type: ignore[union-attr]
            if self.training and torch.rand([]) < 0.5:
                continue
            tokens = block(tokens)
        return tokens.mean(1)


def test_what_python_draws_in_a_capture_is_what_the_call_draws() -> None:
    """A way that was recorded with other random numbers than those of the call would serve no call."""
    torch.manual_seed(0)
    model = LayerDrop().eval()
    pruned = madtp.rewrite(model, (images(2, 0),))
    model.train()
    pruned.train()
    for seed in range(6):
        torch.manual_seed(seed)
        wanted = model(images(2, 0))
        torch.manual_seed(seed)
        with pruned.dense():
            assert gap(wanted, pruned(images(2, 0))) < 1e-5
    ways = [str(one) for one in pruned.report.unpruned]
    assert all(MANY_WAYS in way for way in ways), ways
