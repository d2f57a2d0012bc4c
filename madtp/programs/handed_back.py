"""Features that a pruned call has returned and a later call of the same module is given: :class:`HandedBack`.

To the host, returned features have all tokens, dropped ones in the state in which they were dropped. A program knows which were
dropped; a later call that reads such features, as the steps of some decoders with cross-attention do, sees them all.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping

from torch import Tensor
from torch.utils import _pytree as pytree

from madtp.calls.compiling import is_compiling

SEEN_WHOLE = (
    "{} is given features that a pruned call of it has returned: there it sees the dropped tokens, too, in the state in which "
    "they were dropped, so the result differs from that of a call that computes the features itself; restrict `towers` or "
    "`layers` if that matters"
)


class HandedBack:
    """Remembers the features that the last pruned call of a module has returned."""

    def __init__(self) -> None:
        self._features: list[weakref.ref[Tensor]] = []

    def remember(self, result: object) -> None:
        """Remember the features ``[B, N, C]`` in a result; objects such as caches are not opened."""
        self._features = [weakref.ref(x) for x in pytree.tree_leaves(result) if _are_features(x)]

    def holds(self, args: tuple[object, ...], kwargs: Mapping[str, object]) -> bool:
        """Whether a call is given some of them."""
        if is_compiling():
            return False
        known = [x for x in (ref() for ref in self._features) if x is not None]
        if not known:
            return False
        places = {x.untyped_storage().data_ptr() for x in known}
        given = pytree.tree_leaves((args, dict(kwargs)))
        return any(_are_features(x) and x.untyped_storage().data_ptr() in places for x in given)


def _are_features(value: object) -> bool:
    return type(value) is Tensor and value.is_floating_point() and value.dim() > 2 and value.numel() > 0
