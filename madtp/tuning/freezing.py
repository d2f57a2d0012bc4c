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
from madtp.tuning.batches import calls_of, evaluating


def freeze(pruned: PrunedModel, batches: Iterable[Inputs]) -> dict[str, int]:
    """Fix the number of tokens that each site keeps.

    The number is the mean over the samples of ``batches``, rounded up. Shapes no longer depend on values then:
    :func:`madtp.export`, ``torch.export.export`` and ``torch.compile(pruned, fullgraph=True)`` take the model.

    Args:
        pruned: changed in place; its batching becomes ``"static"``. It is run in eval mode; its mode is restored.
        batches: inputs as the model takes them, dicts of keyword arguments or tuples of positional ones.

    Returns:
        The number of prunable tokens (class token and readouts not counted) that each site keeps from now on.

    Raises:
        ConfigError: pruning is off, or the model is frozen already.
        ExampleInputsError: there are no batches, or they do not fit the model.
    """
    control = pruned._control
    if control.static_counts:
        raise ConfigError("the model has fixed counts at each site already; rewrite or load it anew to freeze others.")
    if not control.active:
        raise ConfigError("pruning is off (temperature 0), so there are no counts to freeze; set a temperature first.")
    kept: dict[str, list[int]] = {}
    room: dict[str, int] = {}
    control.measured_room = room
    try:
        with torch.no_grad(), evaluating(pruned):
            for call in calls_of(pruned, batches):
                pruned(*call.args, **call.kwargs)
                for name, counts in control.record.kept_counts.items():
                    kept.setdefault(name, []).extend(counts.tolist())
    finally:
        control.measured_room = None
    control.static_counts = {name: math.ceil(sum(counts) / len(counts)) for name, counts in kept.items()}
    control.static_room = dict(room)
    control.config = replace(control.config, batching="static")
    pruned.config = control.config
    return dict(control.static_counts)
