"""Fixed token counts: :func:`freeze`.

With content-adaptive counts every batch has shapes of its own. Frozen, each site keeps a fixed number of tokens, each sample
its own best.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch

from madtp.calls.call import normalise_call
from madtp.errors import ConfigError
from madtp.pruned import PrunedModel

Inputs = Mapping[str, Any] | tuple[Any, ...]


def freeze(pruned: PrunedModel, batches: Iterable[Inputs]) -> dict[str, int]:
    """Fix the number of tokens that each site keeps at the mean over ``batches``, rounded up.

    Args:
        pruned: changed in place; its batching becomes "static".
        batches: inputs as for the model's call, dicts of keyword arguments or tuples.
    Returns:
        prunable tokens (class token and readouts not counted) that each site keeps from now on.
    Raises:
        ConfigError: there are no batches, or pruning is off.
    """
    control = pruned._control
    if not control.active:
        raise ConfigError("pruning is off (temperature 0), so there are no counts to freeze; set a temperature first.")
    kept: dict[str, list[float]] = {}
    training = pruned.training
    pruned.eval()
    with torch.no_grad():
        for batch in batches:
            call = normalise_call(pruned._host, *(((), batch) if isinstance(batch, Mapping) else (tuple(batch), {})))
            pruned(*call.args, **call.kwargs)
            for name, counts in control.record.kept_counts.items():
                kept.setdefault(name, []).extend(counts.double().tolist())
    pruned.train(training)
    if not kept:
        raise ConfigError("there are no batches to take counts from; pass at least one batch of inputs.")
    control.static_counts = {name: -int(-sum(counts) // len(counts)) for name, counts in kept.items()}
    control.config = replace(control.config, batching="static")
    pruned.config = control.config
    return dict(control.static_counts)
