"""What MADTP is worth: the compressed mini model against controls at equal MACs, each fine-tuned alike.

    python benchmarks/controls.py run madtp random class-attention no-alignment smaller-input --output runs/controls
    python benchmarks/controls.py table --output runs/controls

`run` trains each control for the same steps from the same dense weights with the same seed and writes its card; `table` prints
all cards found as a markdown table. Accuracy is on held-out test scenes; MACs are those of one statement about one pair.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

import madtp
import zoo
from madtp.training.config import TrainingConfig, from_plain
from madtp.training.engine import Batch, Learner, fit
from madtp.training.run import read_config, train
from zoo.blip.config import MINI
from zoo.blip.nlvr import BlipNlvr
from zoo.recipes.auxiliary import StatementHeads
from zoo.recipes.card import accuracy_by_kind
from zoo.recipes.compress_nlvr_scenes import Settings, answer_loss
from zoo.recipes.many import ManyStatements
from zoo.recipes.nlvr_scenes import make_batch
from zoo.scenes import SceneDataset, collate

RECIPE = Path(zoo.__file__).parent / "recipes" / "blip_nlvr_mini_compress.toml"
CONTROLS: dict[str, dict[str, Any]] = {
    "madtp": {},
    "untaught": {"teaching_steps": 0},
    "no-alignment": {"pruning": {"alignment": False}},
    "random": {"pruning": {"selection": "random", "alignment": False}},
    "class-attention": {"pruning": {"selection": "class_attention", "keep_ratio": 0.85, "alignment": False}},
}
"""What each changes in the recipe's settings."""
SMALLER = "smaller-input"
IMAGE_SIZE = {0.8: 40, 0.5: 72}
"""Sides, in whole patches, whose dense MACs come nearest to what pruning leaves (81.5% and 45.4% saved)."""


class Downscaled(BlipNlvr):
    """The model for small images, behind a downscaling of large ones."""

    def encode_images(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Pairs [B, 2, 3, H, W] -> tokens of the first and the second images."""
        side = self.config.vision.image_size
        small = F.interpolate(images.flatten(0, 1), (side, side), mode="area")
        return super().encode_images(small.unflatten(0, images.shape[:2]))


def run_control(name: str, reduction: float, steps: int, seed: int, threads: int, output: Path) -> None:
    """Fine-tune one control; its card lies in `output/name/pruned/card.json`."""
    content = read_config(RECIPE)
    content["training"] |= {"steps": steps, "seed": seed, "threads": threads}
    content["settings"]["reduction"] = reduction
    if name == SMALLER:
        smaller_input(content, output / name)
        return
    changes = CONTROLS[name]
    pruning = {**content["settings"].get("pruning", {}), **changes.get("pruning", {})}
    content["settings"] |= {**changes, "pruning": pruning}
    train(content, output / name, resume=True)


def smaller_input(content: dict[str, Any], output: Path) -> None:
    """The dense model on smaller images, with about the MACs that pruning would leave."""
    settings, training = content["settings"], TrainingConfig.from_dict(content["training"])
    size = IMAGE_SIZE[settings["reduction"]]
    torch.manual_seed(training.seed)
    small = Downscaled(replace(MINI, vision=replace(MINI.vision, image_size=size)))
    zoo.load_checkpoint(small, zoo.checkpoint_path(zoo.describe("blip_nlvr_mini"), "dense"))
    chosen = from_plain(Settings, settings, "settings")
    module = nn.ModuleDict({"model": ManyStatements(small), "heads": StatementHeads(MINI.text.width)})

    def batch(step: int, rows: range) -> Batch:
        start = chosen.first_pair + step * chosen.pairs_per_step + rows.start
        return make_batch("train", chosen.data_seed, start, len(rows), chosen.statements_per_pair)

    def loss(learned: nn.Module, batch: Batch, step: int) -> tuple[Tensor, dict[str, float | Tensor]]:
        logits, tokens = module["model"](batch["images"], batch["input_ids"], batch["attention_mask"])
        heads = cast(StatementHeads, module["heads"])
        return answer_loss(heads, logits.float(), tokens, batch, chosen, step / training.steps)

    learner = Learner(module, batch, loss, samples_per_step=chosen.pairs_per_step, sample_name="pairs")
    fit(learner, training, output, resume=True)
    test = SceneDataset("test", 8192, seed=0)
    sample = collate([test[i] for i in range(64)])
    inputs = (sample["images"], sample["input_ids"], sample["attention_mask"])
    dense = madtp.count_macs(zoo.create("blip_nlvr_mini").eval(), inputs)
    macs = madtp.count_macs(small.eval(), inputs)
    card = {
        "calibration": {"reduction": 1 - macs / dense, "macs": macs, "dense_macs": dense},
        "training": training.to_dict(),
        "test": {"items": len(test), "accuracy": accuracy_by_kind(small, test)},
    }
    (output / "pruned").mkdir(exist_ok=True)
    (output / "pruned" / "card.json").write_text(json.dumps(card, indent=1) + "\n")


def table(output: Path) -> str:
    """All cards below `output` as a markdown table."""
    rows = ["| control | MACs saved | accuracy | " + " | ".join(("steps", "seed")) + " |", "|---|---|---|---|---|"]
    for path in sorted(output.glob("*/pruned/card.json")):
        card = json.loads(path.read_text())
        saved, score = card["calibration"]["reduction"], card["test"]["accuracy"]["all"]
        training = card["training"]
        rows.append(
            f"| {path.parent.parent.name} | {saved:.1%} | {score:.1%} | {training['steps']} | {training['seed']} |"
        )
    return "\n".join(rows)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "table"))
    parser.add_argument("controls", nargs="*", help=f"any of {', '.join([*CONTROLS, SMALLER])}; default all")
    parser.add_argument("--output", type=Path, default=Path("runs/controls"))
    parser.add_argument("--reduction", type=float, default=0.8)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    if unknown := sorted(set(options.controls) - {*CONTROLS, SMALLER}):
        parser.error(f"unknown control {', '.join(unknown)}; known: {', '.join([*CONTROLS, SMALLER])}")
    if options.command == "run":
        for name in options.controls or [*CONTROLS, SMALLER]:
            run_control(name, options.reduction, options.steps, options.seed, options.threads, options.output)
    Console().print(table(options.output), markup=False)


if __name__ == "__main__":
    main()
