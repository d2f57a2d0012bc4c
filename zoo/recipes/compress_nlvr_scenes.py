"""Compression of a trained BLIP-NLVR model on scenes: `madtp compress --reduction 0.8`.

The dense model is rewritten, its alignment tokens are taught (`madtp.teach`), and it is fine-tuned with pruning active: task
loss, the auxiliary losses of the dense training and the weighted alignment loss (the paper, section on training). The gain
is steered step by step towards the asked reduction, which grows from `start_reduction` over the first `ramp` of the run;
at the end it is calibrated on held-out pairs. The same recipe trains the controls: `pruning` holds fields of
`madtp.PruningConfig`, such as `selection = "random"`.

:func:`build` and :func:`finish` are what :mod:`madtp.training.run` calls.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import madtp
import zoo
from madtp.calibration import GainController, calibrate
from madtp.config import PruningConfig
from madtp.errors import ConfigError
from madtp.pruned import PrunedModel
from madtp.search import KNOBS
from madtp.teaching import TeachingResult
from madtp.training.config import TrainingConfig, from_plain
from madtp.training.engine import Batch, Learner, Metrics, TrainingResult
from zoo.blip.nlvr import BlipNlvr
from zoo.recipes.auxiliary import StatementHeads, faded
from zoo.recipes.card import accuracy_by_kind
from zoo.recipes.many import ManyStatements
from zoo.recipes.nlvr_scenes import make_batch
from zoo.scenes import SceneDataset, collate

FIRST_KEEP_RATIO = 0.85
"""Keep ratio of a control at gain 1: close to the start of the ramp."""


@dataclass(frozen=True)
class Settings:
    """What the recipe can be told.

    Attributes:
        reduction: fraction of the dense MACs per statement to save.
        model, checkpoint: zoo name and weights to start from (a path or a shipped name).
        pairs_per_step, statements_per_pair: batch; each pair is encoded once.
        start_reduction, ramp: the target grows from here to `reduction` over this fraction of the steps.
        rate: of the gain controller.
        teaching_pairs, teaching_steps: before the first step the alignment tokens are taught (`madtp.teach`) on so many
            training pairs; 0 steps leave that out.
        teach_every: they are taught anew after so many steps each, as the streams that they score move; 0 for never.
        alignment_weight: of the alignment loss.
        count_weight, place_weight: of the auxiliary losses that dense training uses too (zoo/recipes/auxiliary.py); they
            fade by a cosine to `fade_to` at the end.
        distillation: weight of the divergence from the dense model's answers; 0 leaves the dense model out.
        pruning: fields of `PruningConfig`.
        data_seed: edition of the data; training takes pairs from `first_pair` on.
        calibration_pairs, test_items: held-out pairs for calibration and test.
    """

    reduction: float = 0.8
    model: str = "blip_nlvr_mini"
    checkpoint: str | None = "dense"
    pairs_per_step: int = 32
    statements_per_pair: int = 8
    start_reduction: float = 0.3
    ramp: float = 0.4
    rate: float = 0.03
    teaching_pairs: int = 256
    teaching_steps: int = 200
    teach_every: int = 200
    alignment_weight: float = 0.1
    count_weight: float = 1.0
    place_weight: float = 2.0
    fade_to: float = 0.1
    distillation: float = 0.0
    pruning: Mapping[str, Any] = field(default_factory=dict)
    data_seed: int = 0
    first_pair: int = 1_000_000
    calibration_pairs: int = 512
    test_items: int = 8192

    def __post_init__(self) -> None:
        if not 0 < self.reduction < 1:
            raise ConfigError(f"settings.reduction is {self.reduction}; it takes a fraction between 0 and 1")


class Pupil(nn.Module):
    """The pruned many-statement model and the heads of the auxiliary losses."""

    def __init__(self, pruned: PrunedModel, width: int) -> None:
        super().__init__()
        self.pruned = pruned
        self.heads = StatementHeads(width)


@dataclass
class Compression:
    """What a run holds beside the learner: the pupil, the dense teacher, the controller."""

    settings: Settings
    pupil: Pupil
    teacher: ManyStatements | None
    controller: GainController
    model: nn.Module
    macs: tuple[float, float] = (0.0, 0.0)

    @property
    def pruned(self) -> PrunedModel:
        """The pruned many-statement model."""
        return self.pupil.pruned


def set_strength(pruned: PrunedModel, gain: float) -> None:
    """Prune with ``gain``; a control with a fixed keep ratio gets a ratio that falls as the gain rises."""
    if pruned.config.keep_ratio is None:
        pruned.gain = gain
    else:
        KNOBS["keep_ratio"].write(pruned, min(1.0, FIRST_KEEP_RATIO / gain))


def statement_macs(pruned: PrunedModel, statements: int) -> tuple[float, float]:
    """MACs of the last forward as one statement about one pair costs them: pruned, dense."""
    found = []
    for by_path in (pruned.macs_by_module(), pruned.macs_by_module("all")):
        vision = sum(n for path, n in by_path.items() if "visual_encoder" in path)
        found.append(vision + (sum(by_path.values()) - vision) / statements)
    return found[0], found[1]


def build(settings: Mapping[str, Any], training: TrainingConfig) -> Learner:
    """Return the learner that :func:`madtp.training.engine.fit` trains."""
    chosen = from_plain(Settings, settings, "settings")
    torch.manual_seed(training.seed)
    model = cast(BlipNlvr, zoo.create(chosen.model, chosen.checkpoint))
    teacher = None
    if chosen.distillation:
        teacher = (
            ManyStatements(cast(BlipNlvr, zoo.create(chosen.model, chosen.checkpoint))).eval().requires_grad_(False)
        )
    example = make_batch("val", chosen.data_seed, 0, 2, 2)
    config = PruningConfig.from_dict({"seed": training.seed, **chosen.pruning})
    pruned = madtp.rewrite(
        ManyStatements(model), (example["images"], example["input_ids"], example["attention_mask"]), config=config
    )
    card: dict[str, Any] = {"settings": asdict(chosen), "training": training.to_dict()}
    taught = config.alignment and chosen.teaching_steps > 0
    if taught:
        card["teaching"] = asdict(_teach(pruned, chosen, 0))
    controller = GainController(chosen.start_reduction, gain=config.gain, rate=chosen.rate)
    pupil = Pupil(pruned, model.config.text.width)
    run = Compression(chosen, pupil, teacher, controller, model)
    state: dict[str, Any] = {"controller": controller.state_dict()}

    def batch(step: int) -> Batch:
        start = chosen.first_pair + step * chosen.pairs_per_step
        return make_batch("train", chosen.data_seed, start, chosen.pairs_per_step, chosen.statements_per_pair)

    def loss(module: nn.Module, batch: Batch, step: int) -> tuple[Tensor, Metrics]:
        controller.load_state_dict(state["controller"])
        controller.target = _target(step, chosen, training.steps)
        set_strength(pruned, controller.gain)
        if taught and chosen.teach_every and step and step % chosen.teach_every == 0:
            _teach(pruned, chosen, step)
        return _loss(run, batch, step / training.steps)

    def on_step(done: int, module: nn.Module, metrics: Metrics) -> None:
        controller.step(1 - run.macs[0] / run.macs[1])
        state["controller"] = controller.state_dict()

    held_out: list[Batch] = []

    def evaluate(module: nn.Module) -> dict[str, float]:
        if not held_out:
            held_out.extend(make_batch("val", chosen.data_seed, start, 32, 8) for start in range(0, 128, 32))
        right, cost = 0.0, 0.0
        for group in held_out:
            logits, _ = pruned(group["images"], group["input_ids"], group["attention_mask"])
            right += float((logits.argmax(-1) == group["labels"].flatten()).float().mean())
            kept, dense = statement_macs(pruned, 8)
            cost += 1 - kept / dense
        return {"accuracy": right / len(held_out), "reduction": cost / len(held_out)}

    learner = Learner(
        module=pupil,
        batch=batch,
        loss=loss,
        evaluate=evaluate,
        on_step=on_step,
        state=state,
        samples_per_step=chosen.pairs_per_step,
        sample_name="pairs",
        card=card,
    )
    object.__setattr__(pupil, "compression", run)
    return learner


def _teach(pruned: PrunedModel, chosen: Settings, step: int) -> TeachingResult:
    """Teach on the pairs that training sees from `step` on."""
    pairs = min(16, chosen.teaching_pairs)
    first = chosen.first_pair + step * chosen.pairs_per_step
    device = next(pruned.parameters()).device
    batches = []
    for start in range(first, first + chosen.teaching_pairs, pairs):
        batch = make_batch("train", chosen.data_seed, start, pairs, chosen.statements_per_pair)
        batches.append(tuple(batch[name].to(device) for name in ("images", "input_ids", "attention_mask")))
    with torch.autocast(device.type, enabled=False):
        return madtp.teach(pruned, batches, objective=_margin, steps=chosen.teaching_steps)


def _margin(output: tuple[Tensor, Tensor]) -> Tensor:
    """How sure the model is of its answers."""
    logits = output[0].float()
    return (logits[:, 1] - logits[:, 0]).abs().sum()


def answer_loss(
    heads: StatementHeads, logits: Tensor, tokens: Tensor, batch: Batch, chosen: Settings, part: float
) -> tuple[Tensor, dict[str, float | Tensor]]:
    """Task loss and the auxiliary losses after `part` (0 to 1) of a run, from logits [M, 2] and class tokens [M, C]."""
    labels = batch["labels"].flatten()
    task = F.cross_entropy(logits, labels)
    count = heads.count_loss(tokens, batch["counts"].flatten(0, 1))
    place = heads.place_loss(tokens, batch["places"].flatten(0, 1))
    total = task + faded(part, chosen.fade_to) * (chosen.count_weight * count + chosen.place_weight * place)
    accuracy = (logits.argmax(-1) == labels).float().mean()
    return total, {"task": task.detach(), "accuracy": accuracy, "count": count.detach(), "place": place.detach()}


def _loss(run: Compression, batch: Batch, part: float) -> tuple[Tensor, Metrics]:
    chosen, pruned = run.settings, run.pruned
    inputs = (batch["images"], batch["input_ids"], batch["attention_mask"])
    logits, tokens = pruned(*inputs)
    run.macs = statement_macs(pruned, chosen.statements_per_pair)
    total, metrics = answer_loss(run.pupil.heads, logits.float(), tokens, batch, chosen, part)
    metrics |= {"reduction": 1 - run.macs[0] / run.macs[1], "gain": pruned.gain}
    if pruned.config.alignment and chosen.alignment_weight:
        alignment = pruned.alignment_loss()
        total = total + chosen.alignment_weight * alignment
        metrics["align"] = alignment.detach()
    if run.teacher is not None:
        with torch.no_grad():
            wanted = run.teacher(*inputs)[0].float().log_softmax(-1)
        divergence = F.kl_div(logits.log_softmax(-1), wanted, reduction="batchmean", log_target=True)
        total = total + chosen.distillation * divergence
        metrics["distil"] = divergence.detach()
    return total, metrics


def _target(step: int, settings: Settings, steps: int) -> float:
    part = min(1.0, step / max(1.0, settings.ramp * steps))
    span = settings.reduction - settings.start_reduction
    return settings.start_reduction + span * 0.5 * (1 - math.cos(math.pi * part))


def deploy(run: Compression) -> PrunedModel:
    """The trained model rewritten for one statement a pair, with the trained additions."""
    example = collate([SceneDataset("val", 2, seed=run.settings.data_seed)[i] for i in range(2)])
    inputs = (example["images"], example["input_ids"], example["attention_mask"])
    pruned = madtp.rewrite(run.model.eval(), inputs, config=run.pruned.config)
    trained = {
        name.replace("sites.model_", "sites.", 1): value
        for name, value in run.pruned.state_dict().items()
        if name.startswith("madtp.")
    }
    missing, unexpected = pruned.load_state_dict(trained, strict=False)
    if unexpected or any(name.startswith("madtp.") for name in missing):
        raise ConfigError(f"the sites of the trained and the deployed model differ: {unexpected[:3]}")
    pruned.gain, pruned.temperature = run.pruned.gain, run.pruned.temperature
    return pruned


def finish(learner: Learner, result: TrainingResult, output: Path) -> None:
    """Calibrate on held-out pairs, write the folder `pruned` and its card `card.json`."""
    run = cast(Compression, learner.module.compression)
    chosen = run.settings
    pruned = deploy(run).eval()
    data = SceneDataset("val", chosen.calibration_pairs, seed=chosen.data_seed)
    batches = []
    for start in range(0, len(data), 64):
        group = collate([data[i] for i in range(start, min(start + 64, len(data)))])
        batches.append((group["images"], group["input_ids"], group["attention_mask"]))
    calibration = calibrate(pruned, batches, reduction=chosen.reduction)
    madtp.save(pruned, output / "pruned", dtype=torch.float16)
    shipped = madtp.load(output / "pruned").eval()
    scores = accuracy_by_kind(shipped, SceneDataset("test", chosen.test_items, seed=chosen.data_seed))
    card = {
        "model": chosen.model,
        "data": "scenes",
        **learner.card,
        "calibration": {
            "gain": calibration.gain,
            "temperature": calibration.temperature,
            "reduction": calibration.reduction_reached,
            "dense_macs": calibration.dense_macs,
            "macs": calibration.macs,
        },
        "test": {"split": "test", "items": chosen.test_items, "seed": chosen.data_seed, "accuracy": scores},
    }
    (output / "pruned" / "card.json").write_text(json.dumps(card, indent=1, default=str) + "\n")
