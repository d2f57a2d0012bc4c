"""Reads the tensors of a TorchScript archive without running its code. Start with :func:`read_torchscript`.

Such an archive (the form in which OpenAI publishes CLIP) is a zip of a pickle of the module tree, one file for each
storage, and code, which is left alone. The pickle is read by an unpickler that knows four things: modules, as bags of
attributes; tensors; the parameters among them; and lists of constants. Anything else is refused.
"""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from madtp.errors import CheckpointError
from madtp.files.limits import DEEPEST, FREE_BYTES, ExceededError, check_bytes
from zoo.checkpoints.pickles import check_file

_PICKLE, _CODE = "data.pkl", "constants.pkl"
MOST_MODULES = 100_000
"""Modules of a tree, as often as each occurs."""

_STORAGES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


def is_torchscript(path: Path) -> bool:
    """Whether a file is a TorchScript archive; False for other files, archives or not."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.count("/") == 1 and name.endswith(f"/{_CODE}") for name in archive.namelist())
    except Exception:  # zipfile raises whatever it trips over; such a file is read as none, which says what is wrong
        return False


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """Return the tensors of the module tree by their path in it, as its ``state_dict()`` names them.

    Raises:
        CheckpointError: The archive is damaged, or its pickle asks for anything but modules and tensors.
    """
    try:
        held = check_file(path)
        with zipfile.ZipFile(path) as archive:
            root = next(name.partition("/")[0] for name in archive.namelist() if name.endswith(f"/{_CODE}"))
            with archive.open(f"{root}/{_PICKLE}") as file:
                tensors = _collect(_Unpickler(file, archive, root).load())
        for name, value in tensors.items():
            check_bytes(name, value.nbytes, max(FREE_BYTES, held))
    except _Refused as refused:
        raise CheckpointError(
            f"{path} is a TorchScript archive whose module tree holds {refused}, which is refused, since reading it can run "
            "code. Where you trust it, convert it: torch.save(torch.jit.load(FILE).state_dict(), 'weights.pth')."
        ) from refused
    except Exception as error:  # zipfile and pickle raise whatever a broken archive trips over
        raise CheckpointError(f"{path} is a damaged TorchScript archive ({type(error).__name__}: {error}).") from error
    return tensors


class _Refused(Exception):
    """The pickle asks for something that is neither a tensor nor a module."""


class _Bag:
    """Stands for a module: its attributes, under their names."""

    def __init__(self) -> None:
        self.attributes: dict[str, Any] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.attributes = dict(state)


def _tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if all(size) else offset - 1
    if offset < 0 or min(stride, default=0) < 0 or last >= storage.numel():
        raise _Refused("a tensor that reaches beyond its storage")
    return storage.as_strided(size, stride, offset)


def _constants(values: list[Any]) -> list[Any]:
    return list(values)


class _Unpickler(pickle.Unpickler):
    """Knows modules, tensors and lists of constants."""

    def __init__(self, file: Any, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(file)
        self.archive, self.root = archive, root
        self.storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "__torch__":
            return _Bag
        if module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_tensor"):
            return _tensor
        if module == "torch._utils" and name == "_rebuild_parameter":
            return lambda data, *_: data
        if module == "torch" and name in _STORAGES:
            return name
        if module == "torch.jit._pickle" and name.startswith("build_") and name.endswith("list"):
            return _constants
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        raise _Refused(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Tensor:
        kind, storage, key, _, count = pid
        if kind != "storage" or storage not in _STORAGES:
            raise _Refused(f"a {kind} of {storage}")
        if key not in self.storages:
            data = bytearray(self.archive.read(f"{self.root}/data/{key}"))
            self.storages[key] = torch.frombuffer(data, dtype=_STORAGES[storage]) if count else torch.empty(0)
        return self.storages[key]


def _collect(tree: object) -> dict[str, Tensor]:
    """The tensors of a module tree by their path in it."""
    tensors: dict[str, Tensor] = {}
    waiting, seen = [("", 0, tree)], 0
    while waiting:
        path, depth, module = waiting.pop()
        seen += 1
        if not isinstance(module, _Bag):
            raise _Refused(f"a {type(module).__name__} where a module belongs")
        if depth > DEEPEST or seen > MOST_MODULES:
            raise ExceededError(f"its modules nest deeper than {DEEPEST} levels, or over and over")
        for name, value in module.attributes.items():
            place = f"{path}.{name}" if path else str(name)
            if isinstance(value, Tensor):
                tensors[place] = value
            elif isinstance(value, _Bag):
                waiting.append((place, depth + 1, value))
    return tensors
