"""The pipeline, read top to bottom: capture -> canonicalise -> detect -> plan -> insert -> lift -> compile.

Start at :func:`build`. It makes one :class:`~madtp.programs.program.Program` for one call signature; ``madtp/api.py`` calls it
for the first one, the pruned model for further ones.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, fx, nn

from madtp.calls.call import Call
from madtp.calls.objects import CannotFlatten, on_tensors
from madtp.calls.per_image import per_image_module
from madtp.config import PruningConfig
from madtp.errors import CaptureError, MadtpError, NoSiteError, NothingToPruneError, PlanError, RewriteError
from madtp.programs.program import Program, compile_graph
from madtp.sites.additions import PREFIX
from madtp.tokens.cache_marks import MarkedAxes
from rewriters.canonicalise.passes import canonicalise
from rewriters.capture.export import Capture, capture
from rewriters.capture.rowwise_op import call_back
from rewriters.capture.scope import WHOLE, Region
from rewriters.detect.streams import Structure, detect
from rewriters.graph.nodes import AxisError, module_path
from rewriters.insert.insert import insert
from rewriters.insert.kv_cache import hide_dead
from rewriters.insert.workspace import Insertion, InsertRefusal
from rewriters.lower.lift import lift
from rewriters.lower.pricing import cost_table
from rewriters.plan.plan import Plan, Refusal, make_plan
from rewriters.plan.policy import PREDICTED

CONSTANTS = f"{PREFIX}.constants"
NOTHING = Plan((), (), 1, 1, "interleaved")


@dataclass
class Rewritten:
    """A program with the plan it follows and the structure that was found."""

    program: Program
    plan: Plan
    structure: Structure
    region: Region = WHOLE

    def left_unpruned(self, sites: Collection[str], module: nn.Module) -> list[str]:
        """Of some sites those that are not pruned though the call runs their blocks.

        Args:
            sites: names; "block#2" is where another call runs a block again, which is no loss in one that runs it once.
            module: what the region is; of a site that is named after no module of it, it is not known whether it runs.
        """
        kept = {site.name for site in self.plan.sites}
        ran = {self.region.inside(module_path(node)) for node in self.program.graph.nodes}
        known = {self.region.inside(path) for path, _ in module.named_modules()}

        def runs(site: str) -> bool:
            block, _, again = site.partition("#")
            if block in known and not any(path == block or path.startswith(f"{block}.") for path in ran):
                return False
            return not (again and block in kept)

        return sorted(site for site in sites if site not in kept and runs(site))


def build(
    model: nn.Module,
    call: Call,
    config: PruningConfig,
    *,
    region: Region = WHOLE,
    serial: int = 0,
    only: Collection[str] | None = None,
    plan: Plan | None = None,
) -> Rewritten:
    """Rewrite ``model`` for calls like ``call``.

    Args:
        region: what ``model`` is of the whole model; sites and modules are named from there.
        serial: number of the program, keeps the names of its constants apart.
        only: names of the sites that exist already (a further signature adds none).
        plan: an edited plan to follow instead of a new one.
    Raises:
        CaptureError, ExampleInputsError: from the capture.
        NoSiteError: nothing could be pruned.
    """
    model, call = open_all(model, call, region=region)
    captured = capture(model, call, region)
    with _blamed_on(model):
        return _rewrite(model, call, config, captured, region, serial, only, plan)


def build_continuation(
    model: nn.Module, call: Call, marked: Mapping[str, MarkedAxes], *, region: Region = WHOLE, serial: int = 0
) -> Program:
    """The program for calls that read what an earlier, pruned call has kept: nothing is pruned, what was dropped stays hidden.

    Args:
        marked: kept tensors that may lack tokens, by path in the object that holds them.
    Raises:
        CaptureError, ExampleInputsError: from the capture. RewriteError: what was kept is read by more than attention.
    """
    model, call = open_all(model, call, region=region)
    captured = capture(model, call, region)
    with _blamed_on(model):
        canonicalise(captured.graph)
        try:
            assert captured.returned is not None
            hide_dead(captured.graph, call, captured.returned, marked)
        except AxisError as error:
            raise RewriteError(
                f"{type(model).__name__} goes on from pruned tokens in a way that is not followed: {error}."
            ) from error
        return _compiled(Insertion(captured.graph, NOTHING), model, captured, region, serial)


def open_all(
    model: nn.Module, call: Call, sizes: Collection[str] = (), region: Region = WHOLE
) -> tuple[nn.Module, Call]:
    """A model and a call of it with objects that later calls read again opened as their tensors and ``sizes``; the model takes
    a batch of images if the region is taken apart.

    Raises:
        CaptureError: an object cannot be opened.
    """
    try:
        call = call.flattened(sizes)
    except CannotFlatten as error:
        raise CaptureError(
            f"{type(model).__name__} was called with an object that cannot be taken apart: {error}; leave it out of the call."
        ) from error
    return per_image_module(on_tensors(model, call.objects, sizes), region.apart), call


@contextmanager
def _blamed_on(model: nn.Module) -> Iterator[None]:
    try:
        yield
    except MadtpError:
        raise
    except AxisError as error:
        raise RewriteError(
            f"{type(model).__name__} cannot be followed token by token: {error} (rows that are selected by their values, say). "
            "Rewrite the submodules in front of it and behind it."
        ) from error
    except Exception as error:
        raise RewriteError(
            f"{type(model).__name__} is built in a way that the rewriter does not expect: {type(error).__name__}: {error}. "
            "Please report the model; rewriting one of its submodules may work."
        ) from error


def _rewrite(
    model: nn.Module,
    call: Call,
    config: PruningConfig,
    captured: Capture,
    region: Region,
    serial: int,
    only: Collection[str] | None,
    plan: Plan | None,
) -> Rewritten:
    canonicalise(captured.graph)
    structure = detect(captured.graph)
    if plan is None:
        plan = make_plan(structure, config, call.flat()[0], _with_constants(model, captured)).under(region)
    _check_plan(plan, captured.graph, region)
    if only is not None:
        plan = plan.without([s.name for s in plan.sites if s.name not in only], ())
    done, plan = _insert_what_works(captured.graph, plan)
    if not plan.sites and only is None:
        raise _no_site(model, structure, plan)
    return Rewritten(_compiled(done, model, captured, region, serial), plan, structure, region)


def _compiled(done: Insertion, model: nn.Module, captured: Capture, region: Region, serial: int) -> Program:
    """The program of a finished graph."""
    table = cost_table(done, captured).under(region.inside, PREFIX)
    constants = _place_constants(done.graph, captured, serial)
    call_back(done.graph)
    lift(done.graph, model)
    _name_from_root(done.graph, region)
    forward = compile_graph(done.graph, str(serial))
    return Program(
        done.graph,
        forward,
        captured.out_spec,
        captured.dynamic,
        table,
        constants,
        captured.returned,
        done.marked,
        captured.limits,
        captured.example.sizes(),
    )


def _name_from_root(graph: fx.Graph, region: Region) -> None:
    """Name the modules and parameters of a region by their place in the whole model, on which its program runs."""
    for node in graph.nodes:
        if node.op in ("get_attr", "call_module") and str(node.target).split(".")[0] != PREFIX:
            node.target = region.inside(str(node.target))


def price_dense(model: nn.Module, call: Call) -> float:
    """Multiply-accumulates per sample of an unmodified model.

    Raises:
        CaptureError: also where they depend on values of its inputs.
    """
    model, call = open_all(model, call)
    captured = capture(model, call)
    try:
        canonicalise(captured.graph)
        done = Insertion(captured.graph, NOTHING)
        return sum(cost_table(done, captured).price(call.flat()[0], {}, False).values())
    except (AxisError, TypeError) as error:
        raise CaptureError(
            f"the cost of {type(model).__name__} depends on the values of its inputs: {error}"
        ) from error


def _with_constants(model: nn.Module, captured: Capture) -> nn.Module:
    """The model with the capture's own constants beside its parameters, for evaluating parts of the graph."""
    from madtp.calls.copies import share

    root = share(model)
    root.__dict__.update(captured.constants)
    return root


