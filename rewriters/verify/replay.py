"""Checks of a rewrite with pruning on: one decision, carried out in different ways, must give one result.

Start at :func:`dropping_equals_hiding`. The example inputs are run once, and further runs are forced to keep the tokens
that survived. Nothing here knows what the model computes, so every model that is rewritten can be checked.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from madtp.calls.batch import sample_dims
from madtp.calls.call import Call
from madtp.calls.compare import relative_difference
from madtp.calls.image_positions import IMAGE_POSITIONS
from madtp.errors import RewriteError
from madtp.programs.program import Program
from madtp.sites.control import PruningControl
from madtp.sites.preserved_state import trial_run
from madtp.tokens.cache_marks import with_marks
from madtp.tokens.state import kept_positions
from rewriters.plan.plan import Plan

TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-5}
"""Relative to the scale of an output. Products of other sizes round differently; a real fault is far larger.
Scores, and with them the weights of merged tokens, are float32 in any model."""

Forced = dict[str, Tensor]


def dropping_equals_hiding(program: Program, root: nn.Module, control: PruningControl, call: Call) -> None:
    """Tokens that leave and tokens that stay but are hidden from attention and pooling give the same outputs.

    A side input that is not gathered, an operation that mixes tokens unnoticed, a readout at the wrong place: each makes
    the two differ.
    """
    with _pruning(control, merge=False):
        with control.without_features(_some_features(call)):
            dropped = _run(program, root, call)
        control.forced = _survivors(control)
        control.in_place = True
        hidden = _run(program, root, call)
    for position, (want, have) in enumerate(zip(hidden, dropped, strict=True)):
        if error := _difference(want, have):
            raise RewriteError(
                f"output {position} changes by {error:.1e} of its scale if dropped tokens leave instead of being hidden, so "
                "some operation mixes tokens in a way that the rewriter did not see; please report the model."
            )


def batch_mates_do_not_matter(
    program: Program, root: nn.Module, control: PruningControl, call: Call, plan: Plan
) -> None:
    """The first sample alone gives what it gives in its batch, with the same decisions.

    Outputs that compare samples in the original, too, are exempt.
    """
    batch = call.samples()
    with _pruning(control, merge=control.config.merges):
        with control.without_features(_some_features(call)):
            _run(program, root, call)
        # A forced decision always drops merged tokens, a free one may keep them; so both runs are forced.
        control.forced = _survivors(control)
        together = _run(program, root, call)
        firsts = {name: _first_sample(kept, batch, plan) for name, kept in control.forced.items()}
        if any(kept is None for kept in firsts.values()):
            return
        control.forced = {name: kept for name, kept in firsts.items() if kept is not None}
        alone = _run(program, root, first_sample(call))
    found = differences(alone, together)
    if not found:
        return
    with control.unpruned():
        coupled = differences(_run(program, root, first_sample(call)), _run(program, root, call))
    for position, error in found.items():
        if position not in coupled:
            raise RewriteError(
                f"output {position} of the first sample changes by {error:.1e} of its scale with the samples that share its "
                "batch, which it must not; please report the model."
            )


def differences(alone: list[Any], together: list[Any]) -> dict[int, float]:
    """How much the outputs of a sample alone differ from its part of the batch's, by position; only those that do."""
    errors = {
        position: _difference(want, have[tuple(slice(0, n) for n in want.shape)])
        for position, (want, have) in enumerate(zip(alone, together, strict=True))
        if isinstance(want, Tensor) and want.dim()
    }
    return {position: error for position, error in errors.items() if error}


def first_sample(call: Call) -> Call:
    """The call with the first sample of the batch alone; every tensor has to have a batch dimension."""
    leaves = call.flat()[0]
    dims = sample_dims(leaves)
    assert dims is not None
    parts: dict[int, object] = {}  # a tensor that is given twice stays one
    return call.with_leaves(
        [
            parts.setdefault(id(x), x if dim is None else x.narrow(dim, 0, 1))
            for x, dim in zip(leaves, dims, strict=True)
        ]
    )


@contextmanager
def _pruning(control: PruningControl, merge: bool) -> Iterator[None]:
    """Prune, at a middling strength where pruning is off."""
    before = control.config, control.temperature, control.forced
    control.config = replace(control.config, merge=merge)
    control.temperature = control.temperature or 1.0
    try:
        yield
    finally:
        control.config, control.temperature, control.forced = before
        control.in_place = False
        control.clear_record()


def _run(program: Program, root: nn.Module, call: Call) -> list[Any]:
    leaves = call.flat()[0]
    with torch.no_grad(), trial_run(root, leaves):
        return with_marks(pytree.tree_leaves(program.run(root, leaves)))


def _some_features(call: Call) -> Tensor | None:
    """Every third image token of a sequence in which they stand among words, as if its tower had dropped them."""
    positions = call.kwargs.get(IMAGE_POSITIONS)
    return positions & (positions.cumsum(1) % 3 == 1) if isinstance(positions, Tensor) else None


def _survivors(control: PruningControl) -> Forced:
    return {name: kept_positions(state) for name, state in control.record.states.items()}


def _first_sample(kept: Tensor, batch: int, plan: Plan) -> Tensor | None:
    """Rows of the first sample among ``[parts * B, N]``; None if the number of rows is not a multiple of B."""
    parts, rest = divmod(kept.shape[0], batch)
    if rest:
        return None
    blocked = plan.image_order == "blocked" or parts == 1
    return kept.reshape(parts, batch, *kept.shape[1:])[:, 0] if blocked else kept[:parts]


def _difference(want: Any, have: Any) -> float:
    """Largest difference of two outputs, relative to their scale; 0 within tolerance, and for outputs without numbers."""
    if not isinstance(want, Tensor) or not want.dtype.is_floating_point or not want.numel():
        return 0.0
    if want.shape != have.shape:
        return float("inf")
    error = relative_difference(want, have, floor=1e-2)
    return error if error > TOLERANCE.get(want.dtype, 1e-1) else 0.0
