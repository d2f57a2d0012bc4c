"""Weights that lie in the package: :func:`shipped_checkpoints` lists them, :class:`ShippedCheckpoint` checks their files.

``zoo/weights/index.json`` holds their sizes and hashes. Those who add or change weights run :func:`pack_weights`, which stores
matrices in eight bits, and then :func:`write_index`.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from madtp.errors import CheckpointError, ConfigError
from madtp.saving.eight_bit import pack, unpack
from madtp.saving.model_folder import (
    BASE,
    CONFIG,
    EIGHT_BIT,
    STORED,
    describe_base,
    read_folder,
    sha256_of,
    write_folder,
)

_NAME = re.compile(r"[a-z][a-z0-9]*([_-][a-z0-9]+)*")


_ALL = Path(str(resources.files("zoo"))) / "weights"
_INDEX = _ALL / "index.json"
_SMALLEST_PACKED = 4096  # values; what is smaller takes no room


def weights_folder(model: str) -> Path:
    """Return the folder of the package with the weights of a model: dense ones as a file, pruned ones as folders."""
    return _ALL / model


@dataclass(frozen=True)
class ShippedCheckpoint:
    """One set of weights in ``zoo/weights/<model>``.

    Attributes:
        file: The file with the tensors: ``dense.safetensors``, or ``pruned-80/model-1a2b3c4d5e6f.safetensors`` in a folder
            that :func:`madtp.save` wrote.
        size: Its length in bytes.
        sha256: The hash of its content, in hexadecimal digits.
        config_sha256: That of the ``config.json`` beside it, which a pruned model has.
    """

    file: str
    size: int
    sha256: str
    config_sha256: str | None = None

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ConfigError(
                f"'{self.name}' cannot name a checkpoint: use lower-case words and digits joined by '_' or '-'."
            )

    @property
    def name(self) -> str:
        """What :func:`zoo.create` calls it: ``dense``, ``pruned-80``."""
        return self.file.partition("/")[0].removesuffix(".safetensors")

    @property
    def is_pruned(self) -> bool:
        """Whether it is a pruned model, saved by :func:`madtp.save`, rather than dense weights."""
        return "/" in self.file

    def verified(self, model: str) -> Path:
        """Return the file of dense weights or the folder of a pruned model, once every byte has been checked.

        Args:
            model: The name of the model that the weights belong to.

        Raises:
            CheckpointError: The file is missing or is not the one that was shipped.
        """
        path = weights_folder(model) / self.file
        if not path.is_file():
            raise CheckpointError(f"The shipped checkpoint {path} is not there; install the package again.")
        size = path.stat().st_size
        if size != self.size:
            raise CheckpointError(
                f"The shipped checkpoint {path} is damaged: it has {size:,} bytes and was shipped with {self.size:,}; "
                "install the package again."
            )
        digest = sha256_of(path)
        if digest != self.sha256:
            raise CheckpointError(
                f"The shipped checkpoint {path} is damaged or was changed: its SHA-256 is {digest} and was shipped as "
                f"{self.sha256}; install the package again, or pass a changed file by its path."
            )
        if self.config_sha256 is not None:
            self._verify_config(path.parent / CONFIG)
        return path.parent if self.is_pruned else path

    def _verify_config(self, path: Path) -> None:
        if not path.is_file() or sha256_of(path) != self.config_sha256:
            raise CheckpointError(
                f"The shipped {path} is missing or was changed; install the package again, or pass a changed folder by "
                "its path."
            )


def shipped_checkpoints(model: str) -> tuple[ShippedCheckpoint, ...]:
    """Return the weights of a model that the index lists, dense ones first."""
    return tuple(ShippedCheckpoint(file, **facts) for file, facts in _index().get(model, {}).items())


def measured_index() -> dict[str, dict[str, dict[str, int | str]]]:
    """Return what the index should say: model, file, and of each file its size and hash, measured anew."""
    index: dict[str, dict[str, dict[str, int | str]]] = {}
    for path in sorted(_ALL.glob("*/**/*.safetensors")):
        model, file = path.relative_to(_ALL).parts[0], path.relative_to(_ALL).as_posix().partition("/")[2]
        facts: dict[str, int | str] = {"size": path.stat().st_size, "sha256": sha256_of(path)}
        if "/" in file:
            facts["config_sha256"] = sha256_of(path.parent / CONFIG)
        index.setdefault(model, {})[file] = facts
    return index


def write_index() -> None:
    """Write the index anew; for those who add or change weights."""
    _INDEX.write_text(json.dumps(measured_index(), indent=1) + "\n", encoding="utf-8")


def pack_weights(model: str, exact: tuple[str, ...] = ()) -> None:
    """Store the matrices among a model's shipped weights in eight bits, and every other tensor as it is.

    Pruned weights are stored as the difference from the dense ones, which they were trained from. Position embeddings and what
    pruning adds to the model are left alone. Weights that are packed already do not change.

    Args:
        model: The name of the model.
        exact: Parts of the names of tensors to leave as they are, too. Compare the scores before and after; where they
            differ, what reads and writes words and patches counts most:
            ``("embeddings", "cls.predictions", "patch_embed")``.
    """

    def chosen(name: str, value: Tensor) -> bool:
        return _is_matrix(name, value) and not any(part in name for part in exact)

    dense = weights_folder(model) / "dense.safetensors"
    folders = [path for path in sorted(weights_folder(model).iterdir()) if path.is_dir()]
    pruned = [(path, *read_folder(path)) for path in folders]
    save_file(pack(load_file(dense), chosen), dense)
    base = unpack(load_file(dense))
    for path, tensors, description in pruned:
        if description.get(STORED) != EIGHT_BIT:
            stored = {**description, STORED: EIGHT_BIT, BASE: describe_base(dense)}
            write_folder(path, pack(tensors, chosen, base), stored)


def _is_matrix(name: str, value: Tensor) -> bool:
    large = value.dim() >= 2 and value.numel() >= _SMALLEST_PACKED and value.is_floating_point()
    return large and "pos" not in name and not name.startswith("madtp.")


@cache
def _index() -> dict[str, dict[str, dict[str, Any]]]:
    content: dict[str, dict[str, dict[str, Any]]] = json.loads(_INDEX.read_text(encoding="utf-8"))
    return content
