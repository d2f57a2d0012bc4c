"""The pipeline for one region: capture -> canonicalise -> detect -> plan -> insert -> lower.

Start at :func:`rewrite_region`, which calls the stages one after the other and makes one
:class:`~madtp.programs.program.Program` for one kind of call. ``regions/rewrite.py`` calls it for the first program of
each region and verifies the results; ``regions/assembly.py`` calls it for programs that later calls need.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from madtp.calls.branches import expect
from madtp.calls.call import Call
from madtp.calls.copies import share
from madtp.calls.progress_line import stage
from madtp.calls.quantised import quantised_remark
from madtp.config import PruningConfig
from madtp.errors import (
    CaptureError,
    LeftAloneError,
    MadtpError,
    NoSiteError,
    NothingToPruneError,
    PlanError,
    RewriteError,
)
from madtp.programs.compiled_graph import compile_graph
from madtp.programs.program import Program, without_gradients
from madtp.sites.additions import PREFIX
from madtp.sites.stream_start import SUFFIX
from madtp.tokens.cache_marks import MarkedAxes
from rewriters.canonicalise.passes import canonicalise
from rewriters.capture.export import Capture, capture
from rewriters.capture.mixture_of_experts_op import call_rowwise_modules
from rewriters.capture.scope import Region
from rewriters.detect.streams import detect
from rewriters.detect.structure import Structure
from rewriters.graph.functional import writes
from rewriters.graph.node_record import record
from rewriters.graph.nodes import AxisError, module_path
from rewriters.insert.insert import insert
from rewriters.insert.kv_cache import hide_dead
from rewriters.insert.workspace import Insertion, InsertRefusal
from rewriters.lower.lift import lift
from rewriters.lower.packing import pack
from rewriters.lower.pricing import cost_table
from rewriters.plan.chosen_layers import in_chosen_layers
from rewriters.plan.make_plan import make_plan
from rewriters.plan.plan import Plan, Refusal
from rewriters.plan.policy import Policy
from rewriters.plan.request import Request

CONSTANTS = f"{PREFIX}.constants"
EMPTY_PLAN = Plan(sites=(), refusals=(), alignment_width=1, images=1, image_order="interleaved")


@dataclass(frozen=True)
class RewrittenRegion:
    """A region that prunes its tokens.

    Attributes:
        region: Where it lies in the model.
        call: The call that it was captured from.
        program: What runs instead of it.
        plan: Where the program prunes.
        structure: The streams and blocks that were found.
        inner: Regions inside it that can prune by themselves: they hold streams of their own, or can be told the image
            positions. They serve where the host calls them directly, or where the region runs as the original.
    """

    region: Region
    call: Call
    program: Program
    plan: Plan
    structure: Structure
    inner: tuple[Region, ...] = ()

    def unpruned_sites(self, sites: Collection[str], module: nn.Module) -> list[str]:
        """Those of ``sites`` that the program does not prune although it runs their blocks.

        Args:
            sites: Names of sites. ``block#2`` is the second run of a block in another call; a call that runs
                the block once does not need it.
            module: The module of the region. A site that is not named after a module in it counts as run.
        """
        planned = {site.name for site in self.plan.sites}
        ran = {self.region.inside(module_path(node)) for node in self.program.graph.nodes}
        modules = {self.region.inside(path) for path, _ in module.named_modules()}

        def runs(site: str) -> bool:
            block, _, repetition = site.partition("#")
            if block in modules and not any(path == block or path.startswith(f"{block}.") for path in ran):
                return False
            return not (repetition and block in planned)

        return sorted(site for site in sites if site not in planned and runs(site))


def rewrite_region(request: Request) -> RewrittenRegion:
    """Rewrite a module for calls like ``request.call``.

    Raises:
        CaptureError: The module cannot be traced.
        ExampleInputsError: The module rejects the call.
        RewriteError: The graph cannot be followed; :class:`NoSiteError` where nothing in it can be pruned.
    """
    opened = request.opened()
    stage(f"capturing {request.region.name or type(opened.model).__name__}")
    captured = capture(opened.model, opened.call, opened.region)
    stage(f"finding what to prune in {request.region.name or type(opened.model).__name__}")
    with _blaming(_called(opened)):
        canonicalise(captured.graph)
        structure = detect(captured.graph)
        plan = choose_plan(opened, structure, captured)
        insertion, plan = insert_what_works(captured.graph, plan)
        if not plan.sites and request.existing_sites is None:
            raise _no_site(opened, structure, plan)
        program = lower(insertion, captured, opened)
    return RewrittenRegion(request.region, request.call, program, plan, structure)


def continue_region(request: Request, marked: Mapping[str, MarkedAxes]) -> Program:
    """The program for calls that read a key/value cache which a pruned call filled.

    It prunes nothing, and hides the tokens that were dropped then.

    Args:
        request: As for :func:`rewrite_region`.
        marked: Tensors of the cache that may lack tokens, by path in the object that holds them.

    Raises:
        CaptureError: The module cannot be traced.
        ExampleInputsError: The module rejects the call.
        RewriteError: Something else than attention reads the cache.
    """
    opened = request.opened()
    captured = capture(opened.model, opened.call, opened.region)
    with _blaming(_called(opened)):
        canonicalise(captured.graph)
        try:
            assert captured.returned is not None
            hide_dead(captured.graph, opened.call, captured.returned, marked)
        except AxisError as error:
            raise RewriteError(
                f"{_called(opened)} goes on from pruned tokens in a way that is not followed: {error}."
            ) from error
        return lower(Insertion(captured.graph, EMPTY_PLAN), captured, opened)


def price_dense(model: nn.Module, call: Call) -> float:
    """Multiply-accumulates per sample of an unmodified model.

    Raises:
        CaptureError: The model cannot be traced, or its cost depends on values of its inputs.
    """
    request = Request(model, call, PruningConfig()).opened()
    captured = capture(request.model, request.call)
    try:
        canonicalise(captured.graph)
        table = cost_table(Insertion(captured.graph, EMPTY_PLAN), captured)
        return sum(table.price(request.call.flat()[0], {}, False).values())
    except (AxisError, TypeError) as error:
        raise CaptureError(
            f"the cost of {type(request.model).__name__} depends on the values of its inputs: {error}"
        ) from error


@contextmanager
def _blaming(name: str) -> Iterator[None]:
    """Whatever goes wrong inside the block becomes an error that names the model."""
    try:
        yield
    except MadtpError:
        raise
    except AxisError as error:
        raise RewriteError(
            f"{name} cannot be followed token by token: {error} (rows that are selected by their values, say). "
            "Rewrite the submodules in front of it and behind it."
        ) from error
    except Exception as error:
        raise RewriteError(
            f"{name} is built in a way that the rewriter does not expect: {type(error).__name__}: {error}. "
            "Please report the model; rewriting one of its submodules may work."
        ) from error


def choose_plan(request: Request, structure: Structure, captured: Capture) -> Plan:
    """The plan to follow: the one that was handed in, or a new one, without sites that would have to be added.

    Raises:
        PlanError: The plan that was handed in does not belong to this graph.
    """
    region, plan = request.region, request.plan
    if plan is None:
        model = _with_constants(request.model, captured)
        plan = make_plan(structure, request.config, request.call.flat()[0], model).under(region)
        plan = in_chosen_layers(plan, request.config)
    _require_fit(plan, captured.graph, region)
    if request.existing_sites is not None:
        plan = plan.without([s.name for s in plan.sites if s.name not in request.existing_sites], ())
    return plan


def _with_constants(model: nn.Module, captured: Capture) -> nn.Module:
    """The model with the constants of the capture next to its parameters, for evaluating parts of the graph."""
    root = share(model)
    root.__dict__.update(captured.constants)
    return root


def _require_fit(plan: Plan, graph: fx.Graph, region: Region) -> None:
    present = {node.name: node for node in graph.nodes}
    for site in plan.sites:
        for name in site.node_names():
            if name not in present:
                raise PlanError(
                    f"the plan's site {site.name!r} names the node {name!r}, which this model's graph does not have. A plan "
                    "serves the model and the call signature it was made for; start from the plan of a fresh rewrite."
                )
        path = region.inside(module_path(present[site.attention]))
        if path != region.path and not Region(site.name.split("#")[0]).holds(path):
            raise PlanError(
                f"the plan's site {site.name!r} names the node {site.attention!r}, which lies at {path!r} in this graph; start "
                "from the plan of a fresh rewrite."
            )


def insert_what_works(graph: fx.Graph, plan: Plan) -> tuple[Insertion, Plan]:
    """Insert the sites of ``plan``; where a node refuses, give up those whose tokens reach it and start afresh.

    First to go is that their streams begin without what a tower has dropped.
    """
    begin_whole: set[int] = set()
    while True:
        fresh = _copy(graph)
        try:
            return insert(fresh, plan, begin_whole), plan
        except InsertRefusal as refusal:
            streams = {s.stream for s in plan.sites if f"{s.name}{SUFFIX}" in refusal.sources}
            if streams - begin_whole:
                begin_whole |= streams
                continue
            lost = [s for s in plan.sites if s.name in refusal.sources]
            if not lost:
                raise
            why = [
                Refusal(
                    s.name,
                    refusal.node.name,
                    refusal.reason,
                    "a rule for this operation (CONTRIBUTING, 'add an op rule'), or a readout that follows the last block",
                )
                for s in lost
            ]
            plan = plan.without([s.name for s in lost], why)


def _copy(graph: fx.Graph) -> fx.Graph:
    """A copy that keeps node names, so that a plan applies to it."""
    fresh = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        new = fresh.node_copy(node, lambda n: env[n])
        new.name = node.name
        new.meta = copy.copy(node.meta)
        env[node] = new
    return fresh


def lower(insertion: Insertion, captured: Capture, request: Request) -> Program:
    """The program of a finished graph: priced, with calls of the host's own modules, compiled to a Python function."""
    graph, region = insertion.graph, request.region
    table = cost_table(insertion, captured).under(region.inside, PREFIX)
    padded = pack(insertion, request.config)
    constants = _place_constants(graph, captured, request)
    call_rowwise_modules(graph)
    _write_without_gradients(graph)
    lift(graph, request.model)
    _name_from_root(graph, region)
    return Program(
        graph=graph,
        forward=compile_graph(graph, str(request.serial)),
        out_spec=captured.out_spec,
        dynamic=captured.dynamic,
        cost=table,
        constants=constants,
        returned=captured.returned,
        marked=insertion.marked,
        output_sites=insertion.output_sites if captured.returned is None else {},
        limits=captured.limits,
        given=captured.example.sizes(),
        padded=padded,
        turns_back=any(n.target is expect for n in graph.nodes) and any(_leaves_a_trace(n) for n in graph.nodes),
        own_backward=captured.own_backward,
        unshielded=captured.unshielded,
    )


