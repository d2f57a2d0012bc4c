"""The operations that hosts run on cached keys and values, on the survivors alone. Start at :data:`FOLLOWED`.

Each takes a function of torch, its arguments and its keyword arguments, and returns what the function would return for all
tokens, as :class:`~madtp.tokens.cached_tokens.CachedTokens` where that runs along them; ``NotImplemented`` if it does not
follow such operands.
"""

from __future__ import annotations

import torch
from torch import Tensor

from madtp.tokens import cached_shapes as shapes
from madtp.tokens.attention import join_masks
from madtp.tokens.cached_shapes import Arguments, Named, argument, dimension
from madtp.tokens.cached_slots import CachedSlots
from madtp.tokens.cached_tokens import OPERATIONS, CachedTokens, Function, Operation
from madtp.tokens.state import along


def pointwise(func: Function, args: Arguments, kwargs: Named) -> object:
    """Operations on each value, of operands that broadcast. Those in place write to the first operand."""
    cached = [one for one in args if isinstance(one, CachedTokens)]
    if not cached or any(isinstance(one, Tensor) for one in kwargs.values()):
        return NotImplemented
    if _is_in_place(func) and not isinstance(args[0], CachedTokens):
        return NotImplemented
    rank = max(one.dim() for one in args if isinstance(one, Tensor))
    lead = cached[0]
    more = rank - lead.survivors.dim()
    token_dim, batch_dim, slots = lead.token_dim + more, lead.batch_dim + more, lead.slots
    fitted = []
    for one in args:
        if isinstance(one, CachedTokens):
            extra = rank - one.survivors.dim()
            same = one.token_dim + extra == token_dim and one.batch_dim + extra == batch_dim
            if not same or not one.slots.holds_the_same(slots):
                return NotImplemented
            fitted.append(one.survivors)
        elif isinstance(one, Tensor):
            if not _fits(one, slots, token_dim, batch_dim, rank):
                return NotImplemented
            fitted.append(slots.fit(one, token_dim, batch_dim, rank))
        else:
            fitted.append(one)
    values = func(*fitted, **kwargs)
    if not isinstance(values, Tensor) or values.dim() != rank:
        return NotImplemented
    if isinstance(args[0], CachedTokens) and values is args[0].survivors:  # in place
        return args[0]
    return CachedTokens(values, slots, token_dim, batch_dim)


def _is_in_place(func: Function) -> bool:
    name = func.__name__
    return name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))


def _fits(side: Tensor, slots: CachedSlots, token_dim: int, batch_dim: int, rank: int) -> bool:
    def size(dim: int) -> int:
        at = dim - rank + side.dim()
        return side.size(at) if at >= 0 else 1

    return size(token_dim) in (1, slots.length) and size(batch_dim) in (1, slots.batch)


def on_values(func: Function, args: Arguments, kwargs: Named) -> object:
    """Operations on the values of one tensor, that leave its dimensions as they are."""
    x, others = args[0], args[1:]
    if not isinstance(x, CachedTokens):
        return NotImplemented
    others = [one.survivors if isinstance(one, CachedTokens) else one for one in others]
    values = func(x.survivors, *others, **kwargs)
    if not isinstance(values, Tensor):
        return values
    slots = x.slots if values.device == x.survivors.device else x.slots.to(values.device)
    result = CachedTokens(values, slots, x.token_dim, x.batch_dim)
    result.weights = x.weights
    return result


def over_last_dims(func: Function, args: Arguments, kwargs: Named) -> object:
    """Operations on the last dimensions, which hold the values of a token."""
    x = args[0]
    shape = argument(args, kwargs, 1, "normalized_shape")
    last = len(shape) if isinstance(shape, (tuple, list)) else 1
    if not isinstance(x, CachedTokens) or max(x.token_dim, x.batch_dim) >= x.survivors.dim() - last:
        return NotImplemented
    return on_values(func, args, kwargs)


def softmax(func: Function, args: Arguments, kwargs: Named) -> object:
    """The softmax; slots without a token get no weight."""
    x = args[0]
    dim = argument(args, kwargs, 1, "dim")
    if not isinstance(x, CachedTokens) or dim is None:
        return NotImplemented
    values, valid = x.survivors, x.slots.all_valid()
    if dimension(dim, x.survivors.dim()) == x.token_dim and valid is not None:
        values = values.masked_fill(~along(valid, x.survivors.dim(), x.token_dim, x.batch_dim), float("-inf"))
    result = x.like(func(values, *args[1:], **kwargs))
    result.weights = dimension(dim, x.survivors.dim()) == x.token_dim
    return result


