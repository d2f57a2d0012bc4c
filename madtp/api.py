"""The public entry: :func:`rewrite` and :func:`count_macs`.

The compiler behind it is the package ``rewriters``; go on reading at :func:`rewriters.regions.rewrite.rewrite_model`.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from madtp.calls.call import Call, Inputs, check_batch, normalise_call
from madtp.calls.inference_mode import outside_inference_mode
from madtp.calls.progress_line import progress_line
from madtp.config import PruningConfig
from madtp.cost.counting import count_eagerly
from madtp.errors import CaptureError, ConfigError, ExampleInputsError, LeftAloneError, PlanError, UnprunedError
from madtp.programs.completeness import unpruned_remark
from madtp.programs.notes import Notes
from madtp.programs.originals import unwrapped
from madtp.pruned import PrunedModel
from madtp.pruned.arguments import check_model
from madtp.sites.preserved_state import preserved_state, trial_run
from rewriters.pipeline import price_dense
from rewriters.plan.plan import Plan
from rewriters.regions.rewrite import rewrite_model

__all__ = ["Plan", "count_macs", "rewrite"]


def rewrite(
    model: nn.Module,
    example_inputs: Inputs | None = None,
    *,
    config: PruningConfig | None = None,
    plan: Plan | None = None,
) -> PrunedModel:
    """Make a model prune its tokens.

    Args:
        model: Any ``nn.Module`` made of transformer blocks over image or text tokens. It is not modified; its parameters
            are shared. Of a pruned model, the original is rewritten again.
        example_inputs: Inputs of ``model`` with at least 2 samples: a dict of keyword arguments or a tuple of positional
            ones. May be left out where the zoo knows the architecture.
        config: How to prune; by default ``PruningConfig()``. The zoo may add protected positions for architectures that it
            knows. If the model takes token ids alone and nothing else can be pruned, its text is pruned.
        plan: An edited :class:`~rewriters.plan.plan.Plan` to follow, in place of a new one:
            ``Plan.from_dict(pruned.report.plan).without(["blocks.0"])``.

    Returns:
        A :class:`~madtp.pruned.PrunedModel`, called exactly as ``model`` is.

    Raises:
        ArgumentError: ``model`` is no ``nn.Module``.
        ConfigError: ``config`` is none.
        ExampleInputsError: The inputs are missing or do not fit the model.
        CaptureError: The model cannot be traced.
        NoSiteError: Nothing in the model can be pruned.
        PlanError: ``plan`` does not belong to the model.
        RewriteError: The graph cannot be rewritten correctly.
        UnprunedError: ``config.strict``, and a tower or more than a third of the blocks is not pruned.
    """
    started = time.perf_counter()
    if config is not None and not isinstance(config, PruningConfig):
        raise ConfigError(
            f"config is a {type(config).__name__}; pass PruningConfig(...), or PruningConfig.from_dict(...)."
        )
    check_model(model)
    if plan is not None and not isinstance(plan, Plan):
        raise PlanError(f"plan is a {type(plan).__name__}; pass a madtp.Plan, such as Plan.from_dict(plan).")
    if isinstance(model, PrunedModel):
        model = unwrapped(model)
    config = _with_adapter_protection(model, PruningConfig() if config is None else config)
    call = example_call(model, example_inputs)
    with (
        progress_line(f"rewriting {type(model).__name__}"),
        preserved_state(model),
        outside_inference_mode(call) as usual,
    ):
        with trial_run(model, (usual.args, usual.kwargs)):
            check_batch(model, usual)
        try:
            pruned = rewrite_model(model, usual, config, plan)
        except LeftAloneError:
            # A language model by itself: there is nothing but its text that the caller could want pruned.
            if not _is_text_alone(call):
                raise
            pruned = rewrite_model(model, usual, dataclasses.replace(config, towers=("text",)), plan)
    pruned.madtp.report.seconds = time.perf_counter() - started
    remark = unpruned_remark(pruned.madtp.report) if plan is None else None
    if remark is not None:
        if config.strict:
            raise UnprunedError(f"{remark} Leave strict=True out to prune what can be pruned.")
        Notes(pruned.madtp.report).add(remark)
    return pruned


def _with_adapter_protection(model: nn.Module, config: PruningConfig) -> PruningConfig:
    """The configuration, plus protection of the positions that the model's zoo adapter lists."""
    import zoo

    adapter = zoo.find_adapter(model)
    return config.protecting(adapter.protect) if adapter and adapter.protect else config


def _is_text_alone(call: Call) -> bool:
    """Whether a call gives nothing but token ids and masks: no image, nor anything else that a text could be about."""
    return not any(x.is_floating_point() or x.is_complex() for x in call.tensors())


def example_call(model: nn.Module, example_inputs: Inputs | None) -> Call:
    """The example inputs as a call of ``model``; asks the zoo where none are given.

    Raises:
        ExampleInputsError: There are none, or they do not fit the signature of ``model``.
    """
    if example_inputs is None:
        import zoo

        example_inputs = zoo.example_inputs_of(model)
        if example_inputs is None:
            raise ExampleInputsError(
                f"no example inputs were given and the zoo does not know {type(model).__name__}. Pass example_inputs: "
                "a dict of keyword arguments or a tuple of positional ones, with at least 2 samples."
            )
    return _as_call(model, example_inputs, "example_inputs")


def _as_call(model: nn.Module, inputs: Inputs | Tensor, argument: str = "inputs") -> Call:
    if isinstance(inputs, Tensor):
        inputs = (inputs,)
    if not isinstance(inputs, (Mapping, tuple)):
        raise ExampleInputsError(
            f"{argument} is a {type(inputs).__name__}; pass a dict of keyword arguments or a tuple of positional ones."
        )
    if isinstance(inputs, Mapping):
        return normalise_call(model, (), inputs)
    return normalise_call(model, tuple(inputs), {})


def count_macs(model: nn.Module, inputs: Inputs) -> float:
    """Multiply-accumulates (MACs) per sample of a model on ``inputs``.

    The field's tables print this number as "FLOPs"; ``madtp/cost/table.py`` says what counts. A pruned model is run, and
    priced by the tokens that each sample really kept. Any other model is captured and priced in closed form, or run and
    counted where it cannot be captured.

    Args:
        model: A pruned model or any other.
        inputs: A dict of keyword arguments or a tuple of positional ones.

    Returns:
        MACs per sample, that is per entry of the batch.

    Raises:
        ArgumentError: ``model`` is no ``nn.Module``.
        ExampleInputsError: The inputs do not fit the model.
    """
    check_model(model)
    if isinstance(model, PrunedModel):
        call = _as_call(model, inputs)
        with torch.no_grad():
            model(*call.args, **call.kwargs)
        return model.madtp.macs()
    call = _as_call(model, inputs)
    try:
        return price_dense(model, call)
    except CaptureError:
        return count_eagerly(model, call)
