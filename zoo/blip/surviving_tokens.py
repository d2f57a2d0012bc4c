"""Which tokens of a rewritten model's tower survived, for code that reads them outside the model. Start with
:func:`surviving_tokens`.

A rewritten model returns all tokens of a pruned tower; a dropped token keeps the last state it had. A decoder that runs by
itself, or a later call that is given the tokens, must read what the model itself read: the survivors alone.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from madtp.pruned import PrunedModel


def surviving_mask(model: object, tower: str) -> Tensor | None:
    """Return which tokens of a tower survived in a model's last call.

    Args:
        model: Dense or rewritten. A dense model, and one that pruned nothing, keeps all tokens.
        tower: The path of the module that the tokens come from.

    Returns:
        ``[B, N]``, 1 for a survivor; None if all tokens survived.
    """
    mask = model.madtp.surviving(tower) if isinstance(model, PrunedModel) else None
    return None if mask is None or bool(mask.all()) else mask.long()


def aside(model: object) -> AbstractContextManager[None]:
    """Return a context in which calls of a model do not change the :func:`surviving_mask` of the call before."""
    return model.madtp.aside() if isinstance(model, PrunedModel) else nullcontext()


def surviving_tokens(model: object, tower: str, tokens: Tensor, multiple: int = 1) -> tuple[Tensor, Tensor | None]:
    """Return the tokens that survived in a model's last call, without the dropped ones between them.

    Args:
        model: See :func:`surviving_mask`.
        tower: See :func:`surviving_mask`.
        tokens: What the call returned, ``[B, N, C]``, without padding.
        multiple: See :func:`compacted`.

    Returns:
        The tokens ``[B, K, C]`` in order, and their mask ``[B, K]``, 1 for a token; None if all are tokens. K is the count of
        the fullest sample, rounded up.
    """
    mask = surviving_mask(model, tower)
    return (tokens, None) if mask is None else compacted(tokens, mask, multiple)


def compacted(tokens: Tensor, mask: Tensor, multiple: int = 1) -> tuple[Tensor, Tensor]:
    """Return the tokens under a mask without the others between them; see :func:`surviving_tokens`.

    Args:
        tokens: ``[B, N, C]``.
        mask: ``[B, N]``, 1 for a survivor.
        multiple: K is a multiple of it, or N. A rewritten model is captured once for each number of tokens it is given, so
            few different numbers mean few captures.
    """
    counts = mask.sum(dim=1)
    length = -(-int(counts.max()) // multiple) * multiple
    places = mask.argsort(dim=1, descending=True, stable=True)[:, :length]
    found = tokens.gather(1, places[..., None].expand(-1, -1, tokens.shape[-1]))
    return found, (torch.arange(places.shape[1], device=counts.device) < counts[:, None]).long()
