"""The folder format of saved models: ``config.json`` and one safetensors file, whose name contains its hash.

Start at :func:`write_folder` and :func:`read_folder`. The configuration names the tensor file and takes its place last, so a
folder always holds one whole model: the old one until that moment, the new one from then on.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import save_file
from torch import Tensor

from madtp.atomic_files import draft_of, publish, write_failures, write_text
from madtp.errors import CheckpointError
from madtp.files.json_text import read_description
from madtp.files.limits import LARGEST_FILE, count, is_file_name, shown
from madtp.files.tensors import Stored, read_safetensors
from madtp.saving.eight_bit import unpack

if sys.platform != "win32":
    import fcntl

FORMAT = "madtp-pruned-model"
VERSION = 1
CONFIG = "config.json"
TENSOR_FILE = re.compile(r"model-[0-9a-f]{12}\.safetensors")
# A folder whose description says so holds matrices as `madtp/saving/eight_bit.py` packs them; with a base, as the difference
# from those of a file next to the folder.
STORED, EIGHT_BIT, BASE = "stored_dtype", "int8", "base"
# The tensor file says itself which names share a tensor, so that its hash covers this, too.
ALIASES = "aliases"


def write_folder(folder: Path, tensors: Mapping[str, Tensor], description: Mapping[str, object]) -> None:
    """Write a model. One that the folder already holds is replaced in one step; other files stay.

    Of several writers at a time, the last one wins.

    Raises:
        CheckpointError: the folder cannot be written, or its ``config.json`` belongs to something else.
    """
    _refuse_foreign(folder)
    stored, aliases = _without_sharing(tensors)
    with write_failures(folder), draft_of(folder / "model.safetensors") as draft:
        # One entry only: the order of several differs from run to run, and so would the hash.
        save_file(stored, draft, metadata={ALIASES: _plain(aliases)})
        digest, size = sha256_of(draft), draft.stat().st_size
        name = f"model-{digest[:12]}.safetensors"
        file = {"file": name, "bytes": size, "sha256": digest, "aliases": aliases}
        content = {"format": FORMAT, "version": VERSION, **description, "tensors": file}
        text = json.dumps(content, indent=1, allow_nan=False) + "\n"
        with _one_writer(folder) as alone:
            try:
                publish(draft, folder / name)
                write_text(folder / CONFIG, text)
            finally:
                if alone:
                    _remove_unnamed(folder)


@contextmanager
def _one_writer(folder: Path) -> Iterator[bool]:
    """Let others that save into the folder wait, where the system and the file system have such locks.

    Yields:
        Whether they wait. Where they do not, nothing may be removed: it may be what another one has just written.
    """
    if sys.platform == "win32":
        yield False
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:  # file systems of a network may not lock folders
            yield False
            return
        try:
            yield True
        finally:
            # A process that another thread has forked meanwhile holds the descriptor, too, so closing it is not enough.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)


def _remove_unnamed(folder: Path) -> None:
    """Remove tensor files that the configuration does not name: of the model before, or of a save that has failed."""
    try:
        named = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["tensors"]["file"]
    except FileNotFoundError:
        named = None
    except (OSError, ValueError, KeyError, TypeError):
        return
    for path in folder.glob("model-*.safetensors"):
        if TENSOR_FILE.fullmatch(path.name) and path.name != named:
            with suppress(OSError):  # Windows keeps files that a reader has open; the next save removes them
                path.unlink()


def read_folder(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (on the CPU) and description of a saved model; every byte is checked. Packed matrices come as float32.

    The model is that of one moment, whoever saves into the folder meanwhile.

    Raises:
        CheckpointError: the folder is missing, foreign, newer or damaged.
    """
    while True:
        before = _stamp(folder)
        description = _read_config(folder)
        try:
            return _read_tensors(folder, description), description
        except CheckpointError:
            # Whoever replaces the model removes the tensors that the old configuration names.
            if _stamp(folder) == before:
                raise


def _stamp(folder: Path) -> tuple[int, ...]:
    """What differs between two configurations that were written one after the other, even where they say the same."""
    try:
        found = (folder / CONFIG).stat()
    except OSError:
        return ()
    return found.st_ino, found.st_mtime_ns, found.st_ctime_ns


def _read_tensors(folder: Path, description: Mapping[str, Any]) -> dict[str, Tensor]:
    name, size, digest, aliases = _tensor_entry(folder, description)
    path = folder / name
    if not path.is_file():
        raise CheckpointError(f"{folder} lacks {name}, which its {CONFIG} names; copy the whole folder again.")
    try:
        # An open file can be read to its end, and a mapped one used, when another process has removed it.
        with path.open("rb") as file:
            found = os.fstat(file.fileno()).st_size
            if found != size:
                raise CheckpointError(f"{path} is damaged: it has {found} of {size} bytes; copy it again.")
            stored = read_safetensors(path)
            if _sha256(file) != digest:
                raise CheckpointError(
                    f"{path} is damaged: its content does not match the hash in {CONFIG}; copy it again."
                )
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error}); copy the whole folder again.") from error
    tensors = _with_aliases(path, stored, aliases)
    if description.get(STORED) == EIGHT_BIT:
        base = _read_base(folder, description[BASE]) if BASE in description else None
        try:
            tensors = unpack(tensors, base)
        except CheckpointError as error:
            raise CheckpointError(f"{path} is damaged: {error}") from error
    return tensors


