"""The price of the last forward in multiply-accumulates: :func:`macs_by_module`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch

from madtp.programs.program import Run
from madtp.sites.control import PruningControl
from madtp.tokens.state import TokenState

OUTSIDE = "(outside the regions)"
Tokens = Literal["kept", "all", "none"]


def macs_by_module(control: PruningControl, tokens: Tokens) -> dict[str, float]:
    """Multiply-accumulates per sample of the last forward, by module path.

    Args:
        control: the control of the pruned model; it holds the record of the forward.
        tokens: which tokens to price: those that were ``"kept"``, ``"all"`` as without pruning, or ``"none"`` of those that
            may be pruned.
    """
    total: dict[str, float] = {} if control.record.outside_macs is None else {OUTSIDE: control.record.outside_macs}
    for run in control.record.runs:
        share = run.share(control.record.batch)
        for path, amount in _price(run, tokens, pruning=control.active).items():
            total[path] = total.get(path, 0.0) + amount * share
    return total


def _price(run: Run, tokens: Tokens, *, pruning: bool) -> dict[str, float]:
    counts = {name: state.counts for name, state in run.states.items()}
    known: Mapping[str, TokenState] = {}
    if tokens == "kept":
        known = run.states
    elif tokens == "all":
        counts = {}
    else:
        counts = {name: torch.zeros_like(count) for name, count in counts.items()}
    return run.program.cost.price(run.inputs, counts, pruning and tokens == "kept", known)
