"""Run torch.export on a call, with as many sizes free as possible.

Start at :func:`export_freely`.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, _trace
from torch.utils import _pytree as pytree

from madtp.calls.call import Call
from madtp.calls.capture_lock import CAPTURE_LOCK
from madtp.calls.fast_path import spelled_out
from madtp.calls.objects import ResultSpec, result_spec_of
from madtp.sites.preserved_state import preserved_attributes, random_states
from rewriters.capture.decided_comparisons import decided_comparisons
from rewriters.capture.own_backward import following_functions
from rewriters.capture.python_branches import Answers, ReplayingAnswers
from rewriters.capture.quick_shapes import quick_shapes
from rewriters.capture.quiet import quiet
from rewriters.capture.scope import Region

FreeDims = tuple[tuple[int, ...], ...]


BUFFER_HOOKS = "_global_buffer_registration_hooks"
NO_TRACES = "do_not_emit_stack_traces"
"""Setting of torch.fx."""


@dataclass(frozen=True)
class Exported:
    """What torch.export made of a model.

    Attributes:
        program: The exported program.
        returned: How objects are rebuilt of which it returns the tensors; None if there are none.
        own_backward: Functions with a backward pass of their own, which it has lost.
    """

    program: torch.export.ExportedProgram
    returned: ResultSpec | None
    own_backward: tuple[str, ...] = ()


@dataclass(frozen=True)
class ExportFailure:
    """Why torch.export could not trace a model."""

    reason: str


def export_freely(model: nn.Module, call: Call, region: Region, answers: Answers) -> Exported | ExportFailure:
    """The model exported with as many free sizes as possible, or why it cannot be."""
    first, *others, fixed = _choices_of_free_dims(call.flat()[0], call.cache_leaves(), region)
    freest = export(model, call, first, answers)
    if isinstance(freest, Exported):
        return freest
    # What fails with all sizes fixed fails with free ones too, and most that fails is of that kind.
    frozen = export(model, call, fixed, answers)
    if isinstance(frozen, ExportFailure):
        return frozen
    freer = (export(model, call, free, answers) for free in others)
    return next((exported for exported in freer if isinstance(exported, Exported)), frozen)


def export(model: nn.Module, call: Call, free: FreeDims, answers: Answers) -> Exported | ExportFailure:
    """The exported model, or why it cannot be exported."""
    leaves, spec = call.flat()
    shapes = [
        dict.fromkeys(dims, Dim.AUTO) if isinstance(x, Tensor) else Dim.AUTO if dims else None
        for x, dims in zip(leaves, free, strict=True)
    ]
    args_shapes, kwargs_shapes = _shapes_tree(spec, iter(shapes))
    # Older releases of torch take no dynamic shapes beside a **kwargs of constants; sizes are frozen there.
    combined = _dynamic_tree(model, call, args_shapes, kwargs_shapes) if any(free) else None
    # Code without gradients inside shows only where there are gradients around it. Some models cannot run with them.
    for with_gradients in dict.fromkeys((True, torch.is_grad_enabled())):
        exported = _exported(model, call, combined, answers, with_gradients)
        if isinstance(exported, Exported):
            break
    return exported


def _exported(
    model: nn.Module, call: Call, dynamic_shapes: Any, answers: Answers, with_gradients: bool
) -> Exported | ExportFailure:
    try:
        with (
            torch.set_grad_enabled(with_gradients),
            _traceable(),
            following_functions() as own_backward,
            decided_comparisons(),
            ReplayingAnswers(answers),
            preserved_attributes(model),
        ):
            drawn = random_states()
            program = torch.export.export(model, call.args, call.kwargs, dynamic_shapes=dynamic_shapes, strict=False)
        if random_states() != drawn:
            return ExportFailure(
                "it draws numbers by Python's or NumPy's generator, which would be constants of a graph"
            )
        return Exported(program, result_spec_of(model), tuple(own_backward))
    except Exception as error:  # export raises many kinds
        lines = str(error).strip().splitlines() or [repr(error)]
        return ExportFailure(f"{type(error).__name__}: {lines[0]}")


def _shapes_tree(spec: pytree.TreeSpec, shapes: Iterator[Any]) -> Any:
    """Shapes in the structure of a call; export wants those of containers that Python does not come with as lists."""
    if spec.is_leaf():
        return next(shapes)
    own = [_shapes_tree(child, shapes) for child in spec.children()]
    if spec.type not in pytree.BUILTIN_TYPES:
        return own
    return pytree.SUPPORTED_NODES[spec.type].unflatten_fn(own, spec.context)


def _dynamic_tree(model: nn.Module, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Dynamic shapes in the form that export expects: by parameter name, or a tuple where arguments are positional."""
    if call.args:
        return (args, *kwargs.values()) if kwargs else args
    parameters = inspect.signature(model.forward).parameters.values()
    catch_all = [p.name for p in parameters if p.kind is inspect.Parameter.VAR_KEYWORD]
    known = {p.name for p in parameters}
    extra = {k: v for k, v in kwargs.items() if k not in known}
    if not extra:
        return kwargs
    named = {k: v for k, v in kwargs.items() if k in known}
    return {**named, catch_all[0]: extra}


