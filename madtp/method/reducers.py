"""Reducers: what becomes of the tokens that do not survive. Start at :class:`Reducer`; :data:`REDUCERS` finds them by name.

Cao et al., CVPR 2024, module DTP; ``docs/method.md``, "Merging".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from madtp.method.scorers import IMPORTANCE, NOTHING, Needs


@dataclass(frozen=True)
class Reducer:
    """What becomes of the dropped tokens of a group.

    Attributes:
        name: what it is found by.
        needs: what it reads.
        merges: whether one token, their mean weighted by importance, takes their place.
        smallest_drop: the smallest number of tokens that is worth dropping.
    """

    name: str
    needs: Needs
    merges: bool
    smallest_drop: int


# To replace one token by one merged token saves nothing.
MERGE = Reducer(name="merge", needs=IMPORTANCE, merges=True, smallest_drop=2)
DROP = Reducer(name="drop", needs=NOTHING, merges=False, smallest_drop=1)

REDUCERS: Mapping[str, Reducer] = {reducer.name: reducer for reducer in (MERGE, DROP)}
