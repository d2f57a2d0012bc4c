"""What data, weights and other files held when a run began: :func:`fingerprint_data`, :func:`fingerprint_files`.

A run that resumes compares them, so that it never mixes results or batches of different data. Records, which hold all texts,
are told by their content; images and other files by size and time of change, as reading them would take as long as the run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from madtp.errors import DataError
from madtp.saving.model_folder import CONFIG
from zoo.checkpoints.files import INDEX_SUFFIX, PICKLE_SUFFIXES, SAFETENSORS_SUFFIX
from zoo.datasets.images import ImageFolder
from zoo.datasets.records import DataSet
from zoo.registry import describe

_WEIGHTS = (SAFETENSORS_SUFFIX, *PICKLE_SUFFIXES, INDEX_SUFFIX)


def fingerprint_data(data: DataSet[Any]) -> dict[str, str | int]:
    """Return fingerprints of records and images, in JSON values.

    Images are those of the records. Images that lie in no folder of files, such as drawn ones, follow from their names.

    Raises:
        DataError: An image is missing.
    """
    records = hashlib.sha256()
    for record in data.records:
        records.update(f"{record!r}\n".encode("utf-8", "surrogatepass"))
    found: dict[str, str | int] = {"samples": len(data), "records": records.hexdigest()}
    if isinstance(data.source, ImageFolder):
        names = dict.fromkeys(name for record in data.records for name in record.images)
        found["images"] = _stats(data.source.path(name) for name in names)
    return found


def fingerprint_files(paths: Iterable[Path | None]) -> dict[str, str]:
    """Return a fingerprint of each path that is a file."""
    return {str(path): _stats([path]) for path in paths if path is not None and path.is_file()}


def fingerprint_checkpoint(model: str, checkpoint: str | None) -> dict[str, str]:
    """Return a fingerprint of the weights of a model, whose files it names.

    Args:
        model: Name of the model in the zoo.
        checkpoint: As :func:`zoo.create` takes it.
    """
    if checkpoint is None:
        return {}
    for shipped in describe(model).shipped:
        if shipped.name == checkpoint:
            return {checkpoint: shipped.sha256}
    path = Path(checkpoint)
    folder = path if path.is_dir() else path.parent if path.name.endswith(INDEX_SUFFIX) else None
    if folder is None:
        return fingerprint_files([path])
    inner = (file for file in folder.iterdir() if file.name == CONFIG or file.name.endswith(_WEIGHTS))
    return {checkpoint: _stats(sorted(file for file in inner if not file.name.startswith(".")))}


def _stats(paths: Iterable[Path]) -> str:
    """Return a hash of size and time of change of the files, in their order."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            status = path.stat()
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror or error}); copy it again.") from error
        digest.update(f"{path.name} {status.st_size} {status.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
