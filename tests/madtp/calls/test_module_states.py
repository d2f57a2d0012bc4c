"""Training flags and dtypes of a tree whose modules change."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from madtp.calls.module_states import ModuleStates


def tree() -> nn.Sequential:
    shared = nn.ReLU()
    return nn.Sequential(nn.Sequential(nn.Linear(2, 2), shared), shared, nn.Dropout())


def removed(model: nn.Sequential) -> None:
    del model[2]


CHANGES: dict[str, Callable[[nn.Sequential], object]] = {
    "nothing": lambda model: None,
    "a mode": lambda model: model[0][0].eval(),
    "all modes": lambda model: model.eval(),
    "a dtype": lambda model: model[0][0].bfloat16(),
    "another parameter": lambda model: setattr(model[0][0], "weight", nn.Parameter(torch.zeros(2, 2).double())),
    "another module": lambda model: model[0].__setitem__(0, nn.Linear(2, 2).eval()),
    "one more": lambda model: model[0].add_module("more", nn.Dropout().eval()),
    "a child of a leaf": lambda model: model[2].add_module("more", nn.Dropout().eval()),
    "one less": removed,
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_state_is_that_of_the_tree_as_it_is(change: str) -> None:
    model = tree()
    states = ModuleStates(model)
    before = states()
    CHANGES[change](model)
    found = states()
    assert list(found.training) == [module.training for module in model.modules()]
    assert found.dtypes == tuple(one.dtype for one in model.parameters())
    assert (found == before) == (change == "nothing")


def test_a_copy_tells_of_its_own_tree() -> None:
    model = tree()
    states = ModuleStates(model)
    other, own = copy.deepcopy((states, model))
    own.eval()
    assert not any(other().training)
    assert all(states().training)
