"""Fixed token counts: :func:`freeze`.

With content-adaptive counts, every batch has shapes of its own. In a frozen model each site keeps a fixed number of tokens, and
of each sample those that are best for it. Shapes are static then, as compilers and ONNX need them.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import replace

import torch

from madtp.calls.call import Inputs
from madtp.config import follows_tokens
from madtp.errors import ConfigError
from madtp.pruned import PrunedModel
from madtp.pruned.arguments import check_pruned
from madtp.tuning.batches import calls_of, evaluating

log = logging.getLogger("madtp")


def freeze(pruned: PrunedModel, batches: Iterable[Inputs]) -> dict[str, int]:
    """Fix the number of tokens that each site keeps.

    The number is the mean over the samples of ``batches``, rounded up. Shapes no longer depend on values then:
    :func:`madtp.export`, ``torch.export.export`` and ``torch.compile(pruned, fullgraph=True)`` take the model. A frozen model
    can be frozen again, with other batches or after its gain was changed.

    Args:
        pruned: changed in place; its batching becomes ``"static"``. It is run in eval mode; its mode is restored.
        batches: inputs as the model takes them, dicts of keyword arguments or tuples of positional ones.

    Returns:
        The number of prunable tokens (class token and readouts not counted) that each site keeps from now on.

    Raises:
        ArgumentError: ``pruned`` is no pruned model.
        ConfigError: pruning is off, or an option of the authors' code goes by slots, which fixed counts do not follow.
        ExampleInputsError: there are no batches, or they do not fit the model.
    """
    check_pruned(pruned)
    control = pruned.madtp.control
    if not control.active:
        raise ConfigError("pruning is off (temperature 0), so there are no counts to freeze; set a temperature first.")
    config = pruned.madtp.config
    if not follows_tokens(config) or config.order != "position" or config.merged_mask != "any":
        raise ConfigError(
            "order, mask_order, merged_mask, readout, causal_mask or cross_mask is that of the authors' code, which fixed "
            "counts do not reproduce; leave them at their defaults."
        )
    if config.min_tokens_per_image:
        raise ConfigError(
            "min_tokens_per_image depends on where images stand, which fixed counts do not follow; set it to 0."
        )
    calls = calls_of(pruned, batches)
    before = control.config, control.static_counts, control.static_room
    adaptive = "ragged" if control.config.batching == "static" else control.config.batching
    control.config, control.static_counts = replace(control.config, batching=adaptive), {}
    kept: dict[str, list[int]] = {}
    room: dict[str, int] = {}
    control.measured_room = room
    try:
        with torch.no_grad(), evaluating(pruned):
            for call in calls:
                pruned(*call.args, **call.kwargs)
                for name, counts in control.record.kept_counts.items():
                    kept.setdefault(name, []).extend(counts.tolist())
    except BaseException:
        control.config, control.static_counts, control.static_room = before
        raise
    finally:
        control.measured_room = None
    control.static_counts = {name: math.ceil(sum(counts) / len(counts)) for name, counts in kept.items()}
    control.static_room = room
    control.config = replace(control.config, batching="static")
    control.clear_record()  # it tells of other counts
    missing = [site.name for site in pruned.madtp.report.sites if site.name not in room]
    if missing:
        log.warning(
            "no batch has reached %s; calls that do will be refused. Freeze with batches that do.", ", ".join(missing)
        )
    return dict(control.static_counts)