def _leaves_a_trace(node: fx.Node) -> bool:
    """Whether a node draws numbers or writes to a tensor."""
    tags = getattr(node.target, "tags", ())
    return node.target is without_gradients or writes(node) or torch.Tag.nondeterministic_seeded in tags


def _write_without_gradients(graph: fx.Graph) -> None:
    """Let what the model writes in code without gradients be written so: autograd lets nothing else write to parameters."""
    for node in graph.nodes:
        if writes(node) and record(node).without_gradients:
            node.args, node.target = (node.target, *node.args), without_gradients


def _name_from_root(graph: fx.Graph, region: Region) -> None:
    """Name the modules and parameters of a region by their place in the whole model, on which its program runs."""
    for node in graph.nodes:
        if node.op in ("get_attr", "call_module") and str(node.target).split(".")[0] != PREFIX:
            node.target = region.inside(str(node.target))


def _place_constants(graph: fx.Graph, captured: Capture, request: Request) -> dict[str, Tensor]:
    """Let the graph read its constants where they are; returns those that are no parameters or buffers of the model.

    A model that reaches its modules past the tree, by an object of its own, is traced with parameters as constants.
    """
    owned = {
        _memory(tensor): name
        for name, tensor in (*request.model.named_buffers(), *request.model.named_parameters())
        if tensor.numel()
    }
    placed: dict[str, Tensor] = {}
    for node in graph.nodes:
        if node.op != "get_attr" or node.target not in captured.constants:
            continue
        constant = captured.constants[node.target]
        own = owned.get(_memory(constant))
        if own is not None:
            node.target = own
            continue
        name = f"p{request.serial}_{node.target}"
        placed[name] = constant
        node.target = f"{CONSTANTS}.{name}"
    return placed


