"""Test models on held-out scenes, and write trained weights with a model card: :func:`test_task`, :func:`write_release`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import zoo
from madtp.atomic_files import replacing_file, write_text
from madtp.evaluation import Task, evaluate
from zoo.tasks import build_task
from zoo.transforms import for_model

_BATCH = 128


def measure_task(name: str, data: str, *, items: int, seed: int) -> Callable[[Path], dict[str, object]]:
    """Return a function that loads a weights file into a model of the zoo and tests it as ``madtp eval`` does, in float32.

    Args:
        name: Name of the model in the zoo.
        data: Name of the data set.
        items: Samples to test on.
        seed: Edition of the data.
    """

    def run(path: Path) -> dict[str, object]:
        return {**test_task(zoo.create(name, path), name, data, items=items, seed=seed), "precision": "float32"}

    return run


def held_out_calls(
    name: str, data: str, *, split: str, items: int, seed: int, batch_size: int = 64
) -> list[dict[str, Tensor]]:
    """Return arguments of a model of the zoo on held-out samples, ``batch_size`` to a call; see :func:`measure_task`."""
    task = _held_out_task(name, data, split=split, items=items, seed=seed)
    return [task.inputs(range(start, min(start + batch_size, items))) for start in range(0, items, batch_size)]


def test_task(model: nn.Module, name: str, data: str, *, items: int, seed: int) -> dict[str, object]:
    """Return the metrics of a model on held-out scenes, for a card.

    Args:
        model: The model, dense or pruned.
        name: Name of the dense model in the zoo.
        data: Name of the data set.
        items: Samples to test on.
        seed: Edition of the data.
    """
    task = _held_out_task(name, data, split="test", items=items, seed=seed)
    return {"split": "test", "items": items, "seed": seed, "metrics": evaluate(model, task, batch_size=_BATCH).metrics}


def _held_out_task(name: str, data: str, *, split: str, items: int, seed: int) -> Task:
    samples = zoo.data(data, split=split, limit=items, seed=seed, transform=for_model(name))
    return build_task(name, zoo.create(name), samples, torch.device("cpu"))


def write_release(
    model: nn.Module, path: Path, card: Mapping[str, object], test: Callable[[Path], dict[str, object]]
) -> None:
    """Write a model's weights in float16 and a JSON card next to them, with the scores of the file when loaded again.

    Args:
        model: The model.
        path: File of the weights; the card gets the ending ``.json``.
        card: Facts about the run.
        test: Takes the path of a weights file, and returns what the model scores with it.
    """
    weights = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    stored = {n: (v.half() if v.is_floating_point() else v).contiguous().clone() for n, v in weights.items()}
    with replacing_file(path) as draft:
        save_file(stored, draft)
        result = test(draft)
    write_text(path.with_suffix(".json"), json.dumps({**card, "test": result}, indent=1) + "\n")
