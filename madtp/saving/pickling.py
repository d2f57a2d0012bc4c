"""Pickled pruned models: for ``torch.save(model)``, worker processes and spawned training, :func:`reduced`.

A pickle holds the original, pickled as it is, and what rewrites it again, which happens when the pickle is read. To keep a
model, use :func:`madtp.save`: reading a pickle runs whatever code it names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from madtp.programs.originals import unwrapped
from madtp.pruned import PrunedModel
from madtp.saving.rewriting_again import Settings, description_of, rewritten_as
from madtp.sites.additions import PREFIX

Arguments = tuple[nn.Module, dict[str, Any], Mapping[str, Tensor], dict[str, Any]]


def reduced(pruned: PrunedModel) -> tuple[Callable[..., PrunedModel], Arguments]:
    """Return what makes a pruned model again from what can be pickled."""
    handle = pruned.madtp
    further = {"alignment_weight": handle.alignment_weight, "gradient_checkpointing": handle.gradient_checkpointing}
    return _remade, (unwrapped(pruned), description_of(pruned), handle.state_dict(), further)


def _remade(
    original: nn.Module, description: Mapping[str, Any], own: Mapping[str, Tensor], further: Mapping[str, Any]
) -> PrunedModel:
    source = f"the pickled {PREFIX} model"
    pruned = rewritten_as(source, original, Settings.of(description, source))
    pruned.madtp.load_state_dict(own)
    pruned.madtp.alignment_weight = further["alignment_weight"]
    pruned.madtp.gradient_checkpointing = further["gradient_checkpointing"]
    return pruned
