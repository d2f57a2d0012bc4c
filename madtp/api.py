"""The public entry: :func:`rewrite`, :func:`count_macs`.

This file and the command line are the only ones in the package that look upwards, at the compiler (``rewriters``) and
at the zoo.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from madtp.calls import Call, batch_size, normalise_call
from madtp.config import PruningConfig
from madtp.errors import ExampleInputsError
from madtp.pruned import PrunedModel
from madtp.recorded_call import record_call
from madtp.report import BlockReport, RefusalReport, RewriteReport, SiteReport, StreamReport
from madtp.site import SegmentSpec, SiteSpec
from madtp.tree import share

log = logging.getLogger("madtp")


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
        plan: an edited :class:`rewriters.plan.Plan` to follow.
    Returns:
        a :class:`PrunedModel`, called exactly as ``model`` is.
    Raises:
        ExampleInputsError: the inputs are missing or do not fit. CaptureError: the model cannot be traced.
        NoSiteError: nothing can be pruned. RewriteError: the rewritten graph failed a check.
    """
    from rewriters.insertion import site_key
    from rewriters.pipeline import build
    from rewriters.verify import Case, verify

    started = time.perf_counter()
    config = PruningConfig() if config is None else config
    call = example_call(model, example_inputs)
    batch_size(call)
    host = share(model)
    first = build(host, call, config, plan=plan)
    specs = [
        SiteSpec(
            s.name,
            s.modality,
            s.width,
            s.class_position,
            s.protected,
            s.causal,
            tuple(SegmentSpec(p.modality, p.pruned, p.protected) for p in s.segments),
        )
        for s in first.plan.sites
    ]
    keys = [site_key(s.name) for s in first.plan.sites]
    names = frozenset(s.name for s in first.plan.sites)

    def again(root: nn.Module, further: Call, serial: int) -> Any:
        further_one = build(root, further, config, serial=serial, only=names)
        lost = names - {s.name for s in further_one.plan.sites}
        if lost:
            reasons = {r.reason for r in further_one.plan.refusals if r.block in lost} or {"no attention found there"}
            log.warning(
                "for this call signature nothing is pruned at %s: %s",
                ", ".join(sorted(lost)),
                "; ".join(sorted(reasons)),
            )
        return further_one.program

    report = _report(model, first)
    pruned = PrunedModel(
        host, specs, keys, config, report, first.plan.alignment_width, first.plan.images, first.plan.image_order, again
    )
    pruned.adopt(first.program, call)
    pruned.example = record_call(call)
    verify(Case(model, first.program, host, pruned._control, call, first.plan))
    report.seconds = time.perf_counter() - started
    return pruned


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

    The field's figures print this number as "FLOPs" (see ``madtp/cost.py`` for what counts). For a pruned model the
    inputs are run and priced by the tokens that each sample really kept; any other model is captured and priced in
    closed form.
    """
    if isinstance(model, PrunedModel):
        call = normalise_call(model._host, *_split(inputs))
        with torch.no_grad():
            model(*call.args, **call.kwargs)
        return model.macs()
    from rewriters.pipeline import price_dense

    return price_dense(model, normalise_call(model, *_split(inputs)))


def _split(inputs: Mapping[str, Any] | tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return ((), dict(inputs)) if isinstance(inputs, Mapping) else (tuple(inputs), {})


def _report(model: nn.Module, rewritten: Any) -> RewriteReport:
    structure, plan = rewritten.structure, rewritten.plan
    tokens = {s.attention.name: s for s in structure.sublayers}
    sites = [
        SiteReport(
            s.name,
            s.modality,
            f"{s.norm}-norm self",
            s.layer,
            s.width,
            _tokens(tokens[s.attention]),
            s.protected,
            tuple(p.modality for p in s.segments if p.pruned),
        )
        for s in plan.sites
    ]
    refusals = [RefusalReport(r.block, r.node, r.reason, r.help) for r in plan.refusals]
    blocks = [BlockReport(s.path, s.kind, s.norm, s.stream, s.source) for s in structure.sublayers]
    streams = [
        StreamReport(
            s.index,
            s.modality,
            s.width,
            s.special,
            tuple(dict.fromkeys(_words(r) for r in s.flow.readouts.values() if r.kind != "length")),
            () if s.layout is None else s.layout.segments,
        )
        for s in structure.streams
    ]
    return RewriteReport(type(model).__name__, "whole", sites, refusals, blocks, streams, structure.network())


def _tokens(sublayer: Any) -> int:
    from rewriters.axes import example_shape

    return example_shape(sublayer.value)[sublayer.token_dim]


def _words(readout: Any) -> str:
    return {
        "position": f"token {readout.position}",
        "prefix": f"the first {readout.position} tokens",
        "rest": f"all tokens from {readout.position} on",
        "range": "a range of tokens",
        "cuts": "consecutive ranges of tokens",
        "join": "concatenation with other tokens",
        "index": "one token at a computed position",
        "pool": "pooling over tokens",
        "masked_mean": "masked mean over tokens",
        "batch": "parts of the batch",
    }[readout.kind]
