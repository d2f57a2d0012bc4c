"""All readers, by name: :data:`READERS`."""

from __future__ import annotations

from . import checkpoints, datasets, pruned_models, runs
from .reading import Reader

READERS: dict[str, Reader] = {
    reader.name: reader for reader in (*datasets.READERS, *checkpoints.READERS, *runs.READERS, *pruned_models.READERS)
}
