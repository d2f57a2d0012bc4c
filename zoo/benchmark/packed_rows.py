"""Rows of several samples, one after the other: what the floors of all models share.

Axes: T rows of all samples, H heads, D width of a head. Lengths say how many rows each sample has; their sum is T.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional as F

from madtp.errors import DataError

Lengths = tuple[int, ...]
TokenCounts = Mapping[str, Sequence[int]]
"""Tokens of each sample after each site, by site."""


def attend(queries: Tensor, keys: Tensor, values: Tensor, lengths: Lengths, key_lengths: Lengths) -> Tensor:
    """Let each sample attend to itself, or to its own part of another stream.

    Args:
        queries: ``[T, H, D]``.
        keys: ``[S, H, D]``, rows of the same or of another stream.
        values: as ``keys``.
        lengths: rows of each sample among the queries.
        key_lengths: rows of each sample among the keys.

    Returns:
        ``[T, H * D]``. Samples that all have the same lengths run as one batch, as they would in the dense model.
    """
    if len(set(lengths)) == 1 and len(set(key_lengths)) == 1:
        size = len(lengths)
        together = [t.unflatten(0, (size, -1)).transpose(1, 2) for t in (queries, keys, values)]
        return F.scaled_dot_product_attention(*together).transpose(1, 2).flatten(2).flatten(0, 1)
    parts = zip(queries.split(lengths), keys.split(key_lengths), values.split(key_lengths), strict=True)
    mixed = [
        F.scaled_dot_product_attention(*(t.transpose(0, 1)[None] for t in part))[0].transpose(0, 1) for part in parts
    ]
    return torch.cat(mixed).flatten(1)


def cut(rows: Tensor, lengths: Lengths) -> Tensor:
    """Return the first rows, as many as ``lengths`` say together: no gathering, so rows may end up in another sample."""
    return rows[: sum(lengths)]


def first_rows(rows: Tensor, lengths: Lengths) -> Tensor:
    """Return the first row of each sample, ``[B, C]``."""
    starts = [0, *accumulate(lengths)][:-1]
    return rows[torch.tensor(starts, device=rows.device)]


def kept_by_block(counts: TokenCounts, prefix: str, depth: int, lengths: Lengths) -> list[Lengths]:
    """Return the lengths behind the site of each block; a block without a site keeps those before it.

    Args:
        counts: tokens of each sample by site. A site bears the name of its block, or of a module inside it.
        prefix: what comes before the number of a block in names of modules: ``"blocks."``.
        depth: number of blocks.
        lengths: tokens of each sample before the first block.

    Raises:
        DataError: a site counted another number of samples.
    """
    kept = []
    for number in range(depth):
        name = f"{prefix}{number}"
        for site, found in counts.items():
            if site == name or site.startswith((f"{name}.", f"{name}#")):
                if len(found) != len(lengths):
                    raise DataError(f"the site {site} counted {len(found)} samples, and the batch has {len(lengths)}.")
                # Padding counts while nothing was pruned, and is no row here.
                lengths = tuple(map(min, found, lengths))
        kept.append(lengths)
    return kept
