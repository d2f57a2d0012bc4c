"""Keys and values in a cache from which tokens were dropped: :class:`CachedTokens`.

To a host it is a tensor of all tokens, so that lengths, positions and masks follow the unpruned positions; it holds the values
of survivors alone. What hosts do with cached keys and values on their way to attention is followed (``cached_operations.py``).
Anything else is an error, so that dropped tokens are never read unnoticed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from madtp.errors import ContinuationError
from madtp.tokens.cached_slots import CachedSlots

Function = Callable[..., Any]
Operation = Callable[[Function, Sequence[Any], Mapping[str, Any]], object]
OPERATIONS: dict[str, Operation] = {}
"""The operations that are followed, by name. They return ``NotImplemented`` for operands that they do not follow."""

# What a tensor says of itself without its values.
METADATA = frozenset(
    ".shape .dtype .device .ndim .layout .requires_grad .is_leaf .is_cuda .is_cpu .is_mps .is_xpu .is_meta .is_sparse "
    ".is_quantized .is_nested .is_mkldnn .grad .grad_fn .names size dim ndimension numel nelement element_size stride "
    "get_device storage_offset is_floating_point is_complex is_signed is_contiguous is_pinned is_inference __len__ __hash__ "
    "._version".split()
)
DEPTH = 8
"""How deep tensors are looked for in containers and objects."""
_strict: ContextVar[bool] = ContextVar("what is not followed is an error", default=False)
UNKNOWN = (
    "{} reads keys or values in a cache of which a pruned call has dropped tokens, which is not followed. `marked()` of such a "
    "tensor has NaN in their place; with pruned.dense() around the first call nothing is dropped"
)
_zeros: ContextVar[bool] = ContextVar("dropped tokens are read as zeros", default=False)


class NotFollowed(Exception):
    """An operation reads cached tokens in a way that is not followed."""


@contextmanager
def _on(switch: ContextVar[bool]) -> Iterator[None]:
    before = switch.set(True)
    try:
        yield
    finally:
        switch.reset(before)


def strictly_followed() -> AbstractContextManager[None]:
    """Raise :class:`NotFollowed` inside the block where cached tokens are read in a way that is not followed."""
    return _on(_strict)


def dropped_as_zeros() -> AbstractContextManager[None]:
    """Run everything inside the block on tensors of all tokens, with zeros for those that were dropped."""
    return _on(_zeros)


@functools.cache
def _name(function: Function) -> str:
    name = getattr(function, "__name__", "")
    if name in ("__get__", "__set__"):
        owner = getattr(getattr(function, "__self__", None), "__name__", "")
        return f".{owner}" if name == "__get__" else f".{owner}="
    return str(name)


class CachedTokens(Tensor):
    """A tensor along cached tokens, of which it holds the survivors.

    Attributes:
        survivors: the tensor of the survivors, with M slots at ``token_dim``.
        slots: which token each slot holds.
        token_dim: the token dimension.
        batch_dim: the batch dimension.
        weights: it holds weights of an attention; those of dropped tokens are zero.
    """

    survivors: Tensor
    slots: CachedSlots
    token_dim: int
    batch_dim: int
    weights: bool

    @staticmethod
    def __new__(cls, values: Tensor, slots: CachedSlots, token_dim: int, batch_dim: int) -> CachedTokens:
        """Make the tensor; see above for the arguments."""
        size = [slots.length if d == token_dim else n for d, n in enumerate(values.shape)]
        made = Tensor._make_wrapper_subclass(cls, size, dtype=values.dtype, device=values.device)
        assert isinstance(made, CachedTokens)
        made.survivors, made.slots, made.token_dim, made.batch_dim = values, slots, token_dim, batch_dim
        made.weights = False
        return made

    def __reduce_ex__(self, protocol: object) -> tuple[object, ...]:
        """Pickle what it holds."""
        return CachedTokens, (self.survivors, self.slots, self.token_dim, self.batch_dim)

    def __deepcopy__(self, memo: dict[int, object]) -> CachedTokens:
        """Copy what it holds. Which token each slot holds never changes."""
        made = self.like(self.survivors.detach().clone() if self.survivors.requires_grad else self.survivors.clone())
        memo[id(self)] = made
        return made

    def like(self, values: Tensor) -> CachedTokens:
        """Return other values of the same tokens, of the same dimensions."""
        made = CachedTokens(values, self.slots, self.token_dim, self.batch_dim)
        made.weights = self.weights
        return made

    def bytes(self) -> int:
        """Return the bytes of memory that it takes."""
        held = (self.survivors, self.slots.index, self.slots.valid)
        return sum(x.numel() * x.element_size() for x in held if x is not None)

    def full_weights(self) -> Tensor:
        """Return weights of an attention to all tokens: zero for those that were dropped."""
        with dropped_as_zeros():
            return self.marked()

    def marked(self) -> Tensor:
        """Return the tensor of all tokens, with NaN for those that were dropped; see :func:`dropped_as_zeros`."""
        slots, values = self.slots, self.survivors
        moved = values.movedim((self.batch_dim, self.token_dim), (0, 1))
        full = moved.new_full((slots.batch, slots.length + 1, *moved.shape[2:]), _missing(values.dtype))
        place, valid = slots.positions(), slots.all_valid()
        if valid is not None:  # empty slots write to a position behind the last
            place = place.masked_fill(~valid, slots.length)
        rows = torch.arange(slots.batch, device=values.device)[:, None]
        full = full.index_put((rows, place), moved)[:, : slots.length]
        return full.movedim((0, 1), (self.batch_dim, self.token_dim))

    @classmethod
    def __torch_function__(
        cls,
        func: Function,
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:
        """Follow an operation; what is not followed is an error."""
        named, kwargs = _name(func), kwargs or {}
        if named in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        operation = None if _zeros.get() or not args else OPERATIONS.get(named)
        if operation is not None:
            result = operation(func, args, kwargs)
            if result is not NotImplemented:
                return result
        return _on_all_tokens(func, named.strip("._"), args, kwargs)

    if not TYPE_CHECKING:  # which has other signatures for these

        def __repr__(self, *, tensor_contents: object = None) -> str:
            """Return its shape, and how many slots it holds."""
            kind = f"shape={tuple(self.shape)}, dtype={self.survivors.dtype}, device='{self.survivors.device}'"
            return f"CachedTokens({kind}, slots={self.slots.count})"

        @classmethod
        def __torch_dispatch__(
            cls,
            func: Function,
            types: Iterable[type],
            args: Sequence[Any] = (),
            kwargs: Mapping[str, Any] | None = None,
        ) -> object:
            """Nothing below Python's functions is followed."""
            return _on_all_tokens(func, str(func), args, kwargs or {})