def _tensor_entry(folder: Path, description: Mapping[str, Any]) -> tuple[str, int, str, dict[str, str]]:
    """What a description says of the tensor file: name, size, hash, and further names of tensors."""
    path = folder / CONFIG
    try:
        entry = description["tensors"]
        name, digest, aliases = (entry[k] for k in ("file", "sha256", ALIASES))
        size = count(entry["bytes"], "its size", most=LARGEST_FILE)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: its entry 'tensors' is incomplete; save again.") from error
    if not is_file_name(name):
        raise CheckpointError(f"{path} is damaged: {shown(name)} does not name a file in the folder; save again.")
    if not isinstance(aliases, dict) or not all(isinstance(original, str) for original in aliases.values()):
        raise CheckpointError(f"{path} is damaged: its entry '{ALIASES}' is not names by name; save again.")
    return name, size, digest, aliases


def _with_aliases(path: Path, stored: Stored, aliases: Mapping[str, str]) -> dict[str, Tensor]:
    """Tensors under all their names."""
    if stored.metadata.get(ALIASES, _plain(aliases)) != _plain(aliases):  # a file of before says nothing
        raise CheckpointError(
            f"{path} is damaged, or {CONFIG} is: they differ in which tensors have several names; copy both again."
        )
    unknown = [name for name in aliases.values() if name not in stored.tensors]
    if unknown or aliases.keys() & stored.tensors.keys():
        raise CheckpointError(f"{path} is damaged: names of its tensors are missing or there twice; save again.")
    return {**stored.tensors, **{alias: stored.tensors[original] for alias, original in aliases.items()}}


def _plain(aliases: Mapping[str, str]) -> str:
    return json.dumps(aliases, sort_keys=True)


def describe_base(path: Path) -> dict[str, str]:
    """Return the entry :data:`BASE` of a folder next to ``path`` that stores the difference from the tensors in that file."""
    return {"file": path.name, "sha256": sha256_of(path)}


def _read_config(folder: Path) -> dict[str, Any]:
    if not os.path.exists(folder):  # the methods of Path raise where a name is too long
        raise CheckpointError(f"there is no folder {folder}; give the folder that madtp.save wrote.")
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; give the folder that madtp.save wrote, not a file in it.")
    path = folder / CONFIG
    if not path.is_file():
        raise CheckpointError(f"{folder} holds no {CONFIG}, so it is not a saved model, or saving never finished.")
    try:
        content = read_description(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: it is not JSON ({error}); copy it again.") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} does not describe a model that madtp saved; rewrite the model with madtp.rewrite and save it."
        )
    version = content.get("version")
    if not isinstance(version, int) or version < 1:
        raise CheckpointError(f"{path} is damaged: its version is {shown(version)}; save the model again.")
    if version > VERSION:
        raise CheckpointError(
            f"{folder} was saved by madtp {content.get('madtp', '?')} in format {shown(version)}; this release reads up "
            f"to format {VERSION}. Upgrade madtp."
        )
    return content


def _read_base(folder: Path, base: object) -> dict[str, Tensor]:
    name, digest = (base.get("file"), base.get("sha256")) if isinstance(base, dict) else (None, None)
    if not is_file_name(name):
        raise CheckpointError(f"{folder / CONFIG} is damaged: its entry '{BASE}' does not name a file; copy it again.")
    path = folder.parent / name
    if not path.is_file():
        raise CheckpointError(f"{folder} is stored as the difference from {path}, which is missing; copy both.")
    if sha256_of(path) != digest:
        raise CheckpointError(f"{folder} is stored as the difference from {path}, which has changed; copy both again.")
    return unpack(read_safetensors(path).tensors)


def _refuse_foreign(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; give a folder to save into.")
    path = folder / CONFIG
    if not path.exists():
        return
    try:
        content = read_description(path)
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} belongs to something other than madtp and is not overwritten; choose another folder."
        )


def _without_sharing(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors as safetensors takes them, and which further names mean the same tensor (tied weights)."""
    stored: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[object, ...], str] = {}
    storages: set[int] = set()
    for name, value in tensors.items():
        value = value.detach()
        key = (value.data_ptr(), value.dtype, value.shape, value.stride(), value.device)
        if value.numel() and key in first:
            aliases[name] = first[key]
            continue
        first[key] = name
        own = value.cpu().contiguous()
        memory = own.untyped_storage().data_ptr()
        stored[name] = (
            own.clone() if memory in storages or own.numel() != len(own.untyped_storage()) // own.itemsize else own
        )
        storages.add(memory)
    return stored, aliases


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return _sha256(file)


def _sha256(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def narrowed(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Floating-point tensors cast to ``dtype``, tied ones once.

    Raises:
        CheckpointError: a finite value leaves the range of ``dtype``.
    """
    done: dict[tuple[object, ...], Tensor] = {}
    result: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if not value.is_floating_point():
            result[name] = value
            continue
        key = (value.data_ptr(), value.shape, value.stride())
        if key not in done or not value.numel():
            done[key] = value.detach().to(dtype)
            if bool((value.isfinite() & ~done[key].isfinite()).any()):
                raise CheckpointError(
                    f"{name} holds values up to {float(value.abs().max()):.3g}, too large for {dtype}; save in "
                    "torch.bfloat16 or leave dtype out."
                )
        result[name] = done[key]
    return result