def product(func: Function, args: Arguments, kwargs: Named) -> object:
    """Matrix products: scores with cached keys, and what scores read of cached values."""
    if len(args) != 2 or kwargs:
        return NotImplemented
    one, other = args
    if not isinstance(other, CachedTokens):
        if one.token_dim == one.dim() - 1 or one.batch_dim >= one.dim() - 2:
            return NotImplemented
        return one.like(func(one.survivors, other)) if other.dim() <= one.dim() else NotImplemented
    rank = other.dim()
    if other.batch_dim >= rank - 2:
        return NotImplemented
    if other.token_dim == rank - 1 and not isinstance(one, CachedTokens) and one.dim() in (rank, 2):
        return other.like(func(one, other.survivors))
    if other.token_dim != rank - 2 or not isinstance(one, CachedTokens) or one.dim() != rank:
        return NotImplemented
    same = one.token_dim == rank - 1 and one.batch_dim == other.batch_dim and one.slots.holds_the_same(other.slots)
    if not same:
        return NotImplemented
    weights, valid = one.survivors, one.slots.all_valid()
    if valid is not None:
        weights = weights.masked_fill(~along(valid, rank, rank - 1, one.batch_dim), 0)
    return func(weights, other.survivors)


def attention(func: Function, args: Arguments, kwargs: Named) -> object:
    """Scaled dot-product attention over cached keys and values."""
    named = {
        **dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), args, strict=False)),
        **kwargs,
    }
    query, key, value = named.pop("query"), named.pop("key"), named.pop("value")
    both = isinstance(key, CachedTokens) and isinstance(value, CachedTokens) and not isinstance(query, CachedTokens)
    if not both or not key.slots.holds_the_same(value.slots) or key.batch_dim or value.batch_dim:
        return NotImplemented
    rank, slots = key.survivors.dim(), key.slots
    if key.token_dim != rank - 2 or value.token_dim != rank - 2 or query.dim() != rank or rank < 3:
        return NotImplemented
    mask = named.pop("attn_mask", None)
    if mask is not None:
        if isinstance(mask, CachedTokens):
            if not mask.slots.holds_the_same(slots):
                return NotImplemented
            mask = mask.survivors
        elif not _fits(mask, slots, rank - 1, 0, rank):
            return NotImplemented
        else:
            mask = slots.fit(mask, rank - 1, 0, rank)
    if named.pop("is_causal", False):
        behind = torch.arange(query.size(-2), device=query.device)[:, None] >= slots.positions()[:, None]
        mask = _hiding(mask, behind[(slice(None),) + (None,) * (rank - 3)])
    valid = slots.all_valid()
    if valid is not None:
        mask = _hiding(mask, along(valid, rank, rank - 1, 0))
    return func(query, key.survivors, value.survivors, attn_mask=mask, **named)


def _hiding(mask: Tensor | None, visible: Tensor) -> Tensor:
    """The mask of an attention that also hides what is not visible."""
    return visible if mask is None else join_masks(mask, visible)


def storage(func: Function, args: Arguments, kwargs: Named) -> object:
    """The memory of the survivors."""
    return func(args[0].survivors)


FOLLOWED: dict[Operation, str] = {
    pointwise: (
        "add add_ __add__ __radd__ __iadd__ sub sub_ __sub__ __rsub__ __isub__ mul mul_ __mul__ __rmul__ __imul__ "
        "div div_ __truediv__ __rtruediv__ __itruediv__ pow __pow__ square sqrt rsqrt exp neg __neg__ abs tanh tanh_ sigmoid "
        "clamp clamp_ masked_fill masked_fill_ where"
    ),
    on_values: "to float half bfloat16 double type type_as cpu cuda clone detach .data contiguous dropout nan_to_num",
    over_last_dims: "layer_norm rms_norm linear",
    softmax: "softmax",
    product: "matmul __matmul__ bmm",
    attention: "scaled_dot_product_attention",
    shapes.cat: "cat concat concatenate",
    shapes.getitem: "__getitem__",
    shapes.narrow: "narrow",
    shapes.select_samples: "index_select",
    shapes.repeat_interleave: "repeat_interleave",
    shapes.reshape: "reshape view",
    shapes.flatten: "flatten",
    shapes.expand: "expand",
    shapes.repeat: "repeat tile",
    shapes.transpose: "transpose swapaxes swapdims .mT",
    shapes.permute: "permute",
    shapes.unsqueeze: "unsqueeze",
    shapes.parts: "split chunk",
    storage: "untyped_storage .nbytes",
}
"""Operations, with the names of the functions of torch that they follow."""

OPERATIONS.update({name: operation for operation, names in FOLLOWED.items() for name in names.split()})
