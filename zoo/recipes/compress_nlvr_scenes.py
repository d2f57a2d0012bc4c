"""Compression of a trained BLIP-NLVR model on scenes: `madtp compress --reduction 0.8`.

The dense model is rewritten, its alignment tokens are taught (`madtp.teach`), and it is fine-tuned with pruning active: task
loss, the auxiliary losses of the dense training, the weighted alignment loss (the paper, section on training) and, on
request, distillation from the dense model. The gain is steered step by step towards the asked reduction
(madtp/training/compression.py); at the end it is calibrated on held-out pairs. The same recipe trains the controls:
`pruning` holds fields of `madtp.PruningConfig`, such as `selection = "random"`.

:func:`build` and :func:`finish` are what :mod:`madtp.training.run` calls.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import madtp
import zoo
from madtp.config import PruningConfig
from madtp.errors import ConfigError
from madtp.pruned import PrunedModel
from madtp.teaching import TeachingResult
from madtp.training.compression import Budget, Steering, divergence, strength, teach_alike
from madtp.training.config import TrainingConfig, from_plain
from madtp.training.engine import Batch, Learner, Metrics, TrainingResult
from zoo.blip.nlvr import BlipNlvr
from zoo.recipes.auxiliary import StatementHeads, faded
from zoo.recipes.card import accuracy_by_kind
from zoo.recipes.compression import calibrate_closely
from zoo.recipes.many import ManyStatements
from zoo.recipes.nlvr_scenes import TEXT_PADDING, make_batch
from zoo.scenes import SceneDataset, collate

TEACHING = "teaching"
"""Where a run's state holds what the first teaching did."""


@dataclass(frozen=True)
class Settings:
    """What the recipe can be told.

    Attributes:
        reduction: fraction of the dense MACs per statement to save.
        model, checkpoint: zoo name and weights to start from (a path or a shipped name).
        pairs_per_step, statements_per_pair: batch; each pair is encoded once.
        start_reduction, ramp, rate: see :class:`madtp.training.compression.Budget`.
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

    @property
    def budget(self) -> Budget:
        """How far to prune, and how fast to get there."""
        return Budget(self.reduction, self.start_reduction, self.ramp, self.rate)


class Pupil(nn.Module):
    """The pruned many-statement model and the heads of the auxiliary losses."""

    def __init__(self, pruned: PrunedModel, width: int) -> None:
        super().__init__()
        self.pruned = pruned
        self.heads = StatementHeads(width)


@dataclass
class Compression:
    """What a run holds beside the learner: the pupil, the dense teacher, the model that both started from."""

    settings: Settings
    pupil: Pupil
    teacher: ManyStatements | None
    model: nn.Module

    @property
    def pruned(self) -> PrunedModel:
        """The pruned many-statement model."""
        return self.pupil.pruned


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
    budget = chosen.budget
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
    pupil = Pupil(pruned, model.config.text.width)
    run = Compression(chosen, pupil, teacher, model)
    state: dict[str, Any] = {}
    steering = Steering(pruned, budget, training.steps, state)

    def batch(step: int, rows: range) -> Batch:
        start = chosen.first_pair + step * chosen.pairs_per_step + rows.start
        return make_batch("train", chosen.data_seed, start, len(rows), chosen.statements_per_pair)

    def before_step(step: int, module: nn.Module) -> None:
        steering.before_step(step)
        every = chosen.teach_every
        if config.alignment and chosen.teaching_steps and (step % every == 0 if every else step == 0):
            result = _teach(pruned, chosen, step)
            state.setdefault(TEACHING, asdict(result))

    def loss(module: nn.Module, batch: Batch, step: int) -> tuple[Tensor, Metrics]:
        return _loss(run, batch, step / training.steps)

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
        before_step=before_step,
        on_step=lambda done, module, metrics: steering.on_step(metrics),
        state=state,
        samples_per_step=chosen.pairs_per_step,
        sample_name="pairs",
        padding=TEXT_PADDING,
        card={"settings": asdict(chosen), "training": training.to_dict()},
    )
    object.__setattr__(pupil, "compression", run)
    return learner


def _teach(pruned: PrunedModel, chosen: Settings, step: int) -> TeachingResult:
    """Teach on the pairs that training sees from `step` on."""
    pairs = min(16, chosen.teaching_pairs)
    first = chosen.first_pair + step * chosen.pairs_per_step
    device = next(pruned.parameters()).device

    def batches() -> Iterator[tuple[Tensor, ...]]:
        for start in range(first, first + chosen.teaching_pairs, pairs):
            batch = make_batch("train", chosen.data_seed, start, pairs, chosen.statements_per_pair)
            yield tuple(batch[name].to(device) for name in ("images", "input_ids", "attention_mask"))

    with torch.autocast(device.type, enabled=False):
        return teach_alike(pruned, batches, objective=_margin, steps=chosen.teaching_steps)


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
    place = heads.place_loss(tokens, batch["places"].flatten(0, 1), batch["spatial"])
    total = task + faded(part, chosen.fade_to) * (chosen.count_weight * count + chosen.place_weight * place)
    accuracy = (logits.argmax(-1) == labels).float().mean()
    return total, {"task": task.detach(), "accuracy": accuracy, "count": count.detach(), "place": place.detach()}


def _loss(run: Compression, batch: Batch, part: float) -> tuple[Tensor, Metrics]:
    chosen, pruned = run.settings, run.pruned
    inputs = (batch["images"], batch["input_ids"], batch["attention_mask"])
    logits, tokens = pruned(*inputs)
    macs = statement_macs(pruned, chosen.statements_per_pair)
    total, metrics = answer_loss(run.pupil.heads, logits.float(), tokens, batch, chosen, part)
    metrics |= strength(pruned, macs)
    if pruned.config.alignment and chosen.alignment_weight:
        alignment = pruned.alignment_loss()
        total = total + chosen.alignment_weight * alignment
        metrics["align"] = alignment.detach()
    if run.teacher is not None:
        with torch.no_grad():
            wanted = run.teacher(*inputs)[0]
        distance = divergence(logits, wanted)
        total = total + chosen.distillation * distance
        metrics["distil"] = distance.detach()
    return total, metrics


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
        batches.append({name: group[name] for name in ("images", "input_ids", "attention_mask")})
    calibration = calibrate_closely(pruned, batches, chosen.reduction)
    madtp.save(pruned, output / "pruned", dtype=torch.float16)
    shipped = madtp.load(output / "pruned").eval()
    scores = accuracy_by_kind(shipped, SceneDataset("test", chosen.test_items, seed=chosen.data_seed))
    card = {
        "model": chosen.model,
        "data": "scenes",
        **learner.card,
        **({TEACHING: learner.state[TEACHING]} if TEACHING in learner.state else {}),
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
