"""Modes of torch around a call: told apart, and entered again."""

from __future__ import annotations

from contextlib import AbstractContextManager

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from madtp.calls.environment import CallEnvironment

MODES = {
    "no gradients": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "saved tensors": lambda: saved_tensors_hooks(lambda x: x, lambda x: x),
}


@pytest.mark.parametrize("mode", MODES)
def test_environments_that_compute_otherwise_differ(mode: str) -> None:
    make: AbstractContextManager[object] = MODES[mode]()
    before = CallEnvironment.now("cpu")
    assert before == CallEnvironment.now("cpu")
    with make:
        inside = CallEnvironment.now("cpu")
        assert inside == CallEnvironment.now("cpu")
    assert inside != before
    assert before == CallEnvironment.now("cpu")


@pytest.mark.parametrize("mode", ["no gradients", "inference", "autocast"])
def test_an_environment_is_entered_again(mode: str) -> None:
    with MODES[mode]():
        inside = CallEnvironment.now("cpu")
    outside = CallEnvironment.now("cpu")
    with inside.again():
        assert CallEnvironment.now("cpu") == inside
        with outside.again():
            assert CallEnvironment.now("cpu") == outside
    assert CallEnvironment.now("cpu") == outside


def test_hooks_on_saved_tensors_do_not_run_again() -> None:
    seen: list[torch.Tensor] = []
    environment = CallEnvironment.now("cpu")
    with saved_tensors_hooks(lambda x: seen.append(x) or x, lambda x: x), environment.again():
        torch.ones(2, requires_grad=True).exp()
    assert not seen
