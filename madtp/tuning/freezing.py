"""Fixed token counts: :func:`freeze`.

With content-adaptive counts, every batch has shapes of its own. In a frozen model each site keeps a fixed number of tokens, and
of each sample those that are best for it. Shapes are static then, as compilers and ONNX need them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import torch

from madtp.calls.call import Inputs
from madtp.errors import ConfigError
from madtp.pruned import PrunedModel
from madtp.tuning.batches import as_call, evaluating


def freeze(pruned: PrunedModel, batches: Iterable[Inputs]) -> dict[str, int]:
    """Fix the number of tokens that each site keeps.

    The number is the mean over the samples of ``batches``, rounded up.

    Args:
        pruned: changed in place; its batching becomes ``"static"``.
        batches: inputs as the model takes them, dicts of keyword arguments or tuples of positional ones.

    Returns:
        The number of prunable tokens (class token and readouts not counted) that each site keeps from now on.

    Raises:
        ConfigError: there are no batches, or pruning is off.
    """
    control = pruned._control
    if not control.active:
        raise ConfigError("pruning is off (temperature 0), so there are no counts to freeze; set a temperature first.")
    kept: dict[str, list[int]] = {}
    with torch.no_grad(), evaluating(pruned):
        for batch in batches:
            call = as_call(pruned, batch)
            pruned(*call.args, **call.kwargs)
            for name, counts in control.kept_counts.items():
                kept.setdefault(name, []).extend(counts.tolist())
    if not kept:
        raise ConfigError("there are no batches to take counts from; pass at least one batch of inputs.")
    control.static_counts = {name: math.ceil(sum(counts) / len(counts)) for name, counts in kept.items()}
    control.config = replace(control.config, batching="static")
    pruned.config = control.config
    return dict(control.static_counts)
