"""The price of the last forward in multiply-accumulates: :func:`macs_by_module`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch

from madtp.programs.program import Run
from madtp.sites.forward_record import ForwardRecord
from madtp.tokens.state import TokenState

OUTSIDE = "(outside the regions)"
Tokens = Literal["kept", "all", "none"]


def macs_by_module(record: ForwardRecord, tokens: Tokens, *, pruning: bool, guided: bool) -> dict[str, float]:
    """Multiply-accumulates per sample of the last forward, by module path.

    Args:
        record: that of the forward.
        tokens: which tokens to price: those that were ``"kept"``, ``"all"`` as without pruning, or ``"none"`` of those that
            may be pruned.
        pruning: whether sites prune.
        guided: whether they compare their tokens with the alignment tokens.
    """
    total: dict[str, float] = {} if record.outside_macs is None else {OUTSIDE: record.outside_macs}
    for run in record.runs:
        share = run.share(record.batch)
        for path, amount in _price(run, tokens, pruning=pruning, guided=guided).items():
            total[path] = total.get(path, 0.0) + amount * share
    return total


def _price(run: Run, tokens: Tokens, *, pruning: bool, guided: bool) -> dict[str, float]:
    counts = {name: state.counts for name, state in run.states.items()}
    known: Mapping[str, TokenState] = {}
    if tokens == "kept":
        known = run.states
    elif tokens == "all":
        counts = {}
    else:
        counts = {name: torch.zeros_like(count) for name, count in counts.items()}
    return run.program.cost.price(run.inputs, counts, pruning and tokens == "kept", known, guided=guided)
