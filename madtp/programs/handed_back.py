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
from madtp.programs.notes import Notes
from madtp.programs.program import Program
from madtp.sites.control import PruningControl

SEEN_WHOLE = (
    "{} is given features that a pruned call of it has returned: there it sees the dropped tokens, too, in the state in which "
    "they were dropped, so the result differs from that of a call that computes the features itself; restrict `towers` or "
    "`layers` if that matters"
)


class HandedBack:
    """Remembers the features that the last pruned call of a module has returned."""

    def __init__(self, name: str, control: PruningControl, notes: Notes) -> None:
        """Make one for a module.

        Args:
            name: of the module, for the note.
            control: of the pruned model.
            notes: takes the note.
        """
        self.name, self.control, self.notes = name, control, notes
        self._features: list[weakref.ref[Tensor]] = []

    def remember(self, program: Program, result: object) -> None:
        """Remember the features ``[B, N, C]`` that a program returned if it pruned; objects such as caches are not opened."""
        if self.control.active and program.sites:
            self._features = [weakref.ref(x) for x in pytree.tree_leaves(result) if _are_features(x)]

    def look_at(self, args: tuple[object, ...], kwargs: Mapping[str, object]) -> None:
        """Note that a call is given some of them."""
        if is_compiling() or not self.control.active:
            return
        places = {x.untyped_storage().data_ptr() for ref in self._features if (x := ref()) is not None}
        if not places:
            return
        given = pytree.tree_leaves((args, dict(kwargs)))
        if any(_are_features(x) and x.untyped_storage().data_ptr() in places for x in given):
            self.notes.add(SEEN_WHOLE.format(self.name))


def _are_features(value: object) -> bool:
    return type(value) is Tensor and value.is_floating_point() and value.dim() > 2 and value.numel() > 0
