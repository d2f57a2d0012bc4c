"""Training flags of a tree whose modules change."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
from torch import nn

from madtp.calls.training_modes import TrainingModes


def tree() -> nn.Sequential:
    shared = nn.ReLU()
    return nn.Sequential(nn.Sequential(nn.Linear(2, 2), shared), shared, nn.Dropout())


def removed(model: nn.Sequential) -> None:
    del model[2]


CHANGES: dict[str, Callable[[nn.Sequential], object]] = {
    "nothing": lambda model: None,
    "a mode": lambda model: model[0][0].eval(),
    "all modes": lambda model: model.eval(),
    "another module": lambda model: model[0].__setitem__(0, nn.Linear(2, 2).eval()),
    "one more": lambda model: model[0].add_module("more", nn.Dropout().eval()),
    "a child of a leaf": lambda model: model[2].add_module("more", nn.Dropout().eval()),
    "one less": removed,
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_modes_are_those_of_the_tree_as_it_is(change: str) -> None:
    model = tree()
    modes = TrainingModes(model)
    before = modes()
    CHANGES[change](model)
    assert list(modes()) == [module.training for module in model.modules()]
    assert (modes() == before) == (change == "nothing")


def test_a_copy_tells_of_its_own_tree() -> None:
    model = tree()
    modes = TrainingModes(model)
    other, own = copy.deepcopy((modes, model))
    own.eval()
    assert not any(other())
    assert all(modes())
