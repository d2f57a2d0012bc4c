"""Devices that this machine does not have are told before any work, and the message names those that it has."""

from __future__ import annotations

import pytest
import torch

from madtp.errors import ConfigError
from madtp.processes import joined, usable_device


@pytest.mark.parametrize("name", ["banana", "", "CPU", "cuda:x", "cpu:-1"])
def test_names_of_no_device_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"device is {name!r}, which names no device; this machine has cpu"):
        usable_device(name)


@pytest.mark.parametrize("name", ["cuda:99", "meta", "hpu", "vulkan"])
def test_devices_that_are_not_there_or_compute_nothing_are_refused(name: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"device is '{name}', which cannot be used here \(.*\); this machine has cpu"
    ):
        usable_device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_cuda_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'cuda'.*; this machine has cpu\.$"), joined("cuda"):
        pytest.fail("the work begins")


def test_each_process_is_told_that_its_gpu_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "99")
    with pytest.raises(ConfigError, match="cuda:99"), joined("cuda"):
        pytest.fail("the work begins")


@pytest.mark.parametrize("name", ["cpu", "cpu:0"])
def test_the_processor_is_always_there(name: str) -> None:
    assert usable_device(name) == torch.device(name)
