"""Models that reach their modules past the tree: every parameter gets its gradient, new weights arrive, the original stays."""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from joint_stream_models import Block
from model_case import WIDTH
from rewritten_models import gap
from torch import Tensor, nn

import madtp
from madtp.calls.copies import share


class Reaching(nn.Module):
    """A tower whose forward finds its blocks by ``reach``, which a subclass sets."""

    reach: Callable[[], Any]

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patch = nn.Conv2d(3, WIDTH, 8, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patch(pixels).flatten(2).transpose(1, 2)
        for block in self.reach():
            x = block(x)
        found: Tensor = self.head(x.mean(1))
        return found


class Holder:
    """An object that is no module."""

    def __init__(self, blocks: Any) -> None:
        self.blocks = blocks


def by_list(model: Reaching) -> None:
    order = list(model.blocks)
    model.order, model.reach = order, lambda: model.order


def by_nested(model: Reaching) -> None:
    model.order = {"stages": OrderedDict(first=(model.blocks[0],), second=deque([model.blocks[1]]))}
    model.reach = lambda: [block for stage in model.order["stages"].values() for block in stage]


def by_bound_methods(model: Reaching) -> None:
    model.order = [block.forward for block in model.blocks]
    model.reach = lambda: model.order


def by_closure(model: Reaching) -> None:
    first, second = model.blocks

    def reach() -> list[nn.Module]:
        return [first, second]

    model.reach = reach


def by_default(model: Reaching) -> None:
    model.reach = lambda blocks=model.blocks: blocks  # type: ignore[misc]


def by_partial(model: Reaching) -> None:
    model.reach = functools.partial(list, model.blocks)


def by_object(model: Reaching) -> None:
    model.holder = Holder(model.blocks)
    model.reach = lambda: model.holder.blocks


WAYS = (by_list, by_nested, by_bound_methods, by_closure, by_default, by_partial, by_object)


def made(way: Callable[[Reaching], None]) -> Reaching:
    model = Reaching()
    way(model)
    return model


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_gradients_and_new_weights_reach_every_parameter(way: Callable[[Reaching], None]) -> None:
    model, pixels = made(way), torch.randn(3, 3, 32, 32)
    before = copy.deepcopy(model.state_dict())
    pruned = madtp.rewrite(model, (pixels,), config=madtp.PruningConfig(alignment_tokens=8))
    pruned.train()(pixels).square().sum().backward()
    assert not [name for name, own in model.named_parameters() if own.grad is None or not own.grad.any()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
        with pruned.eval().dense():
            assert gap(model.eval()(pixels), pruned(pixels)) < 1e-5
    assert all(type(own) is nn.Parameter for own in model.parameters())
    assert model.state_dict().keys() == before.keys()


class Momentum(nn.Module):
    """Keeps a twin that follows, by pairs of modules in a plain list, as contrastive training does in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.tower, self.twin = made(by_list), made(by_list)
        self.pairs = [[self.tower, self.twin]]

    def forward(self, pixels: Tensor) -> Tensor:
        with torch.no_grad():
            for own, other in self.pairs:
                for parameter, copied in zip(own.parameters(), other.parameters(), strict=True):
                    copied.data = 0.9 * copied.data + 0.1 * parameter.data
        found: Tensor = self.tower(pixels) + self.twin(pixels).detach()
        return found


def test_the_model_of_the_user_is_whole_afterwards() -> None:
    model, pixels = Momentum(), torch.randn(3, 3, 32, 32)
    pruned = madtp.rewrite(model, (pixels,), config=madtp.PruningConfig(alignment_tokens=8))
    assert {one.device.type for one in model.parameters()} == {"cpu"}
    assert {type(one) for one in model.parameters()} == {nn.Parameter}
    assert pruned.report.sites
    assert bool(model(pixels).isfinite().all())


def test_copies_share_what_originals_share() -> None:
    model = Reaching()
    both = [model.blocks[0], model]
    model.one, model.other = both, {"both": both}
    model.none, model.itself = [1, "two"], []
    model.itself.append(model.itself)
    copied = share(model)
    assert copied.one is copied.other["both"]  # type: ignore[index]
    assert copied.one[0] is copied.blocks[0]  # type: ignore[index]
    assert copied.one[1] is copied  # type: ignore[index]
    assert model.one == [model.blocks[0], model]
    assert copied.none is model.none
    assert copied.itself is model.itself


def test_closures_that_share_a_cell_still_do() -> None:
    model = Reaching()
    current = model.blocks[0]

    def reach() -> nn.Module:
        return current

    def turn() -> None:
        nonlocal current
        current = model.blocks[1]

    model.reach, model.turn = reach, turn
    copied = share(model)
    copied.turn()
    assert copied.reach() is copied.blocks[1]  # type: ignore[index]
    assert model.reach() is model.blocks[0]
