"""The public entry: :func:`rewrite`, :func:`count_macs`.

This file and the command line are the only ones in the package that look upwards, at the compiler (``rewriters``) and
at the zoo.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from madtp.calls.call import Call, check_batch, normalise_call
from madtp.calls.copies import share
from madtp.calls.record import record_call
from madtp.config import PruningConfig
from madtp.cost.counting import count_eagerly
from madtp.errors import CaptureError, ExampleInputsError, MadtpError, NothingToPruneError, RewriteError
from madtp.programs.cache import Builder
from madtp.programs.program import Program
from madtp.programs.region import of_calls
from madtp.pruned import PrunedModel
from madtp.tokens.cache_marks import MarkedAxes
from rewriters.plan.plan import _spec
from rewriters.reporting import _report
from rewriters.verify.payoff import unpaid

if TYPE_CHECKING:
    from rewriters.capture.scope import Region
    from rewriters.plan.plan import Plan
    from rewriters.regions import Part, Parts
    from rewriters.verify.checks import Case

log = logging.getLogger("madtp")
UNPAID = (
    "on inputs like the example, pruning costs more than it can save from {} on: there are fewer tokens, or narrower ones, "
    "than {} alignment tokens pay for; lower alignment_tokens, set alignment=False, or leave these streams out (towers)"
)


def rewrite(
    model: nn.Module,
    example_inputs: Mapping[str, Any] | tuple[Any, ...] | None = None,
    *,
    config: PruningConfig | None = None,
    plan: Any = None,
) -> PrunedModel:
    """Insert MADTP's modules into a model.

    Args:
        model: any ``nn.Module`` made of transformer blocks over image or text tokens. It is not modified; parameters
        are shared.
        example_inputs: dict of keyword arguments or tuple of positional ones, with at least 2 samples. May be left
            out where the zoo knows the architecture.
        config: how to prune; default :class:`PruningConfig()`.
        plan: an edited :class:`rewriters.plan.plan.Plan` to follow.
    Returns:
        a :class:`PrunedModel`, called exactly as ``model`` is.
    Raises:
        ExampleInputsError: the inputs are missing or do not fit. CaptureError: the model cannot be traced.
        NoSiteError: nothing can be pruned. RewriteError: the rewritten graph failed a check.
    """
    started = time.perf_counter()
    config = _with_known_positions(model, PruningConfig() if config is None else config)
    call = example_call(model, example_inputs)
    check_batch(model, call)
    try:
        pruned = _rewritten(model, call, config, plan)
    except MadtpError as error:
        if not error.left_alone or not _only_ids(call):
            raise
        pruned = _rewritten(model, call, dataclasses.replace(config, towers=("text",)), plan)
    pruned.report.seconds = time.perf_counter() - started
    return pruned


def _only_ids(call: Call) -> bool:
    """Whether a call gives nothing but token ids and masks: no image, nor anything else that a text could be about."""
    return not any(x.is_floating_point() or x.is_complex() for x in call.tensors())


def _rewritten(model: nn.Module, call: Call, config: PruningConfig, plan: Plan | None) -> PrunedModel:
    """The model rewritten as a whole, or by those regions that pass the checks."""
    from rewriters.regions import build_all

    wrong: dict[str, str] = {}
    while True:
        found = build_all(share(model), call, config, plan, wrong)
        pruned = _assemble(model, found, config, call)
        failed = _check(model, pruned, found, call)
        if failed is None:
            _note_what_cannot_pay(pruned, found, config)
            return pruned
        part, reason = failed
        wrong[part.region.path] = reason


def _with_known_positions(model: nn.Module, config: PruningConfig) -> PruningConfig:
    """The configuration with the positions that the zoo knows to matter where the graph does not show it."""
    import zoo

    adapter = zoo.find_adapter(model)
    return config.protecting(adapter.protect) if adapter and adapter.protect else config


def _note_what_cannot_pay(pruned: PrunedModel, found: Parts, config: PruningConfig) -> None:
    from rewriters.insert.workspace import site_key

    names: list[str] = []
    for part in found.parts:
        program, sites = part.rewritten.program, part.rewritten.plan.sites
        keys = {site.name: site_key(site.name) for site in sites}
        names += unpaid(program, part.call.flattened(program.given), sites, keys, config)
    if names:
        pruned.report.notes.append(UNPAID.format(", ".join(names), config.alignment_tokens))


def _assemble(model: nn.Module, found: Parts, config: PruningConfig, call: Call) -> PrunedModel:
    """The pruned model of all parts."""
    from rewriters.insert.workspace import site_key
    from rewriters.regions import towers

    complete = found.plan
    pruned = PrunedModel(
        share(model),
        [_spec(s) for s in complete.sites],
        [site_key(s.name) for s in complete.sites],
        config,
        _report(model, found),
        complete.alignment_width,
        complete.images,
        complete.image_order,
    )
    for part in found.parts:
        region = part.region
        own = pruned.stand_in(region.path, _builder(part, config), written=region.written, apart=region.apart)
        own.adopt(part.rewritten.program, part.call)
        for inner in part.inner:
            pruned.stand_in(inner.path, _builder(part, config, inner), inner=True, written=inner.written)
        if found.whole:
            for path in towers(pruned._host, complete):
                pruned.stand_in(path, _of_tower(part, config, pruned, path), inner=True)
    pruned.example = record_call(call)
    return pruned


def _builder(part: Part, config: PruningConfig, inner: Region | None = None) -> Builder:
    """What captures a part, or a region ``inner`` to it, for a further call signature, onto the sites that it has."""
    from rewriters.pipeline import build, build_continuation

    region = part.region if inner is None else inner
    known = {s.name: _spec(s) for s in part.rewritten.plan.sites if region.holds(s.name)}
    names = frozenset(known)

    def again(module: nn.Module, further: Call, serial: int, marked: Mapping[str, MarkedAxes]) -> Program:
        if further.continues():
            return build_continuation(module, further, marked, region=region, serial=serial)
        found = build(module, further, config, region=region, serial=serial, only=names)
        if inner is not None and any(_spec(s) != known[s.name] for s in found.plan.sites):
            raise RewriteError(
                f"{region.path} by itself would be pruned in another way than as a part of {part.region.path}."
            )
        left_to_inner = not found.plan.sites and inner is None and bool(part.inner)
        lost = sorted(names) if left_to_inner else found.left_unpruned(names, module)
        if lost:
            reasons = {r.reason for r in found.plan.refusals if r.block in lost} or {"no attention found there"}
            text = f"for this call signature nothing is pruned at {', '.join(lost)}: {'; '.join(sorted(reasons))}"
            if left_to_inner:
                raise NothingToPruneError(f"{text}. {', '.join(r.path for r in part.inner)} may prune by themselves.")
            log.warning("%s", text)
        return found.program

    return again


def _of_tower(part: Part, config: PruningConfig, pruned: PrunedModel, path: str) -> Builder:
    """What captures a tower of a model that is rewritten whole, for when a method of the model calls it."""
    from rewriters.regions import region_at

    def again(module: nn.Module, further: Call, serial: int, marked: Mapping[str, MarkedAxes]) -> Program:
        with pruned._control.running_original():
            region = region_at(pruned._host, part.call, path)
        return _builder(part, config, region)(module, further, serial, marked)

    return again


def _check(model: nn.Module, pruned: PrunedModel, found: Parts, call: Call) -> tuple[Part, str] | None:
    """Check what was rewritten; returns a part that is wrong, be it the whole model, with the reason.

    Raises:
        RewriteError: the regions do not fit the model.
    """
    from rewriters.verify.checks import verify
    from rewriters.verify.rounding import is_rounding

    known = len(pruned.report.notes)
    for part in found.parts:
        case = _case(model, pruned, part)
        try:
            verify(case)
        except RewriteError as error:
            if not is_rounding(case, lambda one=part: _doubled(model, pruned, one)):  # type: ignore[misc]
                return part, str(error)
    if not found.whole:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), pruned.dense():
            pruned(*call.args, **call.kwargs)
        pruned._control.clear_record()
        if len(pruned.report.notes) > known:
            note = pruned.report.notes[known]
            for part in found.parts:
                if note.startswith(of_calls(part.region.path)):
                    return part, note
            raise RewriteError(f"the rewritten regions do not fit the model. {note}")
    return None


def _case(model: nn.Module, pruned: PrunedModel, part: Part) -> Case:
    from rewriters.pipeline import open_all
    from rewriters.verify.checks import Case

    region, rewritten = part.region, part.rewritten
    original, opened = open_all(model.get_submodule(region.path), part.call, rewritten.program.sizes(), region)
    return Case(original, rewritten.program, pruned._host, pruned._control, opened, rewritten.plan)


def _doubled(model: nn.Module, pruned: PrunedModel, part: Part) -> Case:
    """The case of copies in double precision."""
    leaves = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in part.call.flat()[0]]
    exact = replace(part, call=part.call.with_leaves(leaves))
    return _case(copy.deepcopy(model).double(), copy.deepcopy(pruned).double(), exact)


def example_call(model: nn.Module, example_inputs: Mapping[str, Any] | tuple[Any, ...] | None) -> Call:
    """The example inputs as a call of ``model``; asks the zoo where none are given."""
    if example_inputs is None:
        import zoo

        example_inputs = zoo.example_inputs_of(model)
        if example_inputs is None:
            raise ExampleInputsError(
                f"no example inputs were given and the zoo does not know {type(model).__name__}. Pass example_inputs: "
                "a dict of keyword arguments or a tuple of positional ones, with at least 2 samples."
            )
    if isinstance(example_inputs, Mapping):
        return normalise_call(model, (), example_inputs)
    if isinstance(example_inputs, tuple):
        return normalise_call(model, example_inputs, {})
    raise ExampleInputsError(
        f"example_inputs is a {type(example_inputs).__name__}; pass a dict of keyword arguments or a tuple of positional ones."
    )


def count_macs(model: nn.Module, inputs: Mapping[str, Any] | tuple[Any, ...]) -> float:
    """Multiply-accumulates per sample of a model on ``inputs``.

    The field's figures print this number as "FLOPs" (see ``madtp/cost/table.py`` for what counts). For a pruned model the
    inputs are run and priced by the tokens that each sample really kept; any other model is captured and priced in
    closed form, or run and counted where it cannot be captured.
    """
    if isinstance(model, PrunedModel):
        call = normalise_call(model._host, *_split(inputs))
        with torch.no_grad():
            model(*call.args, **call.kwargs)
        return model.macs()
    from rewriters.pipeline import price_dense

    call = normalise_call(model, *_split(inputs))
    try:
        return price_dense(model, call)
    except CaptureError:
        return count_eagerly(model, call)


def _split(inputs: Mapping[str, Any] | tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return ((), dict(inputs)) if isinstance(inputs, Mapping) else (tuple(inputs), {})
