"""Capture: from a live module and example inputs to a plain torch.fx graph.

Start at :func:`capture`. The model is traced by ``torch.export`` (non-strict) with the batch and the length of integer
inputs dynamic. The graph comes back at ATen level with placeholders for the flattened inputs, ``get_attr`` nodes
under the model's own parameter names and the module path of every node in ``meta["nn_module_stack"]``. Export's own
guards and assertions are left behind: which calls a capture may serve is decided by :class:`madtp.calls.call.Signature`
and :class:`madtp.calls.size_limits.Limits` instead.
"""

from __future__ import annotations

import inspect
import io
import logging
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import Dim
from torch.utils import _pytree as pytree

from madtp.calls.call import Call
from madtp.calls.fast_path import spelled_out
from madtp.calls.image_positions import IMAGE_POSITIONS
from madtp.calls.objects import ResultSpec, result_spec_of
from madtp.calls.per_image import PerImageArguments, taking_one_image
from madtp.calls.size_limits import Limits, limits_of
from madtp.errors import CaptureError, ExampleInputsError
from rewriters.capture.batch_images import batched
from rewriters.capture.constants import Knowing
from rewriters.capture.inline import inline_bodies
from rewriters.capture.python_branches import Answering, Answers, decide
from rewriters.capture.restore import untouched
from rewriters.capture.rowwise import Rowwise, find_rowwise, sorts
from rewriters.capture.rowwise_op import note_forms, standing_in
from rewriters.capture.scope import WHOLE, Region
from rewriters.graph.nodes import AxisError, attribute

log = logging.getLogger("madtp")
# A program, and how to close the objects that it returns opened.
Exported = tuple[torch.export.ExportedProgram, ResultSpec | None]


@dataclass
class Capture:
    """A captured model: ``graph`` maps the flattened inputs to the flattened outputs. returned: how objects among these are
    closed; None if there are none. limits: on the free sizes."""

    graph: fx.Graph
    constants: dict[str, Tensor]
    out_spec: pytree.TreeSpec
    dynamic: tuple[tuple[int, ...], ...]
    example: Call
    placeholders: list[str] = field(default_factory=list)
    returned: ResultSpec | None = None
    limits: Limits = field(default_factory=Limits)


