"""Where the samples of a batch lie in the tensors of a call; start at :func:`sample_dims`.

Most tensors begin with the batch. Patches of all images may come in one row, though, and positions may be stacked by axis,
``[3, B, N]``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor


def batch_size(leaves: Iterable[Any]) -> int:
    """Samples in a batch of tensors: the first size that the first dimensions of two of them have, else that of the first."""
    sizes = [int(x.shape[0]) for x in leaves if isinstance(x, Tensor) and x.dim()]
    return next((size for size in sizes if sizes.count(size) > 1), sizes[0] if sizes else 1)


def sample_dims(leaves: Sequence[Any]) -> tuple[int | None, ...] | None:
    """The batch dimension of each tensor, the first or the second one, None for other leaves; None if a tensor has none."""
    samples = batch_size(leaves)
    dims = tuple(sample_dim(leaf, samples) for leaf in leaves)
    known = all(
        dim is not None or not isinstance(x, Tensor) or not x.dim() for dim, x in zip(dims, leaves, strict=True)
    )
    return dims if known else None


def sample_dim(leaf: Any, samples: int) -> int | None:
    """The batch dimension of a tensor; None if it has none, or if it cannot be told."""
    if not isinstance(leaf, Tensor) or samples not in leaf.shape[:2] or (samples > 1 and _is_ambiguous(leaf)):
        return None
    return leaf.shape[:2].index(samples)


def _is_ambiguous(leaf: Tensor) -> bool:
    """Whether integers may be stacked by axis or by sample, of as many axes as samples."""
    return leaf.dim() > 2 and leaf.shape[0] == leaf.shape[1] and not leaf.dtype.is_floating_point


def free_batch(dynamic: Sequence[Sequence[int]], leaves: Sequence[Any]) -> bool:
    """Whether a capture serves any number of samples: every tensor has a batch dimension, and it is among the free ones."""
    return are_free(sample_dims(leaves), dynamic)


def are_free(dims: Sequence[int | None] | None, dynamic: Sequence[Sequence[int]]) -> bool:
    """Whether these dimensions, one of each leaf, are known and among the free ones."""
    return dims is not None and all(dim is None or dim in free for dim, free in zip(dims, dynamic, strict=True))
