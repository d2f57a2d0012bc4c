"""Copies of module trees: attributes that are called as torch's own are the host's all the same."""

from __future__ import annotations

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