def _check_plan(plan: Plan, graph: fx.Graph, region: Region) -> None:
    present = {n.name: n for n in graph.nodes}
    for site in plan.sites:
        readouts = (name.partition("+")[0] for name in site.readouts)
        parts = (part.node for part in site.parts)
        masks = () if site.mask is None else (site.mask,)
        for name in (site.attention, site.block_input, site.value, *readouts, *parts, *masks):
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


def _insert_what_works(graph: fx.Graph, plan: Plan) -> tuple[Insertion, Plan]:
    """Insert; where a node refuses, give up the sites whose tokens reach it, and try again on a fresh copy."""
    while True:
        fresh = _copy(graph)
        try:
            return insert(fresh, plan), plan
        except InsertRefusal as refusal:
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


def _place_constants(graph: fx.Graph, captured: Capture, serial: int) -> dict[str, Tensor]:
    placed: dict[str, Tensor] = {}
    for node in graph.nodes:
        if node.op == "get_attr" and node.target in captured.constants:
            name = f"p{serial}_{node.target}"
            placed[name] = captured.constants[node.target]
            node.target = f"{CONSTANTS}.{name}"
    return placed


def _no_site(model: nn.Module, structure: Structure, plan: Plan) -> NoSiteError:
    head = f"no place to prune was found in {type(model).__name__}"
    if not structure.sublayers and not structure.unplaced:
        what = "its graph holds no attention by a softmax over tokens (linear attention and convolutions do not count)"
        if structure.pooling:
            what = "its attention condenses tokens, and no block works on them"
        kind = NothingToPruneError if structure.pooling else NoSiteError
        return kind(
            f"{head}: {what}. madtp rewrites models made of transformer blocks over image or text "
            "tokens; pass such a model, or its transformer submodule."
        )
    reasons = {f"{r.block} (node {r.node}): {r.reason}; what would help: {r.help}" for r in plan.refusals}
    error = NoSiteError(f"{head}. Refused: " + " | ".join(sorted(reasons)[:8]))
    error.left_alone = any(r.by_policy and r.reason == PREDICTED for r in plan.refusals)
    error.by_policy = error.left_alone and all(r.by_policy for r in plan.refusals)
    return error
