"""Which positions of a text sequence hold image features, where a module is given the finished sequence.

Start at :data:`IMAGE_POSITIONS`. A decoder that is called with embeddings cannot see which of them are image features: its host
put them among the words. So the host's own run is followed (``modality_tracking.py``), and the positions enter the module's
program as one more input. They only decide what may be pruned: a program computes the same for the survivors, whatever the
positions are.

An *image mask* has the shape of a floating tensor and says what each value is: :data:`OTHER`, :data:`FEATURE` (an image
feature), or :data:`DROPPED` (one of a token that its vision tower has dropped).

Axis legend: B samples, N tokens, C width.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

IMAGE_POSITIONS = "madtp_image_positions"
"""Name of the further argument: ``[B, N]`` bool, True at image features."""

OTHER, FEATURE, DROPPED = 0, 1, 2
"""What an image mask says of a value. A token is the least of what its values are."""

# Functions that move values or choose among them; they do to an image mask what they do to the values.
MOVES = frozenset(
    "masked_scatter where index_put scatter index_copy masked_fill cat concat concatenate stack hstack vstack __getitem__ "
    "reshape reshape_as view view_as flatten unflatten squeeze unsqueeze transpose permute movedim swapaxes t expand expand_as "
    "repeat repeat_interleave split chunk unbind select narrow index_select gather flip roll take_along_dim".split()
)
# Image masks have strides of their own, which may not allow the view that the values allow.
COPIES: Mapping[str, Callable[..., object]] = {"view": Tensor.reshape, "view_as": Tensor.reshape_as}
IN_PLACE = frozenset("__setitem__ masked_scatter_ index_put_ scatter_ index_copy_ masked_fill_ copy_".split())
# Functions of each token by itself: a token stays at its position.
TOKENWISE = frozenset(
    "add sub mul div __add__ __radd__ __sub__ __mul__ __rmul__ __truediv__ neg to type type_as float half bfloat16 double cpu "
    "cuda contiguous clone detach dropout layer_norm rms_norm linear gelu relu silu tanh sigmoid".split()
)

# The same in place.
TOKENWISE_IN_PLACE = frozenset(
    "add_ sub_ mul_ div_ neg_ __iadd__ __isub__ __imul__ __itruediv__ relu_ dropout_".split()
)
# Of these, functions that mix the values of a token: what comes out is one token all the same.
MIXES_CHANNELS = frozenset(("layer_norm", "rms_norm", "linear"))
# Where functions that move values take a number to write.
FILLS: Mapping[str, tuple[int, ...]] = {
    "where": (1, 2),
    "masked_fill": (2,),
    "masked_fill_": (2,),
    "__setitem__": (2,),
    "scatter": (3,),
    "scatter_": (3,),
}
NUMBERS = frozenset(("value", "input", "other"))

MaskOf = Callable[[Tensor], Tensor | None]
"""Gives the image mask of a floating tensor; None where it is unknown."""


def moved_mask(
    func: Callable[..., object], args: tuple[object, ...], kwargs: Mapping[str, object], mask_of: MaskOf
) -> object:
    """Return the image masks of what a function returns that moves values, in the same structure; None if they are unknown.

    For a function that works in place this is the mask of its first operand.

    Args:
        func: one of :data:`MOVES` or :data:`IN_PLACE`.
        args: its positional arguments.
        kwargs: its arguments by name.
        mask_of: gives the image masks of its operands.
    """
    adds = kwargs.get("reduce") is not None or any(x is True for x in (kwargs.get("accumulate"), *args[3:]))
    if adds or kwargs.get("out") is not None:
        return None  # what is added up, or written elsewhere, is no longer what was moved
    if any(isinstance(x, torch.dtype) for x in (*args, *kwargs.values())):
        return None  # bits are read as other numbers
    unknown = False
    fills = FILLS.get(func.__name__, ())
    # A number that is written belongs to no modality.
    args = tuple(OTHER if at in fills and isinstance(x, (int, float)) else x for at, x in enumerate(args))
    kwargs = {n: OTHER if n in NUMBERS and isinstance(x, (int, float)) else x for n, x in kwargs.items()}

    def mask(value: object) -> object:
        nonlocal unknown
        if isinstance(value, float):
            return OTHER
        if not isinstance(value, Tensor) or not value.dtype.is_floating_point:
            return value
        found = mask_of(value)
        unknown = unknown or found is None
        return found

    operands, options = pytree.tree_map(mask, (args, kwargs))
    if unknown:
        return None
    try:
        if func.__name__ not in IN_PLACE:
            return COPIES.get(func.__name__, func)(*operands, **options)
        changed: Tensor = operands[0].clone()
        func(changed, *operands[1:], **options)
    except (TypeError, RuntimeError):  # a form of the function that masks do not take
        return None
    return changed


def accepting_image_positions(forward: Callable[..., object]) -> Callable[..., object]:
    """Return ``forward`` with the further argument :data:`IMAGE_POSITIONS`, which it ignores."""

    @functools.wraps(forward)
    def accepting(*args: object, **kwargs: object) -> object:
        kwargs.pop(IMAGE_POSITIONS, None)
        return forward(*args, **kwargs)

    own = inspect.signature(forward)
    further = inspect.Parameter(IMAGE_POSITIONS, inspect.Parameter.KEYWORD_ONLY, default=None)
    parameters = list(own.parameters.values())
    catch_all = [p for p in parameters if p.kind is inspect.Parameter.VAR_KEYWORD]
    named = [p for p in parameters if p not in catch_all]
    accepting.__dict__["__signature__"] = own.replace(parameters=[*named, further, *catch_all])
    return accepting


def token_positions(mask: Tensor) -> Tensor:
    """Return which tokens are image features, in every channel of an image mask ``[B, N, C]``; ``[B, N]`` bool."""
    return (mask != OTHER).all(-1)


def dropped_positions(mask: Tensor) -> Tensor:
    """Return which tokens a vision tower has dropped by an image mask ``[B, N, C]``, ``[B, N]`` bool."""
    return (mask == DROPPED).all(-1)


def of_tokens(mask: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the image mask of values of ``shape [..., C']`` that follow from those of ``mask [..., C]`` token by token."""
    return mask.amin(-1, keepdim=True).expand(*shape)
