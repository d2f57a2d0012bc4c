"""Where the samples of a batch lie in the tensors of a call; start at :func:`sample_dims`.

Most tensors begin with the batch dimension. Exceptions are patches of all images in one row, and positions that are stacked by
axis, ``[3, B, N]``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor


def batch_size(leaves: Iterable[object]) -> int:
    """Return the number of samples: the first size that the first dimensions of two tensors share, else that of the first."""
    sizes = [int(x.shape[0]) for x in leaves if isinstance(x, Tensor) and x.dim()]
    return next((size for size in sizes if sizes.count(size) > 1), sizes[0] if sizes else 1)


def sample_dims(leaves: Sequence[object]) -> tuple[int | None, ...] | None:
    """Return the batch dimension of each leaf, None for leaves that are not tensors; None in all if a tensor has none."""
    samples = batch_size(leaves)
    dims = tuple(sample_dim(leaf, samples) for leaf in leaves)
    known = all(
        dim is not None or not isinstance(x, Tensor) or not x.dim() for dim, x in zip(dims, leaves, strict=True)
    )
    return dims if known else None


def sample_dim(leaf: object, samples: int) -> int | None:
    """Return the batch dimension of a tensor, the first or the second one; None if it has none, or if it is ambiguous."""
    if not isinstance(leaf, Tensor) or samples not in leaf.shape[:2] or (samples > 1 and _is_ambiguous(leaf)):
        return None
    return leaf.shape[:2].index(samples)


def _is_ambiguous(leaf: Tensor) -> bool:
    """Whether integers may be stacked by axis or by sample, because there are as many axes as samples."""
    return leaf.dim() > 2 and leaf.shape[0] == leaf.shape[1] and not leaf.dtype.is_floating_point


def free_batch(dynamic: Sequence[Sequence[int]], leaves: Sequence[object]) -> bool:
    """Return whether a capture serves any number of samples: every tensor has a batch dimension, and it is free."""
    return are_free(sample_dims(leaves), dynamic)


def are_free(dims: Sequence[int | None] | None, dynamic: Sequence[Sequence[int]]) -> bool:
    """Return whether these dimensions, one per leaf, are known and free."""
    return dims is not None and all(dim is None or dim in free for dim, free in zip(dims, dynamic, strict=True))