def _memory(tensor: Tensor) -> tuple[object, ...]:
    """Where the values of a tensor lie: two tensors of which this is equal are one. One of another kind is like no other."""
    if tensor.device.type == "meta" or type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided:
        return (id(tensor),)
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _called(request: Request) -> str:
    """What errors call the module: its class, or the names of the modules of a chain."""
    return type(request.model).__name__ if request.region.chain is None else request.region.name


def _no_site(request: Request, structure: Structure, plan: Plan) -> NoSiteError:
    model, head = request.model, f"no place to prune was found in {_called(request)}"
    if not structure.sublayers and not structure.unplaced:
        what = "its graph holds no attention by a softmax over tokens (linear attention and convolutions do not count)"
        if structure.pooling:
            what = "its attention condenses tokens, and no block works on them"
        kind = NothingToPruneError if structure.pooling else NoSiteError
        return kind(
            f"{head}: {what}. madtp rewrites models made of transformer blocks over image or text "
            f"tokens; pass such a model, or its transformer submodule.{quantised_remark(model)}"
        )
    if all(r.policy is Policy.LAYERS for r in plan.refusals):
        return NothingToPruneError(f"{head}: config.layers leaves out all of its blocks.")
    reasons = {f"{r.block} (node {r.node}): {r.reason}; what would help: {r.help}" for r in plan.refusals}
    message = f"{head}. Refused: {' | '.join(sorted(reasons)[:8])}.{quantised_remark(model)}"
    if any(r.policy is Policy.LANGUAGE_MODEL for r in plan.refusals):
        return LeftAloneError(message, [r.report() for r in plan.refusals])
    return NoSiteError(message)
