"""A compression of two small towers: :func:`learner`. Double precision makes the order of summation hardly matter."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from model_case import VOCABULARY, lively
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from two_towers import TwoTowers

import madtp
from madtp.pruned import PrunedModel
from madtp.training import Learner, TrainingConfig, TrainingResult, fit
from madtp.training.compression import Budget, Steering, distillation_loss, pruning_metrics, teach_in_all_processes
from madtp.training.progress import Progress

SAMPLES = 8
WEIGHTS = "weights.safetensors"
QUIET = Progress(quiet=True)


def config(**changes: Any) -> TrainingConfig:
    base = {"steps": 6, "learning_rate": 1e-3, "warmup_steps": 2, "precision": "float32", "checkpoint_every": 2}
    return TrainingConfig.from_dict({**base, "evaluate_every": 0, "log_every": 1, **changes})


def towers(dropout: float = 0.0) -> nn.Module:
    """Return two small towers, with weights drawn from a fixed seed."""
    torch.manual_seed(3)
    # With two blocks a tower, no strength would save half of the MACs.
    model = lively(TwoTowers(batch_first=True, norm_first=True, mean=False, depth=3)).double()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
        elif isinstance(module, nn.MultiheadAttention):
            module.dropout = dropout
    return model


def samples(step: int, rows: range) -> dict[str, Tensor]:
    """Images, texts of different lengths, labels, and the number of words by which a loss divides."""
    found = []
    for row in rows:
        generator = torch.Generator().manual_seed(1000 * step + row)
        length = int(torch.randint(3, 10, (), generator=generator))
        image = torch.randn(3, 32, 32, generator=generator, dtype=torch.float64)
        ids = torch.randint(1, VOCABULARY, (length,), generator=generator)
        found.append((image, ids, torch.rand((), generator=generator, dtype=torch.float64)))
    longest = max(len(ids) for _, ids, _ in found)
    ids = torch.stack([F.pad(ids, (0, longest - len(ids))) for _, ids, _ in found])
    return {
        "pixels": torch.stack([image for image, _, _ in found]),
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "wanted": torch.stack([wanted for _, _, wanted in found]),
        "words": (ids != 0).sum().double(),
    }


class Student(nn.Module):
    """The pruned towers, a head on words, and a head that no step uses."""

    def __init__(self, pruned: PrunedModel) -> None:
        super().__init__()
        self.pruned = pruned
        self.words = nn.Embedding(VOCABULARY, 1, dtype=torch.float64)
        self.idle = nn.Linear(2, 2, dtype=torch.float64)


INPUTS = ("pixels", "input_ids", "attention_mask")


def rewrite(model: nn.Module, **options: Any) -> PrunedModel:
    batch = samples(0, range(4))
    settings = madtp.PruningConfig(min_tokens=2, alignment_tokens=4, **options)
    return madtp.rewrite(model, {name: batch[name] for name in INPUTS}, config=settings)


@cache
def _rewritten(dropout: float) -> PrunedModel:
    pruned = rewrite(towers(dropout)).train()
    with torch.no_grad():  # captures the training mode, too
        pruned(**{name: value for name, value in samples(0, range(4)).items() if name in INPUTS})
    return pruned


def rewritten(dropout: float = 0.0) -> PrunedModel:
    """The pruned towers; rewritten once in a process, as captures take most of the time."""
    return copy.deepcopy(_rewritten(dropout))


def learner(steps: int, dropout: float = 0.0, distil: float = 0.0, teach_every: int = 0) -> Learner:
    """A learner with a mean over samples, a mean over all words, the alignment loss and, if asked, distillation."""
    pruned = rewritten(dropout)
    torch.manual_seed(4)
    student = Student(pruned)
    teacher = towers().eval().requires_grad_(False)
    state: dict[str, Any] = {}
    steering = Steering(pruned, Budget(reduction=0.5, start_reduction=0.1, rate=0.5), steps, state)

    def loss(module: nn.Module, batch: Mapping[str, Tensor], step: int) -> tuple[Tensor, dict[str, float | Tensor]]:
        assert isinstance(module, Student)
        inputs = {name: batch[name] for name in INPUTS}
        found = module.pruned(**inputs)["score"]
        task = F.mse_loss(found, batch["wanted"])
        align = module.pruned.alignment_loss()
        words = (module.words(batch["input_ids"]).squeeze(-1) ** 2 * batch["attention_mask"]).sum() / batch["words"]
        total = task + 0.3 * align + words
        metrics = {"task": task.detach(), "align": align.detach(), **pruning_metrics(module.pruned)}
        if distil:
            with torch.no_grad():
                dense = teacher(**inputs)["score"]
            distance = distillation_loss(torch.stack([found, -found], 1), torch.stack([dense, -dense], 1))
            total = total + distil * distance
            metrics["distil"] = distance.detach()
        return total, metrics

    def before_step(step: int, module: nn.Module) -> None:
        steering.before_step(step)
        if teach_every and step % teach_every == 0:
            teach_in_all_processes(pruned, lambda: [tuple(samples(step, range(4))[name] for name in INPUTS)], steps=3)

    return Learner(
        student,
        samples,
        loss,
        before_step=before_step,
        on_step=lambda done, module, metrics: steering.on_step(metrics),
        state=state,
        samples_per_step=SAMPLES,
        padding={"input_ids": 0, "attention_mask": 0},
    )


def trained(folder: Path, dropout: float = 0.0, resume: bool = False, stop: int | None = None, **changes: Any) -> Any:
    """Train, and return the gradients of the last step, the weights, the state of the learner and the metrics."""
    settings = config(**changes)
    made = learner(settings.steps, dropout)
    result = fit(made, settings, folder / "run", progress=QUIET, resume=resume, stop_after=stop)
    gradients = {name: p.grad for name, p in made.module.named_parameters() if p.grad is not None}
    return {
        "weights": dict(made.module.state_dict()),
        "gradients": gradients,
        "state": made.state,
        "metrics": result.metrics,
    }


def build(settings: Mapping[str, Any], training: TrainingConfig) -> Learner:
    """Build the learner, as a recipe does."""
    return learner(training.steps, **settings)


def finish(learner: Learner, result: TrainingResult, output: Path) -> None:
    """Write the last weights and the state of the learner, as a recipe does."""
    save_file({name: value.contiguous() for name, value in learner.module.state_dict().items()}, output / WEIGHTS)
    (output / "state.json").write_text(json.dumps(learner.state))
