"""Which positions of a sequence another modality was written to, where a module is handed the finished sequence.

Start at :data:`WRITTEN`. A decoder that is called with embeddings does not see which of them are image features: its
host wrote these among the words. So the host's own run is followed (``modality_tracking.py``), and the positions go
into the module's program as one more input. They decide only what may be pruned: a program computes the same for the
survivors whatever they say.

Axis legend: B samples, N tokens, C width.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

WRITTEN = "madtp_written"
"""Name of the further argument: ``[B, N]`` bool, True where another modality was written."""

# Functions that move values, or choose among them; what they do to values they do to marks of the values.
MOVES = frozenset(
    "masked_scatter where index_put scatter index_copy masked_fill cat concat concatenate stack hstack vstack __getitem__ "
    "reshape reshape_as view view_as flatten unflatten squeeze unsqueeze transpose permute movedim swapaxes t expand expand_as "
    "repeat repeat_interleave split chunk unbind select narrow index_select gather flip roll take_along_dim".split()
)
# Marks lie in memory in an order of their own, where a view of the values may be none of the marks.
COPIES = {"view": Tensor.reshape, "view_as": Tensor.reshape_as}
IN_PLACE = frozenset("__setitem__ masked_scatter_ index_put_ scatter_ index_copy_ masked_fill_ copy_".split())
# Functions of each token by itself: a token stays in its place.
TOKENWISE = frozenset(
    "add sub mul div __add__ __radd__ __sub__ __mul__ __rmul__ __truediv__ neg to type type_as float half bfloat16 double cpu "
    "cuda contiguous clone detach dropout layer_norm rms_norm linear gelu relu silu tanh sigmoid".split()
)

MarksOf = Callable[[Tensor], Tensor | None]
"""Marks of a floating tensor, of its shape: True where a value is of the other modality. None where that is unknown."""


def moved(func: Any, args: Any, kwargs: Any, marks_of: MarksOf) -> Any:
    """Marks of what a function that moves values returns; None where they are unknown.

    A function that works in place returns those of its first operand.
    """
    unknown = False

    def mark(value: Any) -> Any:
        nonlocal unknown
        if isinstance(value, float):
            return False  # A number belongs to no other modality.
        if not isinstance(value, Tensor) or not value.dtype.is_floating_point:
            return value
        found = marks_of(value)
        unknown = unknown or found is None
        return found

    args, kwargs = pytree.tree_map(mark, (args, kwargs))
    if unknown:
        return None
    if func.__name__ not in IN_PLACE:
        return COPIES.get(func.__name__, func)(*args, **kwargs)
    changed = args[0].clone()
    func(changed, *args[1:], **kwargs)
    return changed


def takes_written(forward: Callable[..., Any]) -> Callable[..., Any]:
    """``forward`` with a further argument that says which positions were written, which it does not need."""

    @functools.wraps(forward)
    def taking(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop(WRITTEN, None)
        return forward(*args, **kwargs)

    own = inspect.signature(forward)
    further = inspect.Parameter(WRITTEN, inspect.Parameter.KEYWORD_ONLY, default=None)
    parameters = list(own.parameters.values())
    catch_all = [p for p in parameters if p.kind is inspect.Parameter.VAR_KEYWORD]
    named = [p for p in parameters if p not in catch_all]
    taking.__dict__["__signature__"] = own.replace(parameters=[*named, further, *catch_all])
    return taking


def positions(marks: Tensor) -> Tensor:
    """``[B, N]`` which tokens ``[B, N, C]`` are of the other modality, every channel of them."""
    return marks.all(-1)
