"""From a live module and example inputs to a plain torch.fx graph.

Start at :func:`capture`. The model is traced by ``torch.export`` (non-strict) with the batch and the length of integer
inputs dynamic. The graph comes back at ATen level with placeholders for the flattened inputs, ``get_attr`` nodes
under the model's own parameter names and the module path of every node in ``meta["nn_module_stack"]``. Export's own
guards and assertions are left behind: which calls a capture may serve is decided by :class:`madtp.calls.call.Signature`
and :class:`madtp.calls.size_limits.SizeLimits` instead.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from madtp.calls.call import Call
from madtp.calls.image_positions import IMAGE_POSITIONS
from madtp.calls.objects import CannotFlatten, ResultSpec
from madtp.calls.packed_images import taking_one_image
from madtp.calls.quantised import quantised_remark
from madtp.calls.size_limits import SizeLimits, limits_of
from madtp.errors import CaptureError, ExampleInputsError
from rewriters.capture.batch_images import batched
from rewriters.capture.constants import FoldingConstants
from rewriters.capture.inline import inline_bodies
from rewriters.capture.mixture_of_experts import find_rowwise, sorts
from rewriters.capture.mixture_of_experts_op import calling_rowwise_op, record_rowwise
from rewriters.capture.python_branches import record_answers
from rewriters.capture.scope import WHOLE, Region
from rewriters.capture.torch_export import Exported, ExportFailure, export, export_freely
from rewriters.graph.node_record import RowwiseModule, record, set_record
from rewriters.graph.nodes import AxisError, attribute, module_path

DRAWS = (
    "draws numbers by a torch.Generator of its own. In a graph that would go on where the last call ended, not begin anew. "
    "Draw outside of the transformer, or by torch's own generator."
)


@dataclass
class Capture:
    """A captured model.

    Attributes:
        graph: Maps the flattened inputs to the flattened outputs.
        constants: Tensors that the graph holds besides parameters and buffers, by their names in it.
        out_spec: Structure of the outputs.
        dynamic: Free dimensions of each input leaf.
        example: The call that was traced.
        returned: How objects among the outputs, of which the graph returns the tensors, are rebuilt; None if there are none.
        limits: Limits on the free sizes.
        own_backward: Functions with a backward pass of their own, which the graph has lost.
        unshielded: It serves calls without autocast alone, as the model leaves autocast inside.
    """

    graph: fx.Graph
    constants: dict[str, Tensor]
    out_spec: pytree.TreeSpec
    dynamic: tuple[tuple[int, ...], ...]
    example: Call
    returned: ResultSpec | None = None
    limits: SizeLimits = field(default_factory=SizeLimits)
    own_backward: tuple[str, ...] = ()
    unshielded: bool = False


def capture(model: nn.Module, call: Call, region: Region = WHOLE) -> Capture:
    """Trace ``model`` on ``call`` in its present mode (train or eval).

    Args:
        model: The module of ``region``.
        call: The call to trace, objects in it opened.
        region: What ``model`` is of the whole model.

    Raises:
        ExampleInputsError: The model itself rejects the inputs.
        CaptureError: It runs, but cannot be exported.
    """
    if region.per_image is not None:
        return _capture_per_image(model, call, region)
    exported = _export_answering(model, call, region)
    rowwise: list[RowwiseModule] = []
    if isinstance(exported, ExportFailure) or _chooses_rows(exported.program):
        with blamed_on_the_inputs(model):
            rowwise = find_rowwise(model, call)
        if rowwise:
            with calling_rowwise_op(model, rowwise):
                again = _export_answering(model, call, region)
            exported = exported if isinstance(again, ExportFailure) else again
    if isinstance(exported, ExportFailure):
        raise _untraceable(model, exported)
    try:
        captured = _to_capture(exported, call, region)
    except RuntimeError as error:
        # torch.fx has attributes of its own that hide submodules of the same name.
        raise CaptureError(
            f"{type(model).__name__} cannot be taken over from torch.export: {error}. A submodule must not be named as an "
            "attribute of torch.fx.GraphModule, such as code or graph."
        ) from error
    record_rowwise(captured.graph, rowwise)
    return captured


def _export_answering(model: nn.Module, call: Call, region: Region) -> Exported | ExportFailure:
    """The model exported, with the answers that its Python gets if need be, or why it cannot be."""
    exported = export_freely(model, call, region, {})
    if isinstance(exported, Exported):
        return exported
    with blamed_on_the_inputs(model):
        answers = record_answers(model, call)
    if not answers:
        return exported
    again = export_freely(model, call, region, answers)
    return exported if isinstance(again, ExportFailure) else again


def _chooses_rows(program: torch.export.ExportedProgram) -> bool:
    """Whether a program chooses or orders rows by their values: sizes in it depend on data, or rows are sorted."""
    for node in program.graph.nodes:
        sizes = [n for value in pytree.tree_leaves(node.meta.get("val")) for n in getattr(value, "shape", ())]
        if sorts(node.target) or any(isinstance(n, torch.SymInt) and not n.node.has_hint() for n in sizes):
            return True
    return False


def _untraceable(model: nn.Module, failure: ExportFailure) -> CaptureError:
    if str(torch.Generator) in failure.reason:  # export of torch 2.11 takes none
        return CaptureError(f"{type(model).__name__} {DRAWS}")
    return CaptureError(
        f"{type(model).__name__} runs on the example inputs but torch.export cannot trace it: {failure.reason}. Remove "
        "data-dependent Python (.item(), .tolist(), if on tensor values) from forward, or rewrite the exportable submodules."
        f"{quantised_remark(model)}"
    )


def _capture_per_image(model: nn.Module, call: Call, region: Region) -> Capture:
    """Trace one image of a batch, its size known, and write what that computes for any number of images."""
    leaves = call.flat()[0]
    first = call.with_leaves([x[0] if isinstance(x, Tensor) else x for x in leaves])
    with taking_one_image(model), FoldingConstants():
        exported = export(model, first, tuple(() for _ in leaves), {})
    if isinstance(exported, ExportFailure):
        raise _untraceable(model, exported)
    if exported.returned is not None:
        raise CaptureError(f"{type(model).__name__} returns an object for one image that cannot be joined with others.")
    one = _to_capture(exported, first, region)
    images = [n for n, x in zip(placeholders(one.graph), leaves, strict=True) if isinstance(x, Tensor)]
    try:
        graph = batched(one.graph, images, [x for x in leaves if isinstance(x, Tensor)])
    except AxisError as error:
        raise CaptureError(f"{type(model).__name__} cannot be computed for several images at once: {error}.") from error
    inputs = {at: node.meta.get("val") for at, node in enumerate(placeholders(graph))}
    dynamic = tuple((0,) if isinstance(x, Tensor) else () for x in leaves)
    return replace(one, graph=graph, dynamic=dynamic, example=call, limits=limits_of(inputs))


def placeholders(graph: fx.Graph) -> list[fx.Node]:
    """The inputs of a graph, in order."""
    return [node for node in graph.nodes if node.op == "placeholder"]


@contextmanager
def blamed_on_the_inputs(model: nn.Module) -> Iterator[None]:
    """Turn what ``model`` itself raises inside the block into an :class:`ExampleInputsError`."""
    try:
        yield
    except CannotFlatten as error:  # the call could be flattened, so it is about what the model returns
        raise CaptureError(
            f"{type(model).__name__} keeps an object for later calls that cannot be taken apart: {error}; leave the option out "
            "that asks for it."
        ) from error
    except Exception as error:
        raise ExampleInputsError(
            f"{type(model).__name__} itself fails on the example inputs: {type(error).__name__}: {error}. "
            "Check names, shapes and dtypes of the inputs."
        ) from error


def _to_capture(exported: Exported, call: Call, region: Region) -> Capture:
    program, returned = exported.program, exported.returned
    limits = limits_of(_inputs(program))
    module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    unshielded = inline_bodies(module)
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(module.graph, env)
    last = graph.output(output)
    if returned is not None:
        outputs = last.args[0]
        assert isinstance(outputs, (list, tuple))
        count = len(outputs)
        paths = dict(zip(range(count - len(returned.paths()), count), returned.paths(), strict=True))
        set_record(last, replace(record(last), cache_paths=paths))
    named = dict(program.named_parameters()) | dict(program.named_buffers())
    constants = _own_constants(graph, module, named)
    _shape_constants(graph, constants)
    leaves, _ = pytree.tree_flatten_with_path((call.args, call.kwargs))
    inputs = placeholders(graph)
    dynamic: list[tuple[int, ...]] = []
    by_place = {pytree.keystr(place): node for (place, _), node in zip(leaves, inputs, strict=True)}
    if region.embeddings and IMAGE_POSITIONS in call.kwargs:
        text = by_place[region.embeddings]
        set_record(text, replace(record(text), image_positions=inputs[-1]))
    for (place, leaf), node in zip(leaves, inputs, strict=True):
        known = region.modalities.get(pytree.keystr(place))
        if known is not None:
            set_record(node, replace(record(node), modalities=known))
        value = node.meta.get("val")
        sizes = value.shape if isinstance(leaf, Tensor) and isinstance(value, Tensor) else [value]
        free = [d for d, n in enumerate(sizes) if is_free(n)]
        dynamic.append(tuple(free))
    out_spec = program.call_spec.out_spec
    assert out_spec is not None
    return Capture(
        graph=graph,
        constants=constants,
        out_spec=out_spec,
        dynamic=tuple(dynamic),
        example=call,
        returned=returned,
        limits=limits,
        own_backward=exported.own_backward,
        unshielded=unshielded,
    )


def _inputs(program: torch.export.ExportedProgram) -> dict[int, Any]:
    """The traced inputs of the user by leaf."""
    names = program.graph_signature.user_inputs
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    return {leaf: values.get(name) for leaf, name in enumerate(names) if isinstance(name, str)}


def _own_constants(graph: fx.Graph, module: fx.GraphModule, named: Collection[str]) -> dict[str, Tensor]:
    """What the graph holds besides parameters and buffers, under plain names that need not exist in a module."""
    constants: dict[str, Tensor] = {}
    for node in graph.nodes:
        if node.op == "get_attr" and node.target not in named:
            value = attribute(module, node.target)
            if isinstance(value, torch.Generator):
                raise CaptureError(f"{', '.join(_paths_of_users(node)) or 'forward'} {DRAWS}")
            node.target = str(node.target).replace(".", "_")
            constants[node.target] = value
    return constants


def _paths_of_users(node: fx.Node) -> list[str]:
    return list(dict.fromkeys(path for user in node.users if (path := module_path(user))))


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
            set_record(node, replace(record(node), number=float(constant)))
