"""Key/value caches whose tensors are written in place: :class:`CachesInPlace` refuses calls with them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from madtp.calls.call import Call
from madtp.calls.objects import on_tensors
from madtp.programs.cached_program import Unserved
from madtp.sites.preserved_state import trial_run

IN_PLACE = (
    "it was called with a cache that has memory set aside for tokens to come, such as a static one, in which dropped tokens "
    "would keep their places; leave the option out that asks for it"
)


class CachesInPlace:
    """Refuses calls with caches that are written in place. Each kind of cache is tried once."""

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], bool] = {}

    def refuse(self, call: Call, original: nn.Module) -> None:
        """Refuse a call, objects flattened, if it has such a cache.

        Args:
            call: the call; it is not changed.
            original: the module as it was before the rewrite.

        Raises:
            Unserved: it has.
        """
        if not call.cache_leaves():
            return
        assert call.objects is not None
        kinds = tuple(spec.kinds() for _, spec in call.objects.specs)
        if kinds not in self._known:
            self._known[kinds] = _writes_in_place(original, call)
        if self._known[kinds]:
            raise Unserved(IN_PLACE)


def _writes_in_place(module: nn.Module, call: Call) -> bool:
    """Whether a module changes tensors of caches in place of putting others there."""
    held = call.cache_leaves()
    leaves = [x.clone() if at in held and isinstance(x, Tensor) else x for at, x in enumerate(call.flat()[0])]
    before = [(x, x._version) for at, x in enumerate(leaves) if at in held and isinstance(x, Tensor)]
    own = call.with_leaves(leaves)
    with torch.no_grad(), trial_run(module, leaves):
        on_tensors(module, own.objects)(*own.args, **own.kwargs)
    return any(x._version != version for x, version in before)
