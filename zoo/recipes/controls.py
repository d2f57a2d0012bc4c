"""What a compressed mini model is compared with, at equal MACs: controls without pruning nodes, and without training.

:func:`fine_tune_smaller` (images of fewer pixels) and :func:`fine_tune_merging` (tokens that merge with their likes) train a
dense model by the losses of the recipe; :func:`training_free` calibrates and does not train; :func:`frozen` fixes the counts of
a trained model. Controls that only change the recipe's settings need nothing from here. `benchmarks/controls.py` runs all;
:func:`reopen` has the model of a finished one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

import madtp
import zoo
from madtp.training.batch_shares import Batch, Metrics
from madtp.training.config import TrainingConfig, from_plain
from madtp.training.engine import Learner, fit
from madtp.training.progress import Progress
from zoo.objectives.scenes import Lesson
from zoo.recipes import compress_scenes
from zoo.recipes.compress_scenes import Settings, lesson_of, lesson_source
from zoo.recipes.model_card import held_out_calls, test_task
from zoo.recipes.token_merging import merge_tokens, plain_weights

Inputs = Mapping[str, Any]
WEIGHTS = "model.safetensors"
"""Beside the card of a dense control."""

_COUNTED = 16


def fine_tune_smaller(
    settings: Inputs, training: TrainingConfig, output: Path, progress: Progress | None = None
) -> None:
    """The dense model on images of so few pixels that its MACs are nearest to the asked reduction."""
    name = settings["model"]
    config: Any = zoo.create(name).config
    patch = getattr(config, "patch_size", None) or config.vision.patch_size
    sides = range(2 * patch, zoo.describe(name).input_size[1], patch)
    _fine_tune(settings, training, output, _SIZED, sides, progress)


def fine_tune_merging(
    settings: Inputs, training: TrainingConfig, output: Path, progress: Progress | None = None
) -> None:
    """The dense model whose vision tower merges so many tokens in each block that its MACs are nearest."""
    _fine_tune(settings, training, output, _MERGING, range(1, 73), progress)


def training_free(settings: Inputs, training: TrainingConfig, output: Path) -> None:
    """The dense model rewritten, its alignment tokens taught, and calibrated; no weight of it is trained."""
    learner = compress_scenes.build(settings, training)
    torch.manual_seed(training.seed)
    if learner.before_step:
        learner.before_step(0, learner.module)
    output.mkdir(parents=True, exist_ok=True)
    compress_scenes.finish(learner, None, output)  # type: ignore[arg-type]  # nothing of a run is asked for
    path = output / "pruned" / "card.json"
    card = json.loads(path.read_text())
    path.write_text(json.dumps({**card, "training": {**card["training"], "steps": 0}}, indent=1) + "\n")


def frozen(settings: Inputs, trained: Path, output: Path) -> None:
    """What a recipe left in the folder `trained`, with as many tokens at each site for every sample."""
    chosen = from_plain(Settings, settings, "settings")
    lesson = lesson_of(chosen)
    card = json.loads((trained / "card.json").read_text())
    pruned = madtp.load(trained, zoo.create(chosen.model)).eval()
    calls = held_out_calls(chosen.model, lesson.data, "val", chosen.calibration_items, chosen.data_seed)
    madtp.freeze(pruned, calls)
    with torch.no_grad():
        macs = [_macs_after(pruned, call) for call in calls]
    dense = card["calibration"]["dense_macs"]
    _write_card(output, card["training"], sum(macs) / len(macs), dense, lesson, chosen, pruned, {})


def _macs_after(pruned: madtp.PrunedModel, call: Inputs) -> float:
    pruned(**call)
    return pruned.macs()


def reopen(folder: Path) -> nn.Module:
    """The model of a finished control, in eval mode; of one with fixed counts, the model whose counts were fixed.

    Args:
        folder: with `card.json`, as a recipe or a control wrote it.
    """
    card = json.loads((folder / "card.json").read_text())
    for cheaper in (_SIZED, _MERGING):
        if cheaper.what in card:
            return cheaper.build(card["model"], folder / WEIGHTS, card[cheaper.what]).eval()
    return madtp.load(folder, zoo.create(card["model"])).eval()


def _of_size(name: str, checkpoint: str | Path | None, side: int) -> nn.Module:
    """The model for images of `side` pixels, behind a downscaling of larger ones."""
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
    """The model, merging so many tokens in each block."""
    model = zoo.create(name, checkpoint)
    merge_tokens(model, merged)
    return model


@dataclass(frozen=True)
class _Cheaper:
    """A way to make a dense model cheaper: `build` is (name, checkpoint, size) -> model, `what` what cards call the size."""

    what: str
    build: Callable[[str, str | Path | None, int], nn.Module]


_SIZED = _Cheaper("image_size", _of_size)
_MERGING = _Cheaper("merged_in_each_block", _with_merging)


def _fine_tune(
    settings: Inputs,
    training: TrainingConfig,
    output: Path,
    cheaper: _Cheaper,
    sizes: Sequence[int],
    progress: Progress | None,
) -> None:
    """Find the size whose MACs are nearest to what pruning would leave, fine-tune what `build` makes of it, and test."""
    chosen = from_plain(Settings, settings, "settings")
    dense_lesson = lesson_of(chosen)
    (call,) = held_out_calls(chosen.model, dense_lesson.data, "val", _COUNTED, chosen.data_seed)
    dense = madtp.count_macs(dense_lesson.model, call)

    def build(size: int) -> nn.Module:
        return cheaper.build(chosen.model, chosen.checkpoint, size)

    size = _nearest(sizes, lambda size: madtp.count_macs(build(size), call), (1 - chosen.reduction) * dense)
    torch.manual_seed(training.seed)
    lesson = lesson_of(chosen, build(size))
    source = lesson_source(lesson, chosen)
    followed = dense_lesson.module.eval().requires_grad_(False)
    module = nn.ModuleDict({"module": lesson.module, "heads": lesson.heads})

    def loss(learned: nn.Module, batch: Batch, step: int) -> tuple[Tensor, Metrics]:
        output = lesson.module(**lesson.inputs(batch))
        total, metrics = lesson.losses(lesson.module, batch, output, step / training.steps)
        if chosen.distillation:
            distance = lesson.distillation(lesson.module, followed, batch, output)
            total, metrics = total + chosen.distillation * distance, {**metrics, "distil": distance.detach()}
        return total, metrics

    learner = Learner(
        module,
        source.batch,
        loss,
        samples_per_step=source.samples_per_step,
        sample_name=source.sample_name,
        padding=source.padding,
    )
    fit(learner, training, output, resume=True, progress=progress)
    model = lesson.model.eval()
    macs = madtp.count_macs(model, call)
    _write_card(output, training.to_dict(), macs, dense, lesson, chosen, model, {cheaper.what: size})
    weights = {name: value.contiguous().clone() for name, value in plain_weights(model).items()}  # some are tied
    save_file(weights, output / "pruned" / WEIGHTS)


def _nearest(sizes: Sequence[int], macs: Callable[[int], float], wanted: float) -> int:
    """The size whose MACs, which rise or fall with it, are nearest to those wanted."""
    first, last = 0, len(sizes) - 1
    rising = macs(sizes[last]) > macs(sizes[first])
    while last - first > 1:
        middle = (first + last) // 2
        if (macs(sizes[middle]) < wanted) == rising:
            first = middle
        else:
            last = middle
    return min(sizes[first], sizes[last], key=lambda size: abs(macs(size) - wanted))


def _write_card(
    output: Path,
    training: Mapping[str, Any],
    macs: float,
    dense: float,
    lesson: Lesson,
    settings: Settings,
    model: nn.Module,
    more: Mapping[str, Any],
) -> None:
    card = {
        "model": settings.model,
        "training": training,
        "calibration": {"reduction": 1 - macs / dense, "macs": macs, "dense_macs": dense},
        **more,
        "test": test_task(model, settings.model, lesson.data, settings.test_items, settings.data_seed),
    }
    (output / "pruned").mkdir(parents=True, exist_ok=True)
    (output / "pruned" / "card.json").write_text(json.dumps(card, indent=1) + "\n")
