"""A rewrite, and the first call of a kind, leave no more behind than one call of the original does."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
from joint_stream_models import Encoder, Patches
from model_case import WIDTH, lively
from torch import Tensor, nn

import madtp
from madtp.sites.preserved_state import trial_run


class Writing(nn.Module):
    """Writes to something else than its result. by_regions: its Python reads a value, so it is not captured whole."""

    def __init__(self, write: Any, by_regions: bool) -> None:
        super().__init__()
        self.patches, self.encoder, self.head = Patches(), Encoder(2), nn.Linear(WIDTH, 3)
        self.twin, self.norm = nn.Linear(WIDTH, 3), nn.BatchNorm1d(WIDTH)
        self.register_buffer("count", torch.zeros(()))
        self.queue, self.seen = torch.zeros(4), []
        self.write, self.by_regions = write, by_regions

    def forward(self, pixels: Tensor) -> Tensor:
        with torch.no_grad():
            self.write(self, pixels)
        x = self.norm(self.encoder(self.patches(pixels))[:, 0])
        if self.by_regions and float(x.sum()) > 1e9:
            x = x * 2
        return self.head(x) + self.twin(x)


def swapped(model: Writing, pixels: Tensor) -> None:
    model.twin.weight.data = model.twin.weight.data * 0.9 + model.head.weight.data * 0.1


def unwanted(model: Writing, pixels: Tensor) -> None:
    model.twin.weight.requires_grad_(False)


def drawn(model: Writing, pixels: Tensor) -> None:
    model.seen.append((random.random(), np.random.rand()))


WRITES = {
    "nothing": lambda model, pixels: None,
    "inputs": lambda model, pixels: pixels.mul_(0.5),
    "parameters": lambda model, pixels: model.twin.weight.mul_(0.9),
    "data": lambda model, pixels: model.twin.weight.data.mul_(0.9).add_(model.head.weight.data, alpha=0.1),
    "other data": swapped,
    "gradients": unwanted,
    "buffers": lambda model, pixels: model.count.add_(1),
    "attributes": lambda model, pixels: model.queue.add_(1),
    "flags": lambda model, pixels: model.head.train(not model.head.training),
    "random numbers": drawn,
}


# What programs do not repeat, as it is no arithmetic.
IN_PYTHON = ("gradients", "flags", "random numbers")


def state(model: Any, pixels: Tensor) -> dict[str, Tensor]:
    own = {name: value.clone() for name, value in model.state_dict().items() if "madtp" not in name}
    hosts = [module for name, module in model.named_modules() if not name.startswith("madtp")]
    wanted = [p.requires_grad for name, p in model.named_parameters() if "madtp" not in name]
    return own | {
        "pixels": pixels.clone(),
        "queue": model.queue.clone(),
        "seen": torch.tensor(len(model.seen)),
        "training": torch.tensor([module.training for module in hosts]),
        "wanted": torch.tensor(wanted),
        "python": torch.tensor(random.getstate()[1]),
        "numpy": torch.from_numpy(np.random.get_state()[1].astype("int64")),
        "torch": torch.get_rng_state(),
    }


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    assert before.keys() == after.keys()
    return [name for name in before if not torch.equal(before[name], after[name])]


@pytest.mark.parametrize("by_regions", [False, True], ids=["whole", "regions"])
@pytest.mark.parametrize("write", WRITES)
def test_what_a_rewrite_tries_out_leaves_no_trace(write: str, by_regions: bool) -> None:
    torch.manual_seed(0)
    model, pixels = lively(Writing(WRITES[write], by_regions)), torch.randn(3, 3, 32, 32)
    model.norm.train()
    before = state(model, pixels)
    pruned = madtp.rewrite(model, (pixels,), config=madtp.PruningConfig(alignment_tokens=4))
    assert not changed(before, state(model, pixels))
    assert not by_regions or pruned.report.capture == "regions"
    if write in IN_PYTHON and not by_regions:
        return
    # The pruned model shares the parameters: the original runs on copies.
    original, inputs = copy.deepcopy(model), pixels.clone()
    for _ in range(2):
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        with torch.no_grad():
            wanted = original(inputs)
        expected = state(original, inputs)
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        with torch.no_grad(), pruned.dense():
            torch.testing.assert_close(pruned(pixels), wanted)
        assert not changed(expected, state(pruned, pixels))
    assert not pruned.report.unpruned


@pytest.mark.parametrize("write", ["parameters", "data", "buffers"])
def test_a_model_that_writes_without_gradients_trains(write: str) -> None:
    torch.manual_seed(0)
    model, pixels = lively(Writing(WRITES[write], by_regions=False)), torch.randn(3, 3, 32, 32)
    pruned = madtp.rewrite(model, (pixels,), config=madtp.PruningConfig(alignment_tokens=4))
    own = copy.deepcopy(model)
    own(pixels).sum().backward()
    with pruned.dense():
        pruned(pixels).sum().backward()
    for name, parameter in own.named_parameters():
        torch.testing.assert_close(pruned.get_parameter(name).grad, parameter.grad, rtol=1e-4, atol=1e-5)
    assert not pruned.report.unpruned


def test_a_trial_restores_views_and_tensors_that_share_memory() -> None:
    model, memory = nn.Linear(4, 4), torch.arange(8.0)
    model.tied, model.part = model.weight, memory[2:4]
    weights = model.weight.clone()
    with trial_run(model, {"x": [memory]}), torch.no_grad():
        memory[3:].zero_()
        model.part.add_(1)
        model.weight.t().mul_(2)
        torch.add(memory, 1, out=memory)
        model.new = 3
    assert torch.equal(memory, torch.arange(8.0))
    assert torch.equal(model.part, torch.tensor([2.0, 3.0]))
    assert torch.equal(model.weight, weights)
    assert not hasattr(model, "new")


def test_trials_draw_the_same_numbers_and_leave_errors_behind_as_little() -> None:
    model, x = nn.Dropout(), torch.ones(100)
    before = torch.get_rng_state()
    drawn = []

    def fail() -> None:
        drawn.append(model(x))
        x.zero_().matmul(torch.ones(3, 3))

    for _ in range(2):
        with pytest.raises(RuntimeError, match="shapes"), trial_run(model, x):
            fail()
        assert torch.equal(x, torch.ones(100))
    assert torch.equal(*drawn)
    assert torch.equal(before, torch.get_rng_state())
