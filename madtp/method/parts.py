"""The parts of a site: scorer, selector and reducer. :func:`parts_of` finds those of a configuration; the method is one choice.

A site computes what its parts ask for, see :attr:`Parts.needs`, and nothing else. :func:`register_scorer` adds a choice.
"""

from __future__ import annotations

from dataclasses import dataclass

from madtp.config import REGISTERED, PruningConfig
from madtp.errors import ConfigError
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


def register_scorer(scorer: Scorer) -> None:
    """Make a scorer of your own a choice of ``PruningConfig(selection=...)``, under its name.

    A site then keeps ``keep_ratio`` of its tokens, those that score highest; :func:`madtp.calibrate` finds the ratio for a
    saving. Other tokens are discarded, or merged with ``merge=True``. A model that was saved with a scorer can be loaded where
    the scorer is registered. A second scorer of the same name replaces the first.

    Args:
        scorer: its ``name`` is free, and its ``needs`` say what it reads.

    Raises:
        ConfigError: it is no scorer, or its name belongs to a selection of the library.
    """
    if not isinstance(scorer, Scorer):
        raise ConfigError(f"scorer is {scorer!r}; pass an instance of a subclass of madtp.method.scorers.Scorer")
    for attribute, kind in (("name", str), ("needs", Needs)):
        if not isinstance(getattr(scorer, attribute, None), kind):
            raise ConfigError(
                f"{type(scorer).__name__} has no {attribute}; give the class one, of type {kind.__name__}"
            )
    if scorer.name in SELECTIONS:
        raise ConfigError(f"the name {scorer.name!r} belongs to a selection of madtp; choose another")
    REGISTERED.add(scorer.name)
    for merges in (False, True):
        PARTS[scorer.name, True, merges] = _parts(scorer, SELECTORS["ratio"], merges=merges)


def _parts(scorer: Scorer, selector: Selector, *, merges: bool) -> Parts:
    reducer = REDUCERS["merge" if merges else "drop"]
    return Parts(scorer, selector, reducer, scorer.needs | selector.needs | reducer.needs)


PARTS = {
    (selection, has_ratio, merges): _parts(
        SCORERS[scorer], SELECTORS["ratio" if has_ratio else selector], merges=merges
    )
    for selection, (scorer, selector) in SELECTIONS.items()
    for has_ratio in (False, True)
    for merges in (False, True)
}
