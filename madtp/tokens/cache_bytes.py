"""How much memory key/value caches take: :func:`bytes_of_caches`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from madtp.tokens.cached_tokens import CachedTokens, tensors_in


class CacheBytes(NamedTuple):
    """Memory of a key/value cache, in bytes.

    Attributes:
        held: what it takes, positions of survivors included.
        dense: what it would take with the tokens that were dropped.
    """

    held: int
    dense: int


def bytes_of_caches(caches: Iterable[object]) -> CacheBytes:
    """Return the memory that the tensors in caches take."""
    held = dense = 0
    for cache in caches:
        for one in tensors_in(cache):
            dense += one.numel() * one.element_size()
            held += one.bytes() if isinstance(one, CachedTokens) else one.numel() * one.element_size()
    return CacheBytes(held, dense)
