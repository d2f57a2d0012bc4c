"""Packed rows: the tokens of all samples one after the other, with no padding between them.

A pruned stream has two forms. The *padded* form ``[B, N, C]`` gives every sample as many slots as the largest has tokens. The
*packed* form ``[1, T, C]`` holds the T rows that are tokens: those of the first sample, then those of the second, and so on.
Token-wise operations compute the same on both. Start at :class:`PackedRows`, which says where the rows stand;
``packing.py`` goes from one form to the other.

A stream whose samples all have equally many slots, padding included, has no :class:`PackedRows`: its rows are its slots.

Axis legend: B samples, N slots of a sample, T rows, C width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Numbers = npt.NDArray[Any]


@dataclass(frozen=True)
class PackedRows:
    """Where the rows of a packed stream stand in its padded form. The tokens of a sample fill its first slots.

    Attributes:
        lengths: number of rows of each sample.
        samples: ``[T]`` int64, the sample of each row.
        slots: ``[T]`` int64, the slot of each row, counted over all samples: ``b * N + j``.
        skipped: ``[B]`` int64, the number of padding slots of the samples before each.
    """

    lengths: tuple[int, ...]
    samples: Tensor
    slots: Tensor
    skipped: Tensor


def packed_rows(lengths: Sequence[int], slots: int, device: torch.device) -> PackedRows | None:
    """Return where rows stand if sample b fills its first ``lengths[b]`` of ``slots`` slots; None if all fill all of them."""
    counts = np.array(lengths, dtype=np.int64)
    if (counts == slots).all():
        return None
    samples, skipped = np.repeat(np.arange(len(counts)), counts), padding_before(counts, slots)
    moved = (samples, np.arange(len(samples)) + skipped[samples], skipped)
    return PackedRows(tuple(lengths), *(torch.from_numpy(one).to(device) for one in moved))


def padding_before(lengths: Numbers, slots: int) -> Numbers:
    """Return ``[B]``, the padding slots of the samples before each, if each fills its first ``lengths`` of ``slots``."""
    skipped: Numbers = np.arange(len(lengths)) * slots - (lengths.cumsum() - lengths)
    return skipped


def part_of_rows(rows: PackedRows, slots: int, start: int, end: int) -> PackedRows:
    """Return the rows of the samples ``start`` to ``end``."""
    first = sum(rows.lengths[:start])
    last = first + sum(rows.lengths[start:end])
    return PackedRows(
        rows.lengths[start:end],
        rows.samples[first:last] - start,
        rows.slots[first:last] - start * slots,
        rows.skipped[start:end] - rows.skipped[start:end][:1],
    )
