"""Shapes of cached keys and values: what hosts join, index, move and reshape on their way to attention.

As ``cached_operations.py``, which lists these operations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from madtp.tokens.cached_tokens import CachedTokens, Function
from madtp.tokens.state import gather_positions

Arguments = Sequence[Any]
Named = Mapping[str, Any]
FULL = slice(None)


def dimension(value: object, rank: int) -> int:
    assert isinstance(value, int)
    return value + rank if value < 0 else value


def argument(args: Arguments, kwargs: Named, at: int, name: str, default: object = None) -> Any:
    return args[at] if len(args) > at else kwargs.get(name, default)


def _sizes(args: Arguments, kwargs: Named, name: str) -> list[Any]:
    """The sizes, or dimensions, that follow the tensor: one by one, or in a sequence."""
    given = list(args[1:]) or [kwargs.get(name, ())]
    return list(given[0]) if len(given) == 1 and isinstance(given[0], (tuple, list)) else given


def cat(func: Function, args: Arguments, kwargs: Named) -> object:
    """Appends later tokens; or joins values of the same tokens along another dimension."""
    # An empty tensor is what caches begin with.
    parts = [one for one in args[0] if isinstance(one, CachedTokens) or one.dim() != 1 or one.numel()]
    lead = parts[0]
    if not isinstance(lead, CachedTokens):
        return NotImplemented
    dim = dimension(argument(args, kwargs, 1, "dim", kwargs.get("axis", 0)), lead.survivors.dim())
    if dim == lead.token_dim:
        later = parts[1:]
        if any(isinstance(one, CachedTokens) or one.dim() != lead.survivors.dim() for one in later):
            return NotImplemented
        slots = lead.slots.with_later(sum(one.size(dim) for one in later))
        return CachedTokens(torch.cat([lead.survivors, *later], dim), slots, lead.token_dim, lead.batch_dim)
    if dim == lead.batch_dim:
        return NotImplemented
    values = []
    for one in parts:
        same = isinstance(one, CachedTokens) and one.token_dim == lead.token_dim and one.batch_dim == lead.batch_dim
        if not same or not one.slots.holds_the_same(lead.slots):
            return NotImplemented
        values.append(one.survivors)
    return lead.like(torch.cat(values, dim))


def getitem(func: Function, args: Arguments, kwargs: Named) -> object:
    """Indexing: ranges of tokens, samples by number, new dimensions, parts of other dimensions."""
    x, index = args
    if not isinstance(x, CachedTokens):
        return NotImplemented
    items = list(index) if isinstance(index, tuple) else [index]
    given = sum(one is not None and one is not Ellipsis for one in items)
    places = [at for at, one in enumerate(items) if one is Ellipsis]
    if given > x.survivors.dim() or len(places) > 1:
        return NotImplemented
    at = places[0] if places else len(items)
    items[at : at + 1 if places else at] = [FULL] * (x.survivors.dim() - given)
    tensors = [one for one in items if isinstance(one, (Tensor, list))]
    slots, old, new, moved = x.slots, 0, 0, {}
    chosen: list[Any] = []
    for one in items:
        if one is None:
            chosen.append(None)
            new += 1
            continue
        if old in (x.token_dim, x.batch_dim):
            moved[old] = new
        if old == x.token_dim:
            if not isinstance(one, slice) or (one.step or 1) != 1:
                return NotImplemented
            start, stop, _ = one.indices(slots.length)
            slots, one = (slots, FULL) if (start, stop) == (0, slots.length) else slots.between(start, stop)
        elif old == x.batch_dim and not (isinstance(one, slice) and one == FULL):
            alone = isinstance(one, Tensor) and one.dim() == 1 and len(tensors) == 1 and old == 0
            if not alone and not isinstance(one, slice):
                return NotImplemented
            slots = slots.selected(one)
        elif not isinstance(one, (slice, int)) or isinstance(one, bool):
            return NotImplemented
        chosen.append(one)
        new += not isinstance(one, int)
        old += 1
    token_dim, batch_dim = moved[x.token_dim], moved[x.batch_dim]
    survivors, fewer = x.survivors[tuple(chosen)], slots.without_empty()
    if fewer is None:
        return CachedTokens(survivors, slots, token_dim, batch_dim)
    slots, order = fewer
    survivors = gather_positions(survivors, order, token_dim, batch_dim, survivors.dim())
    return CachedTokens(survivors, slots, token_dim, batch_dim)


def narrow(func: Function, args: Arguments, kwargs: Named) -> object:
    """``narrow``, as indexing with a range."""
    x = args[0]
    dim, start, length = (argument(args, kwargs, at, name) for at, name in ((1, "dim"), (2, "start"), (3, "length")))
    if not isinstance(x, CachedTokens) or not isinstance(start, int) or start < 0:
        return NotImplemented
    index = (FULL,) * dimension(dim, x.survivors.dim()) + (slice(start, start + length),)
    return getitem(func, (x, index), {})


def select_samples(func: Function, args: Arguments, kwargs: Named) -> object:
    """``index_select``: of samples, as beams are reordered; or of another dimension."""
    x = args[0]
    dim, index = argument(args, kwargs, 1, "dim"), argument(args, kwargs, 2, "index")
    if not isinstance(x, CachedTokens) or dimension(dim, x.survivors.dim()) == x.token_dim:
        return NotImplemented
    slots = x.slots.selected(index) if dimension(dim, x.survivors.dim()) == x.batch_dim else x.slots
    return CachedTokens(func(x.survivors, dim, index), slots, x.token_dim, x.batch_dim)


def repeat_interleave(func: Function, args: Arguments, kwargs: Named) -> object:
    """Repeats samples, heads or values, each next to its copies."""
    x, dim = args[0], argument(args, kwargs, 2, "dim")
    times = argument(args, kwargs, 1, "repeats")
    if not isinstance(x, CachedTokens) or dim is None or not isinstance(times, int):
        return NotImplemented
    dim = dimension(dim, x.survivors.dim())
    if dim == x.token_dim:
        return NotImplemented
    slots = x.slots.repeated(times) if dim == x.batch_dim else x.slots
    return CachedTokens(x.survivors.repeat_interleave(times, dim), slots, x.token_dim, x.batch_dim)


def reshape(func: Function, args: Arguments, kwargs: Named) -> object:
    """Shapes in which the tokens keep a dimension of their own."""
    x = args[0]
    if not isinstance(x, CachedTokens):
        return NotImplemented
    sizes = _sizes(args, kwargs, "shape") or _sizes(args, kwargs, "size")
    if not sizes or not all(isinstance(n, int) for n in sizes):
        return NotImplemented
    if -1 in sizes:
        sizes[sizes.index(-1)] = x.numel() // max(1, -math.prod(sizes))
    return _reshaped(x, sizes)


def flatten(func: Function, args: Arguments, kwargs: Named) -> object:
    """``flatten``, of dimensions that do not join tokens with others."""
    x = args[0]
    if not isinstance(x, CachedTokens):
        return NotImplemented
    start = dimension(argument(args, kwargs, 1, "start_dim", 0), x.survivors.dim())
    end = dimension(argument(args, kwargs, 2, "end_dim", -1), x.survivors.dim())
    return _reshaped(x, [*x.shape[:start], math.prod(x.shape[start : end + 1]), *x.shape[end + 1 :]])


def _reshaped(x: CachedTokens, sizes: list[int]) -> object:
    ahead = [math.prod(sizes[:d]) for d in range(len(sizes))]
    before = math.prod(x.shape[: x.token_dim])
    token_dim = next((d for d, n in enumerate(sizes) if ahead[d] == before and n == x.slots.length), 0)
    slots = x.slots.folded(sizes[0])
    if x.batch_dim != 0 or x.token_dim == 0 or token_dim == 0 or slots is None:
        return NotImplemented
    sizes = [x.slots.count if d == token_dim else n for d, n in enumerate(sizes)]
    return CachedTokens(x.survivors.reshape(sizes), slots, token_dim, 0)


def expand(func: Function, args: Arguments, kwargs: Named) -> object:
    """``expand``, of dimensions other than tokens and samples."""
    x = args[0]
    if not isinstance(x, CachedTokens):
        return NotImplemented
    sizes = _sizes(args, kwargs, "size")
    if len(sizes) < x.survivors.dim():
        return NotImplemented
    more = len(sizes) - x.survivors.dim()
    token_dim, batch_dim = x.token_dim + more, x.batch_dim + more
    samples = x.slots.batch if sizes[batch_dim] == -1 else sizes[batch_dim]
    if sizes[token_dim] not in (-1, x.slots.length) or x.slots.batch not in (1, samples):
        return NotImplemented
    sizes[token_dim] = -1
    slots = x.slots if samples == x.slots.batch else x.slots.repeated(samples)
    return CachedTokens(x.survivors.expand(*sizes), slots, token_dim, batch_dim)


def repeat(func: Function, args: Arguments, kwargs: Named) -> object:
    """``repeat``, of samples, heads or values, one copy of all behind the other."""
    x = args[0]
    sizes = _sizes(args, kwargs, "repeats")
    if not isinstance(x, CachedTokens) or len(sizes) != x.survivors.dim() or sizes[x.token_dim] != 1:
        return NotImplemented
    order = torch.arange(x.slots.batch, device=x.slots.index.device).repeat(sizes[x.batch_dim])
    slots = x.slots if sizes[x.batch_dim] == 1 else x.slots.selected(order)
    return CachedTokens(x.survivors.repeat(*sizes), slots, x.token_dim, x.batch_dim)


def transpose(func: Function, args: Arguments, kwargs: Named) -> object:
    """Two dimensions swapped."""
    x = args[0]
    if not isinstance(x, CachedTokens):
        return NotImplemented
    if len(args) == 1 and not kwargs:  # .mT
        one, other = x.survivors.dim() - 2, x.survivors.dim() - 1
    else:
        one = dimension(argument(args, kwargs, 1, "dim0", kwargs.get("axis0")), x.survivors.dim())
        other = dimension(argument(args, kwargs, 2, "dim1", kwargs.get("axis1")), x.survivors.dim())
    order = {one: other, other: one}
    moved = x.survivors.transpose(one, other)
    return CachedTokens(moved, x.slots, order.get(x.token_dim, x.token_dim), order.get(x.batch_dim, x.batch_dim))


def permute(func: Function, args: Arguments, kwargs: Named) -> object:
    """Dimensions in another order."""
    x = args[0]
    if not isinstance(x, CachedTokens):
        return NotImplemented
    order = [dimension(d, x.survivors.dim()) for d in _sizes(args, kwargs, "dims")]
    if len(order) != x.survivors.dim():
        return NotImplemented
    return CachedTokens(x.survivors.permute(order), x.slots, order.index(x.token_dim), order.index(x.batch_dim))


def unsqueeze(func: Function, args: Arguments, kwargs: Named) -> object:
    """A further dimension of size 1."""
    x = args[0]
    if not isinstance(x, CachedTokens):
        return NotImplemented
    dim = dimension(argument(args, kwargs, 1, "dim"), x.survivors.dim() + 1)
    token_dim, batch_dim = (d + (d >= dim) for d in (x.token_dim, x.batch_dim))
    return CachedTokens(x.survivors.unsqueeze(dim), x.slots, token_dim, batch_dim)


def parts(func: Function, args: Arguments, kwargs: Named) -> object:
    """``split`` and ``chunk`` along another dimension."""
    x, dim = args[0], argument(args, kwargs, 2, "dim", 0)
    if not isinstance(x, CachedTokens) or dimension(dim, x.survivors.dim()) in (x.token_dim, x.batch_dim):
        return NotImplemented
    return tuple(x.like(one) for one in func(x.survivors, *args[1:], **kwargs))