def _on_all_tokens(function: Function, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> object:
    """Run what is not followed with zeros for dropped tokens where that is asked for; it is an error elsewhere."""
    if not _zeros.get():
        raise NotFollowed(name) if _strict.get() else ContinuationError(UNKNOWN.format(name))
    args, kwargs = pytree.tree_map_only(CachedTokens, CachedTokens.marked, (tuple(args), dict(kwargs)))
    return function(*args, **kwargs)


def _missing(dtype: torch.dtype) -> float | bool:
    return float("nan") if dtype.is_floating_point and not _zeros.get() else False


def holds_cached_tokens(value: object) -> bool:
    """Return whether there are :class:`CachedTokens` in nested containers and objects."""
    return any(isinstance(one, CachedTokens) for one in tensors_in(value))


def tensors_in(value: object, depth: int = DEPTH) -> Iterator[Tensor]:
    """Return the tensors in nested containers and objects."""
    if isinstance(value, Tensor):
        yield value
    elif depth:
        for one in _parts_of(value):
            yield from tensors_in(one, depth - 1)


def _parts_of(value: object) -> Iterable[object]:
    if isinstance(value, (str, bytes, type, torch.nn.Module)):
        return ()
    if isinstance(value, Mapping):
        return value.values()
    if isinstance(value, (tuple, list)):
        return value
    return vars(value).values() if hasattr(value, "__dict__") else ()
