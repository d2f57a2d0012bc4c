"""Controls: what a compressed mini model is compared with at equal MACs.

:func:`fine_tune_smaller` (images of fewer pixels) and :func:`fine_tune_merging` (similar tokens merge) train a dense model by
the losses of the recipe. :func:`training_free` calibrates without training. :func:`frozen` fixes the token counts of a trained
model. Controls that only change the recipe's settings need nothing from here. ``benchmarks/controls.py`` runs them all, and
:func:`reopen` loads the model of a finished one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

import madtp
import zoo
from madtp.atomic_files import write_text
from madtp.training.batch_shares import Batch, Metrics
from madtp.training.config import TrainingConfig, from_plain
from madtp.training.engine import Learner, fit
from madtp.training.progress import Progress
from zoo.recipes import compress_scenes
from zoo.recipes.compress_scenes import CompressSceneSettings, objective_of, scene_source, write_pruned
from zoo.recipes.model_card import held_out_calls, test_task
from zoo.recipes.token_merging import merge_tokens, plain_weights

WEIGHTS = "model.safetensors"
"""File with the weights of a dense control, beside its card."""

_COUNTED = 16
"""Samples on which MACs are counted."""


def fine_tune_smaller(
    settings: Mapping[str, object], training: TrainingConfig, output: Path, progress: Progress | None = None
) -> None:
    """Train the dense model on smaller images, of the size whose MACs are nearest to the asked reduction."""
    name = from_plain(CompressSceneSettings, settings, "settings").model
    config: Any = zoo.create(name).config
    patch = getattr(config, "patch_size", None) or config.vision.patch_size
    sides = range(2 * patch, zoo.describe(name).input_size[1], patch)
    _fine_tune(settings, training, output, cheaper=_SMALLER, sizes=sides, progress=progress)


def fine_tune_merging(
    settings: Mapping[str, object], training: TrainingConfig, output: Path, progress: Progress | None = None
) -> None:
    """Train the dense model with tokens merging in its vision tower, as many a block as bring its MACs nearest."""
    _fine_tune(settings, training, output, cheaper=_MERGING, sizes=range(1, 73), progress=progress)


def training_free(settings: Mapping[str, object], training: TrainingConfig, output: Path) -> None:
    """Rewrite the dense model, teach its alignment tokens and calibrate it, without training its weights."""
    learner = compress_scenes.build(settings, training)
    torch.manual_seed(training.seed)
    if learner.before_step:
        learner.before_step(0, learner.module)
    output.mkdir(parents=True, exist_ok=True)
    write_pruned(learner, output)
    path = output / "pruned" / "card.json"
    card = json.loads(path.read_text())
    write_text(path, json.dumps({**card, "training": {**card["training"], "steps": 0}}, indent=1) + "\n")


def frozen(settings: Mapping[str, object], trained: Path, output: Path) -> None:
    """Fix the token counts of a model that a recipe left in the folder ``trained``: the same for every sample."""
    chosen = from_plain(CompressSceneSettings, settings, "settings")
    model = zoo.create(chosen.model, chosen.checkpoint)
    data = objective_of(chosen, model).data
    card = json.loads((trained / "card.json").read_text())
    pruned = madtp.load(trained, zoo.create(chosen.model)).eval()
    calls = held_out_calls(chosen.model, data, split="val", items=chosen.calibration_items, seed=chosen.data_seed)
    madtp.freeze(pruned, calls)
    with torch.no_grad():
        macs = [_macs_after(pruned, call) for call in calls]
    cost = Cost(sum(macs) / len(macs), card["calibration"]["dense_macs"])
    _write_card(output, chosen, data, pruned, cost=cost, training=card["training"], more={})


def _macs_after(pruned: madtp.PrunedModel, call: Mapping[str, object]) -> float:
    pruned(**call)
    return pruned.madtp.macs()


def reopen(folder: Path) -> nn.Module:
    """Return the model of a finished control, in eval mode.

    For a control with fixed counts, this is the model whose counts were fixed.

    Args:
        folder: Folder with ``card.json``, as a recipe or a control wrote it.
    """
    card = json.loads((folder / "card.json").read_text())
    for cheaper in (_SMALLER, _MERGING):
        if cheaper.size_name in card:
            return cheaper.build(card["model"], folder / WEIGHTS, card[cheaper.size_name]).eval()
    return madtp.load(folder, zoo.create(card["model"])).eval()


def _of_size(name: str, checkpoint: str | Path | None, side: int) -> nn.Module:
    """Return the model for images of ``side`` pixels, which scales larger images down."""
    model: Any = zoo.create(name)
    config = model.config
    if hasattr(config, "image_size"):
        small = type(model)(replace(config, image_size=side))
    else:
        small = type(model)(replace(config, vision=replace(config.vision, image_size=side)))
    if checkpoint is not None:
        zoo.load_checkpoint(small, zoo.checkpoint_path(zoo.describe(name), checkpoint))

    def downscale(module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (F.interpolate(given[0], (side, side), mode="area"), *given[1:])

    tower: nn.Module = small.visual if hasattr(small, "visual") else small.visual_encoder
    tower.register_forward_pre_hook(downscale)
    return cast(nn.Module, small.eval())


def _with_merging(name: str, checkpoint: str | Path | None, merged: int) -> nn.Module:
    """Return the model with ``merged`` tokens merging in each block of its vision tower."""
    model = zoo.create(name, checkpoint)
    merge_tokens(model, merged)
    return model


@dataclass(frozen=True)
class _Cheaper:
    """A way to make a dense model cheaper.

    Attributes:
        size_name: What cards call the size.
        build: Takes the name of a model, a checkpoint and a size; returns the model.
    """

    size_name: str
    build: Callable[[str, str | Path | None, int], nn.Module]


_SMALLER = _Cheaper("image_size", _of_size)
_MERGING = _Cheaper("merged_in_each_block", _with_merging)


def _fine_tune(
    settings: Mapping[str, object],
    training: TrainingConfig,
    output: Path,
    *,
    cheaper: _Cheaper,
    sizes: Sequence[int],
    progress: Progress | None,
) -> None:
    """Find the size whose MACs are nearest to what pruning would leave, fine-tune the model of that size, and test it."""
    chosen = from_plain(CompressSceneSettings, settings, "settings")
    dense = objective_of(chosen, zoo.create(chosen.model, chosen.checkpoint))
    (call,) = held_out_calls(chosen.model, dense.data, split="val", items=_COUNTED, seed=chosen.data_seed)
    dense_macs = madtp.count_macs(dense.model, call)

    def build(size: int) -> nn.Module:
        return cheaper.build(chosen.model, chosen.checkpoint, size)

    size = _nearest(sizes, lambda size: madtp.count_macs(build(size), call), (1 - chosen.reduction) * dense_macs)
    torch.manual_seed(training.seed)
    objective = objective_of(chosen, build(size))
    source = scene_source(objective, chosen)
    teacher = dense.module.eval().requires_grad_(False)

    def loss(module: nn.Module, batch: Batch, step: int) -> tuple[Tensor, Metrics]:
        output: object = objective.module(**objective.inputs(batch))
        total, metrics = objective.losses(objective.module, batch, output, step / training.steps)
        if chosen.distillation:
            distance = objective.distillation(objective.module, teacher, batch, output)
            total, metrics = total + chosen.distillation * distance, {**metrics, "distil": distance.detach()}
        return total, metrics

    learner = Learner(
        nn.ModuleDict({"module": objective.module, "heads": objective.heads}),
        source.batch,
        loss,
        samples_per_step=source.samples_per_step,
        sample_name=source.sample_name,
        padding=source.padding,
        depends_on={"settings": asdict(chosen), cheaper.size_name: size},
    )
    fit(learner, training, output, resume=True, progress=progress)
    model: nn.Module = objective.model.eval()
    cost = Cost(madtp.count_macs(model, call), dense_macs)
    more = {cheaper.size_name: size}
    _write_card(output, chosen, objective.data, model, cost=cost, training=training.to_dict(), more=more)
    weights = {name: value.contiguous().clone() for name, value in plain_weights(model).items()}  # some are tied
    save_file(weights, output / "pruned" / WEIGHTS)


def _nearest(sizes: Sequence[int], macs: Callable[[int], float], wanted: float) -> int:
    """Return the size whose MACs are nearest to those wanted; MACs rise or fall with the size."""
    first, last = 0, len(sizes) - 1
    rising = macs(sizes[last]) > macs(sizes[first])
    while last - first > 1:
        middle = (first + last) // 2
        if (macs(sizes[middle]) < wanted) == rising:
            first = middle
        else:
            last = middle
    return min(sizes[first], sizes[last], key=lambda size: abs(macs(size) - wanted))


@dataclass(frozen=True)
class Cost:
    """MACs of a sample, of a control and of the dense model."""

    macs: float
    dense_macs: float


def _write_card(
    output: Path,
    settings: CompressSceneSettings,
    data: str,
    model: nn.Module,
    *,
    cost: Cost,
    training: Mapping[str, object],
    more: Mapping[str, object],
) -> None:
    card = {
        "model": settings.model,
        "training": training,
        "calibration": {
            "reduction": 1 - cost.macs / cost.dense_macs,
            "macs": cost.macs,
            "dense_macs": cost.dense_macs,
        },
        **more,
        "test": test_task(model, settings.model, data, items=settings.test_items, seed=settings.data_seed),
    }
    write_text(output / "pruned" / "card.json", json.dumps(card, indent=1) + "\n")