def _choices_of_free_dims(leaves: list[Any], cached: Collection[int], region: Region) -> list[FreeDims]:
    """Which dimensions to try as free, most general first; those of the leaves ``cached``, parts of objects, may all grow."""
    every = [] if not region.name else [tuple(_lengths(x) if isinstance(x, Tensor) else () for x in leaves)]
    batch = tuple((0,) if isinstance(x, Tensor) and x.dim() > 0 else () for x in leaves)
    length = tuple(
        (0, x.dim() - 1)
        if isinstance(x, Tensor) and x.dim() > 1 and not x.dtype.is_floating_point and x.shape[-1] > 1
        else dims
        for x, dims in zip(leaves, batch, strict=True)
    )
    none: FreeDims = tuple(() for _ in leaves)
    grown = [
        tuple(_growing(leaves[at]) if at in cached else dims for at, dims in enumerate(choice))
        for choice in (every or [length])
    ]
    return [*dict.fromkeys([*grown, batch]), none]


def _growing(leaf: Any) -> tuple[int, ...]:
    """Dimensions in which a part of an object may grow; a size is its own."""
    return tuple(d for d, n in enumerate(leaf.shape) if n > 1) if isinstance(leaf, Tensor) else (0,)


def _lengths(tensor: Tensor) -> tuple[int, ...]:
    """Batch and token dimensions that a tensor inside a model may have: of a stream ``[B, N, C]``, of a mask, of ids."""
    dims: tuple[int, ...]
    if tensor.dtype.is_floating_point and tensor.dim() == 3:
        dims = (0, 1)
    elif tensor.dim() == 4 and tensor.shape[1] > 1:
        dims = (0,)
    else:
        dims = tuple(range(tensor.dim()))
    return tuple(d for d in dims if tensor.shape[d] > 1)


@contextmanager
def _traceable() -> Iterator[None]:
    """Switch off what hides a model's arithmetic from tracing, such as the fused encoder layer of torch.nn.

    One thread at a time can be inside.
    """
    with (
        CAPTURE_LOCK,
        spelled_out(),
        quick_shapes(),
        _without_stack_traces(),
        _without_printed_graphs(),
        _without_hooks_left_behind(),
        quiet(),
    ):
        yield


@contextmanager
def _without_hooks_left_behind() -> Iterator[None]:
    """Remove the hook on buffers of all modules that exports of older releases of torch leave behind where they fail."""
    hooks: dict[int, object] = getattr(nn.modules.module, BUFFER_HOOKS, {})
    before = dict(hooks)
    try:
        yield
    finally:
        for key in [key for key in hooks if key not in before]:
            del hooks[key]


@contextmanager
def _without_printed_graphs() -> Iterator[None]:
    """Let export not print what it has traced when it fails: the reason is in the exception."""
    names = vars(_trace)
    names["print"] = lambda *args, **kwargs: None
    try:
        yield
    finally:
        del names["print"]


@contextmanager
def _without_stack_traces() -> Iterator[None]:
    """Let nodes not say where in Python they come from: nobody reads it, and it takes a twentieth of the time."""
    traces = getattr(torch.fx.config, NO_TRACES, None)
    setattr(torch.fx.config, NO_TRACES, True)
    try:
        yield
    finally:
        if traces is None:  # older releases of torch know no such setting
            delattr(torch.fx.config, NO_TRACES)
        else:
            setattr(torch.fx.config, NO_TRACES, traces)
