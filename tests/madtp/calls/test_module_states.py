"""What a capture depends on, of a tree whose modules and attributes change."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from madtp.calls.module_states import ModuleStates


def tree() -> nn.Sequential:
    shared = nn.ReLU()
    return nn.Sequential(nn.Sequential(nn.Linear(2, 2), shared), shared, nn.Dropout())


def removed(model: nn.Sequential) -> None:
    del model[2]


@dataclass(slots=True)
class Slots:
    width: int = 2


class Entries(dict[str, object]):
    """A dict whose entries are attributes, as many configurations are."""

    def __getattr__(self, name: str) -> object:
        return self[name]


class Switched(nn.Module):
    """A module with a switch, and a configuration that its parent shares."""

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.linear, self.quick, self.sizes = nn.Linear(2, 2), True, (2, 3)
        self.config, self.scale = config, 0.5
        self.slots, self.entries = Slots(), Entries(quick=True, deep=Entries(width=1))
        self.nested = SimpleNamespace(a=SimpleNamespace(b=SimpleNamespace(c=SimpleNamespace(width=1))))
        self.by_number, self.by_lists = {0: True, 1: False}, {"a": [1, 2], "b": [3]}
        self.by_tensors, self.by_functions = {"a": torch.zeros(2)}, {"a": torch.relu}
        self.register_buffer("table", None)


def switched() -> nn.Sequential:
    config = SimpleNamespace(width=2, inner=SimpleNamespace(deep=False), names={"a": 1})
    return nn.Sequential(Switched(config), Switched(config))


CHANGES: dict[str, Callable[[nn.Sequential], object]] = {
    "nothing": lambda model: None,
    "a mode": lambda model: model[0].eval(),
    "a mode of dropout": lambda model: model[2].eval(),
    "all modes": lambda model: model.eval(),
    "a dtype": lambda model: model[0][0].bfloat16(),
    "another parameter": lambda model: setattr(model[0][0], "weight", nn.Parameter(torch.zeros(2, 2).double())),
    "one more": lambda model: model[0].add_module("more", nn.Dropout().eval()),
    "one less": removed,
}
SWITCHES: dict[str, Callable[[nn.Sequential], object]] = {
    "a switch": lambda model: setattr(model[1], "quick", False),
    "a number": lambda model: setattr(model[0], "scale", 0.25),
    "a tuple": lambda model: setattr(model[0], "sizes", (2, 4)),
    "a further attribute": lambda model: setattr(model[0], "more", 1),
    "a configuration": lambda model: setattr(model[0].config, "width", 3),
    "a configuration inside it": lambda model: setattr(model[1].config.inner, "deep", True),
    "another configuration": lambda model: setattr(model[1], "config", SimpleNamespace(width=5)),
    "a dict": lambda model: model[0].config.names.update(a=2),
    "a configuration in slots": lambda model: setattr(model[0].slots, "width", 3),
    "an entry of a dict of a class of its own": lambda model: model[0].entries.update(quick=False),
    "an entry inside it": lambda model: model[0].entries["deep"].update(width=2),
    "a deep configuration, with nothing plain on the way": lambda model: setattr(model[0].nested.a.b.c, "width", 2),
    "another dict by numbers": lambda model: setattr(model[0], "by_number", {0: False, 1: False}),
    "another dict of lists": lambda model: setattr(model[0], "by_lists", {"a": [1, 2], "b": [4]}),
    "another dict of tensors": lambda model: setattr(model[0], "by_tensors", {"a": torch.ones(2)}),
    "another dict of functions": lambda model: setattr(model[0], "by_functions", {"a": torch.tanh}),
    "a buffer in place of None": lambda model: setattr(model[0], "table", torch.zeros(2)),
    "a frozen parameter": lambda model: model[0].linear.requires_grad_(False),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_state_is_that_of_the_tree_as_it_is(change: str) -> None:
    model = tree()
    states = ModuleStates(model)
    before = states()
    CHANGES[change](model)
    found = states()
    moded = [module for module in model.modules() if not isinstance(module, (nn.Linear, nn.ReLU))]
    assert list(found.training) == [module.training for module in moded]
    assert set(found.dtypes) - {None} <= {one.dtype for one in model.parameters()}
    assert (found == before) == (change == "nothing")


@pytest.mark.parametrize("change", SWITCHES)
def test_switches_belong_to_the_state(change: str) -> None:
    model = switched()
    states = ModuleStates(model)
    before = states()
    assert states() == before
    SWITCHES[change](model)
    assert states() != before


def test_equal_containers_in_place_of_others_are_no_other_state() -> None:
    model = switched()
    states = ModuleStates(model)
    before = states()
    model[0].by_number, model[0].by_lists = {0: True, 1: False}, {"a": [1, 2], "b": [3]}
    assert states() == before


def test_without_gradients_it_does_not_matter_who_wants_one() -> None:
    model = switched()
    states = ModuleStates(model)
    with torch.no_grad():
        before = states()
        model[0].linear.requires_grad_(False)
        assert states() == before
    assert states() != before


@pytest.mark.parametrize("kind", ["parameters", "buffers"])
def test_tied_tensors_are_told_from_untied_ones(kind: str) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.BatchNorm1d(2)), nn.Linear(2, 2), nn.BatchNorm1d(2))
    if kind == "parameters":
        model[2].weight = model[0].weight
    else:
        model[3].running_mean = model[1][0].running_mean
    states = ModuleStates(model)
    tied = states()
    assert states() == tied == copy.deepcopy(states)()
    if kind == "parameters":
        model[2].weight = nn.Parameter(model[0].weight.detach().clone())
    else:
        model[3].running_mean = model[3].running_mean.clone()
    assert states() != tied
    if kind == "parameters":
        model[0].weight = model[2].weight
        assert states() == tied


def test_what_takes_the_place_of_a_leaf_is_called_as_the_leaf_was() -> None:
    model = switched()
    states = ModuleStates(model)
    before = states()
    model[0].linear = nn.Sequential(nn.Linear(2, 2), nn.Dropout()).eval()
    assert states() == before


def test_ignored_attributes_do_not_matter_and_others_do() -> None:
    model = switched()
    states = ModuleStates(model)
    before = states()
    model[0].scale = 0.25
    ignored = states.ignore_differences(before)
    assert list(ignored.values()) == ["scale"]
    ours = states()
    model[0].scale = 0.125
    assert states() == ours
    model[1].scale = 0.125
    assert states() != ours


def test_a_copy_tells_of_its_own_tree() -> None:
    model = tree()
    states = ModuleStates(model)
    other, own = copy.deepcopy((states, model))
    own.eval()
    assert not any(other().training)
    assert all(states().training)
