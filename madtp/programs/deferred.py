"""Tensors whose values are computed when something reads them: :func:`deferred`, and :func:`settled` to have the values.

Shape, dtype and device of such a tensor are known beforehand. Whatever else touches it, in Python or in C++, gets its values.
Gradients that reach it go on to what the values are computed from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from torch.overrides import enable_reentrant_dispatch
from torch.utils import _pytree as pytree

from madtp.errors import MadtpError

Value = TypeVar("Value")


class Form(NamedTuple):
    """What is known of a tensor without its values."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


class Promise(Protocol):
    """Computes the values of a deferred tensor."""

    def value(self) -> Tensor:
        """The tensor with its values, the same at every call; it hangs on the gradients of what it is computed from."""
        ...


def _getters(*names: str) -> Iterable[Callable[..., object]]:
    return (vars(torch._C.TensorBase)[name].__get__ for name in names)


METADATA: frozenset[Callable[..., object]] = frozenset(
    (
        *_getters("shape", "dtype", "device", "requires_grad", "ndim", "layout", "is_cuda"),
        Tensor.size,
        Tensor.dim,
        Tensor.ndimension,
        Tensor.numel,
        Tensor.nelement,
        Tensor.__len__,
        Tensor.is_floating_point,
        Tensor.is_complex,
        torch.is_floating_point,
        torch.is_complex,
        torch.numel,
    )
)
"""Functions that read no values of a tensor, nor how they lie in memory."""


class Deferred(Tensor):
    """A tensor without values. Functions that need them get those of its promise.

    Attributes:
        promise: computes the values.
        needs_gradients: whether it hung on gradients when it was made.
    """

    promise: Promise
    needs_gradients: bool

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call a function with the values, unless it reads none. Autograd follows what it does with them."""
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        args, kwargs = settled((args, kwargs or {}))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: torch._ops.OpOverload,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call an operation with the values, where no Python function of torch was called: autograd stands above."""
        if func._schema.is_mutable:
            raise MadtpError(
                f"{func} writes into what a block returns, past Python, before the block has run. Let it write into a copy "
                "(`x.clone()`)."
            )
        with enable_reentrant_dispatch():
            args, kwargs = settled((args, kwargs or {}))
        return func(*args, **kwargs)


class _Deferral(torch.autograd.Function):
    """Puts a deferred tensor into the graph of autograd, for gradients that reach it and not its values."""

    @staticmethod
    def forward(ctx: Any, promise: Promise, form: Form, *sources: Tensor) -> Tensor:
        ctx.promise, ctx.sources = promise, sources
        return _without_values(promise, form)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        value, sources = ctx.promise.value(), settled(ctx.sources)
        found = torch.autograd.grad(value, sources, gradients, retain_graph=True, allow_unused=True)
        return None, None, *found


class _Standing(torch.autograd.Function):
    """The values of a deferred tensor, which hang on the gradients of this tensor itself."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, value: Tensor) -> Tensor:
        return value.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0], None


def deferred(promise: Promise, form: Form, sources: Sequence[Tensor]) -> Deferred:
    """Return a tensor whose values a promise computes.

    Args:
        promise: computes the values.
        form: shape, dtype and device.
        sources: the tensors that the values are computed from, parameters included.
    """
    differentiable = [one for one in sources if one.requires_grad] if torch.is_grad_enabled() else []
    made = _Deferral.apply(promise, form, *differentiable) if differentiable else _without_values(promise, form)
    assert isinstance(made, Deferred)
    made.promise, made.needs_gradients = promise, bool(differentiable)
    return made


def _without_values(promise: Promise, form: Form) -> Tensor:
    made: Tensor = Tensor._make_wrapper_subclass(Deferred, form.shape, dtype=form.dtype, device=form.device)
    return made


def deferred_in(values: object) -> list[Deferred]:
    """Return the deferred tensors in nested containers, each once."""
    found = {id(leaf): leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Deferred)}
    return list(found.values())


def settled(values: Value) -> Value:
    """Return nested containers with the values in place of deferred tensors; as they are where there are none."""
    if not deferred_in(values):
        return values
    found: Value = pytree.tree_map(lambda leaf: _value(leaf) if isinstance(leaf, Deferred) else leaf, values)
    return found


def _value(tensor: Deferred) -> Tensor:
    value = tensor.promise.value()
    with torch._C.DisableTorchFunctionSubclass():
        given_since = tensor.requires_grad and not tensor.needs_gradients
    if not given_since or value.requires_grad:
        return value
    # It came out of a function with a backward pass of its own, such as a checkpoint, through which its gradients go.
    attached = _Standing.apply(tensor, value)
    assert isinstance(attached, Tensor)
    return attached
