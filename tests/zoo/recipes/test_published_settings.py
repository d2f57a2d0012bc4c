"""The config files of the paper's settings: valid as they are, and run for a step with a shallow model on small files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import dataset_files
import paper_settings
import published_checkpoints
import pytest
import torch
from shallow_models import shallow

import zoo
from madtp.config import PruningConfig
from madtp.training import TrainingConfig, train
from madtp.training.config import from_plain
from madtp.training.progress import Progress
from madtp.training.run import read_config
from zoo.recipes.compress_data import CompressDataSettings, build, objective_and_source
from zoo.recipes.data_loader import Loader

RECIPES = Path(zoo.__file__).parent / "recipes"
# Published: batch over 8 GPUs, learning rate, weight decay, epochs; and samples of an epoch.
PUBLISHED = {
    "blip_nlvr": (128, 3e-6, 0.05, 15, 86_373),
    "blip_retrieval_coco": (256, 1e-7, 0.05, 5, 566_747),
    "blip_retrieval_flickr": (128, 1e-7, 0.05, 10, 145_000),
    "blip_caption_coco": (256, 1e-5, 0.05, 5, 566_747),
    "blip_vqa": (128, 2e-5, 0.05, 3, 658_111),
    "clip_retrieval_coco": (128, 1e-5, 0.2, 5, 566_747),
    "clip_retrieval_flickr": (128, 1e-5, 0.2, 5, 145_000),
}
FIXTURES = {
    "nlvr2": paper_settings.nlvr2,
    "coco": paper_settings.coco,
    "flickr30k": paper_settings.flickr30k,
    "vqav2": paper_settings.vqav2,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_holds_what_was_published(name: str) -> None:
    content = read_config(RECIPES / f"{name}.toml")
    settings, training = (
        from_plain(CompressDataSettings, content["settings"], "settings"),
        TrainingConfig.from_dict(content["training"]),
    )
    batch, rate, decay, epochs, samples = PUBLISHED[name]
    assert (settings.samples_per_step, training.learning_rate, training.weight_decay) == (batch, rate, decay)
    assert training.steps == epochs * (samples // batch)
    assert (training.optimiser, training.warmup_steps, training.final_learning_rate) == ("adamw", 0, 0.0)
    assert settings.alignment_weight == (0.0 if "caption" in name else 0.1)
    assert PruningConfig.from_dict(dict(settings.pruning)).alignment_tokens == 100
    if "retrieval" in name:
        assert (settings.queue, settings.momentum, settings.alpha) == (57_600, 0.995, 0.4)
        assert math.isclose(settings.alpha_ramp, 1 / epochs)
    zoo.describe(settings.model)
    assert set(settings.splits) <= set(zoo.describe_data(settings.data).splits)


def small(name: str, folder: Path) -> dict[str, Any]:
    """The recipe for a shallow model, on small files, for one step of four samples."""
    torch.manual_seed(0)
    content = read_config(RECIPES / f"{name}.toml")
    settings = content["settings"]
    FIXTURES[settings["data"]](folder)
    setting = next(
        s for s in paper_settings.SETTINGS.values() if s.model == settings["model"].replace("l14_336", "b16")
    )
    model = shallow(settings["model"])
    changes = {
        "model": model,
        "checkpoint": str(setting.weights(model, folder)),
        "root": str(folder),
        "samples_per_step": 4,
        "workers": 0,
        "queue": 8,
        "start_reduction": 0.3,
        "splits": ["val"],
        "calibration_split": "val",
        "calibration_items": 4,
        "test_split": setting.split,
        "test_items": 4,
    }
    if "vocabulary" in settings:
        changes["vocabulary"] = str(
            published_checkpoints.write_vocabulary(folder / "vocab.txt", paper_settings.WORDS, 126)
        )
    if "answers" in settings:
        changes["answers"] = str(folder / "answer_list.json")
    settings |= changes
    content["training"] |= {"steps": 1, "checkpoint_every": 0, "threads": 1}
    return content


@pytest.mark.slow
@pytest.mark.usefixtures("shallow_zoo")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.heavy] * name.endswith("flickr")) for name in PUBLISHED]
)
def test_a_step_of_a_recipe_leaves_a_pruned_model_and_its_card(tmp_path: Path, name: str) -> None:
    content = small(name, tmp_path)
    result = train(content, tmp_path / "out", progress=Progress(quiet=True))
    assert math.isfinite(result.metrics["loss"])
    card = json.loads((tmp_path / "out" / "pruned" / "card.json").read_text())
    assert card["calibration"]["reduction"] == pytest.approx(0.5, abs=0.05)
    assert card["test"]["items"] == 4
    assert card["test"]["metrics"]
    if "caption" not in name:
        assert "align" in result.metrics


@pytest.mark.slow
def test_samples_follow_from_seed_and_step_also_in_other_processes(tmp_path: Path) -> None:
    paper_settings.coco(tmp_path)
    data = zoo.data("coco", tmp_path, "val", transform=zoo.transforms.training(16, (0.5,) * 3, (0.5,) * 3))
    one, again = (Loader(data, 2, seed=3, workers=1) for _ in range(2))
    torch.manual_seed(5)
    first = one.open(1, range(2))
    torch.manual_seed(6)
    second = again.open(1, range(1, 2))
    assert first[1][0].record == second[0][0].record
    assert torch.equal(first[1][0].images, second[0][0].images)
    assert first[1][1] == second[0][1]
    assert sorted(one.indices(0) + one.indices(1)) == [0, 1, 2, 3]
    assert one.indices(0) + one.indices(1) != one.indices(2) + one.indices(3)


@pytest.mark.usefixtures("shallow_zoo")
def test_batches_of_questions_hold_all_answers_with_their_shares(tmp_path: Path) -> None:
    content = small("blip_vqa", tmp_path)
    settings = from_plain(CompressDataSettings, content["settings"], "settings")
    _, source = objective_and_source(settings, TrainingConfig.from_dict(content["training"]))
    batch = source.batch(0, range(4))
    assert batch["owners"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert batch["weights"].tolist() == pytest.approx([0.7, 0.3] * 4)
    assert batch["answer_ids"].shape[0] == 8


@pytest.mark.usefixtures("shallow_zoo")
def test_a_run_knows_the_state_of_its_data(tmp_path: Path) -> None:
    content = small("blip_vqa", tmp_path)
    settings = from_plain(CompressDataSettings, content["settings"], "settings")
    training = TrainingConfig.from_dict(content["training"])

    def found() -> object:
        return objective_and_source(settings, training)[1].fingerprint

    before = found()
    assert found() == before
    dataset_files.write_image(next(tmp_path.rglob("*.jpg")), (1, 2, 3), (50, 40))
    changed = found()
    assert changed != before
    answers = tmp_path / "vqa_val.json"
    answers.write_text(answers.read_text().replace("yes", "ja", 1).replace("two", "three", 1))
    assert found() != changed


@pytest.mark.usefixtures("shallow_zoo")
def test_wrong_settings_are_named(tmp_path: Path) -> None:
    dataset_files.coco_list(tmp_path, "val")
    content = small("blip_caption_coco", tmp_path)
    content["settings"]["samples_per_step"] = 400
    with pytest.raises(Exception, match="has 8 samples, and a step takes 400"):
        build(content["settings"], TrainingConfig())
