"""Compare the compressed mini models with controls at equal MACs, all fine-tuned alike.

    python benchmarks/controls.py run madtp random merging --task questions --output runs/controls
    python benchmarks/controls.py table --output runs/controls

``run`` trains each control from the same dense weights, with the same steps and seeds, and writes its card. ``table`` prints
all cards as a markdown table. Metrics are those of held-out scenes; MACs are those of one text about one picture or pair.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

import zoo
from madtp.training.config import TrainingConfig
from madtp.training.run import read_config, train
from zoo.recipes.controls import fine_tune_merging, fine_tune_smaller, frozen, training_free

TASKS = {
    "reasoning": "blip_nlvr_mini",
    "questions": "blip_vqa_mini",
    "captions": "blip_caption_mini",
    "retrieval": "blip_retrieval_mini",
    "retrieval-clip": "clip_mini",
}
"""The model whose compression recipe is run, by task."""

SETTINGS: dict[str, dict[str, Any]] = {
    "madtp": {},
    "untaught": {"teaching_steps": 0},
    "no-alignment": {"pruning": {"alignment": False}},
    "random": {"pruning": {"selection": "random", "alignment": False}},
    "class-attention": {"pruning": {"selection": "class_attention", "keep_ratio": 0.85, "alignment": False}},
}
"""What each of these controls changes in the settings of the recipe."""

DENSE = {"smaller-input": fine_tune_smaller, "merging": fine_tune_merging}
"""Controls that make a dense model cheaper in another way."""

FREE, STATIC = "training-free", "static-counts"
CONTROLS = (*SETTINGS, *DENSE, FREE, STATIC)
METRICS = ("accuracy", "vqa_accuracy", "cider")
RECALL = ("text_r1", "image_r1")
"""The metric shown is the first of ``METRICS`` that a card has; for retrieval, the mean of both recalls at 1."""


def run_control(name: str, options: argparse.Namespace, seed: int) -> None:
    """Run one control, and write its card to ``OUTPUT/TASK/REDUCTION/NAME-SEED/pruned/card.json``."""
    content = read_config(Path(zoo.__file__).parent / "recipes" / f"{TASKS[options.task]}_compress.toml")
    content["training"] |= {"seed": seed, "threads": options.threads}
    if options.steps:
        content["training"]["steps"] = options.steps
    settings = content["settings"]
    settings["reduction"] = options.reduction
    folder = options.output / options.task / f"{100 * options.reduction:.0f}"
    output, training = folder / f"{name}-{seed}", TrainingConfig.from_dict(content["training"])
    if name in DENSE:
        DENSE[name](settings, training, output)
    elif name == FREE:
        training_free(settings, training, output)
    elif name == STATIC:
        trained = folder / f"madtp-{seed}" / "pruned"
        if not trained.is_dir():
            raise SystemExit(f"{STATIC} fixes the counts of madtp, which has to run first: {trained} does not exist")
        frozen(settings, trained, output)
    else:
        changes = SETTINGS[name]
        pruning = {**settings.get("pruning", {}), **changes.get("pruning", {})}
        content["settings"] |= {**changes, "pruning": pruning}
        train(content, output, resume=True)


@dataclass(frozen=True)
class FinishedRun:
    """One finished run of a control.

    Attributes:
        task: one of ``TASKS``.
        target: fraction of the MACs that was to be saved.
        control: one of ``CONTROLS``.
        seed: seed of the training.
        card: content of its card.
    """

    task: str
    target: float
    control: str
    seed: int
    card: dict[str, Any]


def finished_runs(output: Path) -> Iterator[FinishedRun]:
    """Yield every finished run below ``output``."""
    for path in sorted(output.glob("*/*/*/pruned/card.json")):
        task, target, name = path.parts[-5:-2]
        control, _, seed = name.rpartition("-")
        yield FinishedRun(task, float(target) / 100, control, int(seed), json.loads(path.read_text()))


def table(output: Path) -> str:
    """Return all cards below ``output`` as a markdown table."""
    rows = ["| task | control | MACs saved | metric | | steps | seed |", "|---|---|---|---|---|---|---|"]
    for run in finished_runs(output):
        metric, score = main_metric(run.card["test"])
        saved, steps = run.card["calibration"]["reduction"], run.card["training"]["steps"]
        rows.append(f"| {run.task} | {run.control} | {saved:.1%} | {metric} | {score:.4f} | {steps} | {run.seed} |")
    return "\n".join(rows)


def main_metric(test: dict[str, Any]) -> tuple[str, float]:
    """Return the most important metric of a card's test, and its value."""
    found = test.get("metrics") or {"accuracy": test["accuracy"]["all"]}
    if all(name in found for name in RECALL):
        return "recall@1", sum(found[name] for name in RECALL) / len(RECALL)
    name = next(name for name in METRICS if name in found)
    return name, found[name]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "table"))
    parser.add_argument("controls", nargs="*", help=f"any of {', '.join(CONTROLS)}; default all")
    parser.add_argument("--task", choices=tuple(TASKS), default="reasoning")
    parser.add_argument("--output", type=Path, default=Path("runs/controls"))
    parser.add_argument("--reduction", type=float, default=0.8)
    parser.add_argument("--steps", type=int, default=0, help="training steps; default: those of the recipe")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_intermixed_args()  # controls may follow options
    if unknown := sorted(set(options.controls) - set(CONTROLS)):
        parser.error(f"unknown control {', '.join(unknown)}; known: {', '.join(CONTROLS)}")
    if options.command == "run":
        for seed in options.seeds:
            for name in options.controls or CONTROLS:
                run_control(name, options, seed)
    Console(width=200).print(table(options.output), markup=False)


if __name__ == "__main__":
    main()
