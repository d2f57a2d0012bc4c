"""Write trained weights with a model card, and measure accuracy on held-out scenes with the file as shipped."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

import zoo
from madtp.atomic_files import replacing_file
from madtp.evaluation import evaluate
from zoo.scenes import SceneDataset, collate
from zoo.tasks import build_task
from zoo.transforms import for_model

_BATCH = 128


def accuracy_by_kind(model: nn.Module, dataset: SceneDataset) -> dict[str, float]:
    """Return the accuracy of model(images, input_ids, attention_mask) on a data set, "all" first, then by kind."""
    right: Counter[str] = Counter()
    seen: Counter[str] = Counter()
    training = model.training
    model.eval()
    with torch.no_grad():
        for start in range(0, len(dataset), _BATCH):
            items = [dataset[index] for index in range(start, min(start + _BATCH, len(dataset)))]
            batch = collate(items)
            logits = model(batch["images"], batch["input_ids"], batch["attention_mask"])
            for item, hit in zip(items, (logits.argmax(-1) == batch["labels"]).tolist(), strict=True):
                for name in ("all", item["kind"]):
                    seen[name] += 1
                    right[name] += hit
    model.train(training)
    return {name: right[name] / seen[name] for name in ["all", *sorted(set(seen) - {"all"})]}


def measure(name: str, items: int, seed: int) -> Callable[[Path], dict[str, Any]]:
    """Return a function that loads a weights file into the zoo's model and tests it in float32."""

    def run(path: Path) -> dict[str, Any]:
        model = zoo.create(name)
        zoo.load_checkpoint(model, path)
        scores = accuracy_by_kind(model, SceneDataset("test", items, seed=seed))
        return {"split": "test", "items": items, "seed": seed, "precision": "float32", "accuracy": scores}

    return run


def measure_task(name: str, data: str, items: int, seed: int) -> Callable[[Path], dict[str, Any]]:
    """Return a function that loads a weights file into the zoo's model and tests it as `madtp eval` does, in float32."""

    def run(path: Path) -> dict[str, Any]:
        return {**test_task(zoo.create(name, path), name, data, items, seed), "precision": "float32"}

    return run


def held_out_task(name: str, data: str, split: str, items: int, seed: int) -> Any:
    """The task of the zoo's model `name` on so many held-out samples."""
    samples = zoo.data(data, split=split, limit=items, seed=seed, transform=for_model(name))
    return build_task(name, zoo.create(name), samples, torch.device("cpu"), None)


def held_out_calls(name: str, data: str, split: str, items: int, seed: int, at_once: int = 64) -> list[dict[str, Any]]:
    """Arguments of the zoo's model `name` on so many held-out samples, `at_once` to a call."""
    task = held_out_task(name, data, split, items, seed)
    return [task.inputs(range(start, min(start + at_once, items))) for start in range(0, items, at_once)]


def test_task(model: nn.Module, name: str, data: str, items: int, seed: int) -> dict[str, Any]:
    """Metrics of a model, dense or pruned, on held-out scenes; `name` is what the zoo calls the dense one."""
    found = evaluate(model, held_out_task(name, data, "test", items, seed), batch_size=_BATCH)
    return {"split": "test", "items": items, "seed": seed, "metrics": found.metrics}


def write_release(
    model: nn.Module, path: Path, card: Mapping[str, Any], test: Callable[[Path], dict[str, Any]]
) -> None:
    """Write a model's weights in float16 and, beside them, a JSON card with what the file scores when loaded again."""
    weights = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    stored = {n: (v.half() if v.is_floating_point() else v).contiguous().clone() for n, v in weights.items()}
    with replacing_file(path) as draft:
        save_file(stored, draft)
        result = test(draft)
    path.with_suffix(".json").write_text(json.dumps({**card, "test": result}, indent=1) + "\n")
