"""Copies of module trees: attributes that are called as torch's own are the host's all the same."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from madtp.calls.copies import share


class Counting(nn.Module):
    """Counts hooks in a number, and has some."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.n_hooks = 3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) * self.n_hooks


def test_a_copy_has_hooks_of_its_own_and_every_other_attribute() -> None:
    model = Counting()
    copy = share(model)
    copy.register_forward_hook(lambda module, args, output: torch.zeros(1))
    x = torch.randn(1, 2)
    assert torch.equal(copy(x), torch.zeros(1))
    assert torch.equal(model(x), model.layer(x) * 3)
    assert copy.layer is not model.layer
    assert copy.layer.weight is model.layer.weight


@dataclass(frozen=True)
class Frozen:
    layer: nn.Module


@dataclass(slots=True)
class Slots:
    layer: nn.Module


class Pair(NamedTuple):
    layer: nn.Module
    factor: int = 2


class Layers(list[nn.Module]):
    """A list of a class of its own."""


class Holder:
    def __init__(self, layer: nn.Module) -> None:
        self.layer, self.names = layer, ["a"]


HOLDERS: dict[str, tuple[Callable[[nn.Module], Any], Callable[[Any], Any]]] = {
    "namespace": (lambda layer: SimpleNamespace(layer=layer), lambda held: held.layer),
    "namespace in a namespace": (
        lambda layer: SimpleNamespace(a=SimpleNamespace(b=[layer])),
        lambda held: held.a.b[0],
    ),
    "frozen dataclass": (Frozen, lambda held: held.layer),
    "slots": (Slots, lambda held: held.layer),
    "named tuple": (Pair, lambda held: held.layer),
    "object": (Holder, lambda held: held.layer),
    "list of its own class": (lambda layer: Layers([layer]), lambda held: held[0]),
    "weak reference": (weakref.ref, lambda held: held()),
}


@pytest.mark.parametrize("kind", HOLDERS)
def test_what_holds_modules_holds_the_copies(kind: str) -> None:
    make, look = HOLDERS[kind]
    model = Counting()
    model.held = make(model.layer)
    before = model.held
    copy = share(model)
    assert look(copy.held) is copy.layer
    assert type(copy.held) is type(model.held)
    assert model.held is before
    assert look(model.held) is model.layer


def test_objects_without_modules_stay_the_objects_that_they_are() -> None:
    model = Counting()
    model.held = [Holder(nn.Linear(2, 2)), SimpleNamespace(x=torch.zeros(2)), Pair(nn.ReLU())]  # none of the tree
    assert share(model).held is model.held
