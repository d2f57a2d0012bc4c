"""What is left of a tower's tokens in a rewritten model, for those who read them outside: :func:`survivors`, :func:`seen`.

A rewritten model returns all tokens of a pruned tower; those that were dropped are as they were when they were. A decoder that
runs by itself, or a later call that is given the tokens, has to see what it saw inside the model: the others.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from madtp.pruned import PrunedModel


def seen(model: object, tower: str) -> Tensor | None:
    """Which tokens of a tower survived in the last call of a model, [B, N], 1 for a token; None: all did.

    Args:
        model: a dense one, and one that pruned nothing, keeps all.
        tower: path of the module that the tokens come from.
    """
    left = model.surviving(tower) if isinstance(model, PrunedModel) else None
    return None if left is None or bool(left.all()) else left.long()


def aside(model: object) -> AbstractContextManager[None]:
    """Calls of a model inside leave what :func:`seen` tells of the one before."""
    return model.aside() if isinstance(model, PrunedModel) else nullcontext()


def survivors(model: object, tower: str, tokens: Tensor, multiple: int = 1) -> tuple[Tensor, Tensor | None]:
    """The tokens that survived in the last call of a model, without the others between them.

    Args:
        model, tower: see :func:`seen`.
        tokens: that it returned, [B, N, C], without padding.
        multiple: see :func:`gathered`.

    Returns:
        tokens [B, K, C] in their order, K as many as the fullest sample has, rounded up, and mask [B, K], 1 for a token (None:
        all are).
    """
    left = seen(model, tower)
    return (tokens, None) if left is None else gathered(tokens, left, multiple)


def gathered(tokens: Tensor, left: Tensor, multiple: int = 1) -> tuple[Tensor, Tensor]:
    """Tokens [B, N, C] that `left` [B, N] has at 1, without the others between them, as :func:`survivors` returns them.

    Args:
        tokens, left: all of them, and which survive.
        multiple: K is one of it, or N: a rewritten model is captured for each number of tokens that it is given.
    """
    counts = left.sum(dim=1)
    length = -(-int(counts.max()) // multiple) * multiple
    places = left.argsort(dim=1, descending=True, stable=True)[:, :length]
    found = tokens.gather(1, places[..., None].expand(-1, -1, tokens.shape[-1]))
    return found, (torch.arange(places.shape[1], device=counts.device) < counts[:, None]).long()
