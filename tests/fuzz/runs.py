"""Readers of what runs leave and begin with: training checkpoints, parts of evaluations, configs. See :data:`READERS`."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from project_paths import ROOT
from small_learner import QUIET, learner, tiny
from torch import Tensor, nn

from madtp.evaluation import Evaluation, PartialResults, evaluate
from madtp.training import TrainingConfig, fit
from madtp.training.checkpoint import Stored, Trained
from madtp.training.config import from_plain
from madtp.training.optim import make_optimisers
from madtp.training.resuming import SHARES, as_json, check_config, newest_whole
from madtp.training.run import open_recipe
from zoo.examples import read_config
from zoo.recipes.scenes_dense import DenseSceneSettings

from .reading import Case, Reader, expect

CHECKPOINT = ("tensors.safetensors", "state.json", "hashes.json")


def _training(folder: Path) -> Case:
    config = tiny(evaluate_every=0)
    fit(learner(), config, folder, progress=QUIET, stop_after=8)
    (folder / "checkpoints" / ".lock").unlink(missing_ok=True)
    older, newer = sorted((folder / "checkpoints").iterdir())
    shutil.rmtree(older)
    made = learner()
    trained = Trained(made.module, make_optimisers(made.module, config))
    _step(trained)  # so that there is state of the optimisers to keep
    depends_on = as_json({"training": config.to_dict(), SHARES: 1})
    whole = newest_whole(folder / "checkpoints")
    assert whole is not None

    def read(place: Path) -> Stored | None:
        stored = newest_whole(place / "checkpoints")
        if stored is not None:
            check_config(stored, depends_on, config.steps, anyway=False)
            stored.load_into(trained)
        return stored

    def check(stored: Stored | None, sealed: bool) -> None:
        if stored is None:  # the folder of the checkpoint is gone or has another name
            return
        hashed = (stored.path / "hashes.json").is_file()
        if hashed and not sealed:
            expect(stored.step == whole.step, "it is of another step, and no hash told")
            same = stored.tensors.keys() == whole.tensors.keys()
            same = same and all(torch.equal(value, whole.tensors[name]) for name, value in stored.tensors.items())
            expect(same, "it holds other tensors, and no hash told")
        _step(trained)

    def seal(place: Path) -> None:
        path = place / "checkpoints" / newer.name
        hashes = {name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in CHECKPOINT[:2]}
        (path / "hashes.json").write_text(json.dumps(hashes))

    formats = ("safetensors", "json", "json")
    files = tuple((f"checkpoints/{newer.name}/{name}", of) for name, of in zip(CHECKPOINT, formats, strict=True))
    return Case(files, read, check, trained.tensors, seal)


def _step(trained: Trained) -> None:
    """A step of the optimisers."""
    for parameter in trained.module.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.full_like(parameter, 1e-3)
    for optimiser in trained.optimisers:
        optimiser.step()


@dataclass
class _Doubled:
    """A stage that doubles the place of each sample."""

    name: str = "doubled"

    def run(self, model: nn.Module, samples: range, earlier: Mapping[str, Sequence[dict[str, Any]]]) -> Any:
        return [{"value": value} for value in model(torch.tensor(list(samples))).tolist()]


class _Doubling(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


@dataclass
class _Task:
    stages: tuple[_Doubled, ...] = (_Doubled(),)
    name: str = "doubling"
    ids: tuple[str, ...] = ("a", "b", "c")

    def inputs(self, samples: range) -> dict[str, Tensor]:
        return {"x": torch.tensor(list(samples))}

    def metrics(self, results: Mapping[str, Sequence[dict[str, Any]]]) -> dict[str, float]:
        return {"total": float(sum(result["value"] for result in results["doubled"]))}


def _evaluation(folder: Path) -> Case:
    setup = {"model": "doubling", "limit": 3, "files": {"a": "b"}, "seed": 0}

    def read(place: Path) -> Evaluation:
        parts = PartialResults(place / "parts", setup)
        found = evaluate(_Doubling(), _Task(), batch_size=2, partial_results=parts)
        parts.remove()
        return found

    whole = evaluate(_Doubling(), _Task(), batch_size=2, partial_results=PartialResults(folder / "parts", setup))

    def check(found: Evaluation, sealed: bool) -> None:
        expect((found.metrics, found.samples) == (whole.metrics, whole.samples), "other results, and no hash told")

    names = sorted(path.name for path in (folder / "parts").iterdir())
    return Case(tuple((f"parts/{name}", "json") for name in names), read, check)


def _recipe(folder: Path, name: str, text: str, of: str) -> Case:
    (folder / name).write_text(text)

    def read(place: Path) -> tuple[TrainingConfig, DenseSceneSettings]:
        opened = open_recipe(place / name)
        return opened.training, from_plain(DenseSceneSettings, opened.settings, "settings")

    def check(found: tuple[TrainingConfig, DenseSceneSettings], sealed: bool) -> None:
        training, settings = found
        expect(
            1 <= training.steps < 10**8 and training.learning_rate > 0, "the training has no steps or learns nothing"
        )
        expect(settings.pictures_per_step > 0, "there are no pictures")

    return Case(((name, of),), read, check)


def _toml(folder: Path) -> Case:
    return _recipe(folder, "x.toml", (ROOT / "zoo/recipes/blip_vqa_mini.toml").read_text(), "lines")


def _json_recipe(folder: Path) -> Case:
    content = {
        "recipe": "zoo.recipes.scenes_dense",
        "training": TrainingConfig().to_dict(),
        "settings": {"model": "blip_vqa_mini", "pictures_per_step": 4, "fade_to": 0.1, "kinds": ["a"]},
    }
    return _recipe(folder, "x.json", json.dumps(content), "json")


def _host_config(folder: Path) -> Case:
    from transformers import CLIPConfig

    config = CLIPConfig()
    config.architectures = ["CLIPModel"]
    config.save_pretrained(folder)

    def check(found: tuple[Any, str], sealed: bool) -> None:
        expect(isinstance(found[1], str), "the class has no name")
        expect(isinstance(found[0].to_dict(), dict), "the configuration cannot be written")

    return Case((("config.json", "json"),), lambda place: read_config(place / "config.json"), check)


_WITH_TRANSFORMERS = (Reader("host_config", "config.json of transformers, as madtp bench takes it", _host_config),)
READERS = (
    Reader("training", "a training checkpoint, as a run that resumes reads it", _training),
    Reader("evaluation", "parts of an evaluation, as a run that resumes reads them", _evaluation),
    Reader("toml", "a config of madtp train in TOML, with the settings of its recipe", _toml),
    Reader("json", "the same in JSON", _json_recipe),
    *(_WITH_TRANSFORMERS if importlib.util.find_spec("transformers") else ()),
)