@contextmanager
def _traceable() -> Iterator[None]:
    """Switch off what hides a model's arithmetic from tracing (the fused encoder layer of torch.nn)."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    # On failure torch.export prints the whole graph; the reason is in the exception.
    unread = io.StringIO()
    try:
        with spelled_out(), warnings.catch_warnings(), redirect_stdout(unread), redirect_stderr(unread):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _dynamic_choices(leaves: list[Any], held: Collection[int], region: Region) -> list[tuple[tuple[int, ...], ...]]:
    """Which dimensions to try as dynamic, most general first; ``held``: tensors of objects, of which all may grow."""
    every = [] if not region.path else [tuple(_lengths(x) if isinstance(x, Tensor) else () for x in leaves)]
    batch = tuple((0,) if isinstance(x, Tensor) and x.dim() > 0 else () for x in leaves)
    length = tuple(
        (0, x.dim() - 1)
        if isinstance(x, Tensor) and x.dim() > 1 and not x.dtype.is_floating_point and x.shape[-1] > 1
        else dims
        for x, dims in zip(leaves, batch, strict=True)
    )
    none: tuple[tuple[int, ...], ...] = tuple(() for _ in leaves)
    grown = [
        tuple(_growing(leaves[at]) if at in held else dims for at, dims in enumerate(choice))
        for choice in (every or [length])
    ]
    return [*dict.fromkeys([*grown, batch]), none]


def _growing(leaf: Any) -> tuple[int, ...]:
    """Dimensions in which a part of an object may grow; a size is its own."""
    return tuple(d for d, n in enumerate(leaf.shape) if n > 1) if isinstance(leaf, Tensor) else (0,)


def _lengths(tensor: Tensor) -> tuple[int, ...]:
    """Batch and token dimensions that a tensor inside a model may have: of a stream [B, N, C], of a mask, of ids."""
    dims: tuple[int, ...]
    if tensor.dtype.is_floating_point and tensor.dim() == 3:
        dims = (0, 1)
    elif tensor.dim() == 4 and tensor.shape[1] > 1:
        dims = (0,)
    else:
        dims = tuple(range(tensor.dim()))
    return tuple(d for d in dims if tensor.shape[d] > 1)


def capture(model: nn.Module, call: Call, region: Region = WHOLE) -> Capture:
    """Trace ``model`` on ``call`` in its present mode (train or eval); it is the module of ``region``.

    Raises :class:`ExampleInputsError` if the model itself rejects the inputs and :class:`CaptureError` if it runs but
    cannot be exported.
    """
    if region.apart is not None:
        return _capture_apart(model, call, region, region.apart)
    exported, failure = _traced(model, call, region)
    apart: list[Rowwise] = []
    if exported is None or _chooses_rows(exported[0]):
        with blamed_on_the_inputs(model):
            apart = find_rowwise(model, call)
        if apart:
            with standing_in(model, apart):
                exported = _traced(model, call, region)[0] or exported
    if exported is not None:
        found = _to_capture(*exported, call, region)
        note_forms(found.graph, apart)
        return found
    raise _untraceable(model, failure)


def _traced(model: nn.Module, call: Call, region: Region) -> tuple[Exported | None, str]:
    """The model exported, with the answers that its Python gets if need be, or why it cannot be."""
    exported, failure = _exported(model, call, region, {})
    if exported is None:
        with blamed_on_the_inputs(model):
            answers = decide(model, call)
        if answers:
            exported, _ = _exported(model, call, region, answers)
    return exported, failure


def _chooses_rows(program: torch.export.ExportedProgram) -> bool:
    """Whether a program chooses or orders rows by their values: sizes in it depend on data, or rows are sorted."""
    for node in program.graph.nodes:
        sizes = [n for value in pytree.tree_leaves(node.meta.get("val")) for n in getattr(value, "shape", ())]
        if sorts(node.target) or any(isinstance(n, torch.SymInt) and not n.node.has_hint() for n in sizes):
            return True
    return False


def _untraceable(model: nn.Module, failure: str) -> CaptureError:
    return CaptureError(
        f"{type(model).__name__} runs on the example inputs but torch.export cannot trace it: {failure}. Remove "
        "data-dependent Python (.item(), .tolist(), if on tensor values) from forward, or rewrite the exportable submodules."
    )


def _capture_apart(model: nn.Module, call: Call, region: Region, apart: PerImageArguments) -> Capture:
    """One image of a batch is traced, its size known; what that computes is then written for any number of them."""
    leaves = call.flat()[0]
    first = call.with_leaves([x[0] if isinstance(x, Tensor) else x for x in leaves])
    with taking_one_image(model), Knowing():
        exported, failure = _export(model, first, tuple(() for _ in leaves), {})
    if exported is None:
        raise _untraceable(model, failure)
    if exported[1] is not None:
        raise CaptureError(f"{type(model).__name__} returns an object for one image that cannot be joined with others.")
    one = _to_capture(*exported, first, region)
    images = [n for n, x in zip(placeholders(one.graph), leaves, strict=True) if isinstance(x, Tensor)]
    try:
        graph = batched(one.graph, images, [x for x in leaves if isinstance(x, Tensor)])
    except AxisError as error:
        raise CaptureError(f"{type(model).__name__} cannot be computed for several images at once: {error}.") from error
    inputs = {at: node.meta.get("val") for at, node in enumerate(placeholders(graph))}
    dynamic = tuple((0,) if isinstance(x, Tensor) else () for x in leaves)
    limits = limits_of(inputs)
    return replace(one, graph=graph, dynamic=dynamic, example=call, limits=limits)


def placeholders(graph: fx.Graph) -> list[fx.Node]:
    """The inputs of a graph, in order."""
    return [node for node in graph.nodes if node.op == "placeholder"]


def _exported(model: nn.Module, call: Call, region: Region, answers: Answers) -> tuple[Exported | None, str]:
    """The model exported with as many free sizes as possible, or why it cannot be."""
    first, *others, fixed = _dynamic_choices(call.flat()[0], call.cache_leaves(), region)
    program, failure = _export(model, call, first, answers)
    if program is not None:
        return program, ""
    # What fails with all sizes fixed fails with free ones too, and most that fails is of that kind.
    frozen, failure = _export(model, call, fixed, answers)
    if frozen is None:
        return None, failure
    freer = (_export(model, call, dynamic, answers)[0] for dynamic in others)
    return next((found for found in freer if found is not None), frozen), ""


def _export(
    model: nn.Module, call: Call, dynamic: tuple[tuple[int, ...], ...], answers: Answers
) -> tuple[Exported | None, str]:
    """The exported model, or why there is none."""
    leaves, spec = call.flat()
    shapes = [
        dict.fromkeys(dims, Dim.AUTO) if isinstance(x, Tensor) else Dim.AUTO if dims else None
        for x, dims in zip(leaves, dynamic, strict=True)
    ]
    args_shapes, kwargs_shapes = _shapes_tree(spec, iter(shapes))
    # Older releases of torch take no dynamic shapes beside a **kwargs of constants; sizes are frozen there.
    combined = _dynamic_tree(model, call, args_shapes, kwargs_shapes) if any(dynamic) else None
    try:
        with _traceable(), Answering(answers), untouched(model):
            program = torch.export.export(model, call.args, call.kwargs, dynamic_shapes=combined, strict=False)
        return (program, result_spec_of(model)), ""
    except Exception as error:  # export raises many kinds
        lines = str(error).strip().splitlines() or [repr(error)]
        return None, f"{type(error).__name__}: {lines[0]}"


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


@contextmanager
def blamed_on_the_inputs(model: nn.Module) -> Iterator[None]:
    """What ``model`` itself raises inside the block becomes an :class:`ExampleInputsError`."""
    try:
        yield
    except Exception as error:
        raise ExampleInputsError(
            f"{type(model).__name__} itself fails on the example inputs: {type(error).__name__}: {error}. "
            "Check names, shapes and dtypes of the inputs."
        ) from error


def _to_capture(
    program: torch.export.ExportedProgram, returned: ResultSpec | None, call: Call, region: Region
) -> Capture:
    limits = limits_of(_inputs(program))
    module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    inline_bodies(module)
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(module.graph, env)
    last = graph.output(output)
    if returned is not None:
        count = len(last.args[0])  # type: ignore[arg-type]
        last.meta["held"] = dict(zip(range(count - len(returned.paths()), count), returned.paths(), strict=True))
    named = dict(program.named_parameters()) | dict(program.named_buffers())
    constants = _own_constants(graph, module, named)
    _shape_constants(graph, constants)
    leaves, _ = pytree.tree_flatten_with_path((call.args, call.kwargs))
    inputs = placeholders(graph)
    dynamic: list[tuple[int, ...]] = []
    by_place = {pytree.keystr(place): node for (place, _), node in zip(leaves, inputs, strict=True)}
    if region.written and IMAGE_POSITIONS in call.kwargs:
        by_place[region.written].meta["written"] = inputs[-1]
    for (place, leaf), node in zip(leaves, inputs, strict=True):
        known = region.modalities.get(pytree.keystr(place))
        if known is not None:
            node.meta["modalities"] = known
        value = node.meta.get("val")
        sizes = value.shape if isinstance(leaf, Tensor) and isinstance(value, Tensor) else [value]
        free = [d for d, n in enumerate(sizes) if is_free(n)]
        dynamic.append(tuple(free))
    out_spec = program.call_spec.out_spec
    assert out_spec is not None
    names = [p.name for p in inputs]
    return Capture(graph, constants, out_spec, tuple(dynamic), call, names, returned, limits)


def _inputs(program: torch.export.ExportedProgram) -> dict[int, Any]:
    """The traced inputs of the user by leaf."""
    names = program.graph_signature.user_inputs
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    return {leaf: values.get(name) for leaf, name in enumerate(names) if isinstance(name, str)}


def _own_constants(graph: fx.Graph, module: fx.GraphModule, named: Collection[str]) -> dict[str, Tensor]:
    """What the graph holds beside parameters and buffers, under plain names that no module has to have."""
    constants: dict[str, Tensor] = {}
    for node in graph.nodes:
        if node.op == "get_attr" and node.target not in named:
            value = attribute(module, node.target)
            node.target = str(node.target).replace(".", "_")
            constants[node.target] = value
    return constants


def is_free(size: Any) -> bool:
    """Whether a captured size may change; export keeps a symbol for sizes that it froze (``len(x)`` does that)."""
    return isinstance(size, torch.SymInt) and size.node.maybe_as_int() is None


def _shape_constants(graph: fx.Graph, constants: dict[str, Tensor]) -> None:
    """Give the constants that export lifted a shape, as later stages want on every tensor, and scalars their number."""
    values = (n.meta.get("val") for n in graph.nodes)
    mode = next((v.fake_mode for v in values if isinstance(v, FakeTensor)), None)
    for node in graph.nodes:
        constant = constants.get(str(node.target)) if node.op == "get_attr" else None
        if not isinstance(constant, Tensor):
            continue
        if mode is not None and "val" not in node.meta:
            node.meta["val"] = mode.from_tensor(constant, static_shapes=True)
        if constant.dim() == 0 and constant.dtype != torch.bool:
            node.meta["number"] = float(constant)
