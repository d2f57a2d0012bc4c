"""Readers with a fault each, to test the runner with: :data:`READERS`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from madtp.errors import DataError

from .reading import Case, Reader, expect


def _case(
    read: Callable[[Path, Tensor], Any], state: Callable[[Tensor], Mapping[str, Tensor]]
) -> Callable[[Path], Case]:
    def open_case(folder: Path) -> Case:
        (folder / "x.txt").write_text("some text")
        weight = torch.zeros(3)
        return Case(
            (("x.txt", "bytes"),),
            lambda place: read(place / "x.txt", weight),
            lambda found, sealed: expect(found is None, "there is something"),
            lambda: state(weight),
        )

    return open_case


def _key_error(path: Path, weight: Tensor) -> None:
    {}["missing"]


def _large(path: Path, weight: Tensor) -> None:
    torch.ones(60 << 20, dtype=torch.uint8)


def _changing(path: Path, weight: Tensor) -> None:
    weight[0] = 1
    raise DataError("it is refused too late.")


def _refusing(path: Path, weight: Tensor) -> None:
    raise DataError("it is refused.")


_READ: dict[str, Callable[[Path, Tensor], Any]] = {
    "loading": lambda path, weight: None,
    "refusing": _refusing,
    "key_error": _key_error,
    "sleeping": lambda path, weight: time.sleep(60),
    "slow": lambda path, weight: time.sleep(0.3),
    "large": _large,
    "changing": _changing,
    "wrong": lambda path, weight: 3,
    "ending": lambda path, weight: os._exit(3),
    "crashing": lambda path, weight: os.abort(),
}

READERS = {
    name: Reader(name, "a fault", _case(read, lambda weight: {"weight": weight})) for name, read in _READ.items()
}
