"""The parts of a site: scorer, selector and reducer. :func:`parts_of` finds those of a configuration; the method is one choice.

A site computes what its parts ask for, see :attr:`Parts.needs`, and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

from madtp.config import PruningConfig
from madtp.method.reducers import REDUCERS, Reducer
from madtp.method.scorers import SCORERS, Needs, Scorer
from madtp.method.selectors import SELECTORS, Selector


@dataclass(frozen=True)
class Parts:
    """How a site decides.

    Attributes:
        scorer: what tokens are ranked by.
        selector: which of them survive.
        reducer: what becomes of the others.
        needs: what the three read.
    """

    scorer: Scorer
    selector: Selector
    reducer: Reducer
    needs: Needs


# The scorer and the selector of each value of ``PruningConfig.selection``; a keep ratio replaces the selector.
SELECTIONS = {
    "threshold": ("importance", "threshold"),
    "distinct": ("distinct", "distinct"),
    "random": ("random", "count"),
    "class_attention": ("class_attention", "count"),
    "class_token_attention": ("class_token_attention", "ratio"),
    "last_token_attention": ("last_token_attention", "ratio"),
    "diversity": ("diversity", "ratio"),
    "conditional_diversity": ("conditional_diversity", "ratio"),
}


def parts_of(config: PruningConfig) -> Parts:
    """Return the parts that a configuration asks for.

    Args:
        config: the fields ``selection``, ``keep_ratio`` and ``merge`` are read.
    """
    return PARTS[config.selection, config.keep_ratio is not None, config.merges]


def _parts(selection: str, *, has_ratio: bool, merges: bool) -> Parts:
    ranking, counting = SELECTIONS[selection]
    scorer, selector = SCORERS[ranking], SELECTORS["ratio" if has_ratio else counting]
    reducer = REDUCERS["merge" if merges else "drop"]
    return Parts(scorer, selector, reducer, scorer.needs | selector.needs | reducer.needs)


PARTS = {
    (selection, has_ratio, merges): _parts(selection, has_ratio=has_ratio, merges=merges)
    for selection in SELECTIONS
    for has_ratio in (False, True)
    for merges in (False, True)
}
