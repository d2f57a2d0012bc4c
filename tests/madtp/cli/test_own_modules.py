"""Recipes by name, modules of the user's (``--plugin``, ``module:function``), and ``madtp show``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from shallow_models import shallow_models
from typer.testing import CliRunner

import madtp
import madtp.training.run
import zoo.small
from madtp.cli.app import app
from madtp.cli.console import output_console
from madtp.errors import ConfigError, UnknownModelError
from zoo.builders import build_own
from zoo.datasets.registry import DATA
from zoo.examples import find_model
from zoo.recipes.catalogue import list_recipes, recipe_names, recipe_path
from zoo.registry import MODELS
from zoo.tasks.own_images import inputs_of_images, open_pruned

runner = CliRunner()

PLUGIN = """
import torch
from torch import nn

import zoo
from zoo.datasets.registry import DataEntry


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, states):
        return self.layer(states)


def build():
    return Small(), {"states": torch.zeros(2, 4)}


def alone():
    return Small()


def wrong():
    return "a model"


def failing():
    raise OSError("no weights here")


zoo.register(
    "own_model", description="mine", input_size=(3, 8, 8), mean=(0, 0, 0), std=(1, 1, 1), licence="", paper=""
)(Small)
zoo.register_data(DataEntry("own_data", lambda request: ([], None), "mine", ("captioning",), ("test",)))
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "own_plugin.py").write_text(PLUGIN)
    (tmp_path / "broken_plugin.py").write_text("import no_such_library\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield "own_plugin"
    for registry, name in ((MODELS, "own_model"), (DATA, "own_data")):
        if name in registry:
            registry.remove(name)
    sys.modules.pop("own_plugin", None)


def test_every_command_that_names_models_or_data_takes_plugins() -> None:
    for command in ("inspect", "train", "compress", "convert", "eval", "bench", "export", "survey", "models", "show"):
        text = runner.invoke(app, [command, "--help"], env={"COLUMNS": "120"}).output
        assert "--plugin" in text, command


def test_a_plugin_registers_models_and_data(plugin: str) -> None:
    models = runner.invoke(app, ["models", "own_*", "--plugin", plugin])
    assert models.exit_code == 0, models.output
    assert "own_model" in models.output
    assert "own_data" in runner.invoke(app, ["eval", "--list", "--plugin", plugin]).output


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("own_plugn", "there is no module 'own_plugn'"),
        ("./own_plugin.py", "Give a module as `import` would"),
        ("broken_plugin", "cannot be imported: ModuleNotFoundError"),
    ],
)
def test_a_plugin_that_cannot_be_imported_is_told(plugin: str, module: str, message: str) -> None:
    result = runner.invoke(app, ["models", "--plugin", module])
    assert result.exit_code == 1
    assert message in " ".join(result.output.split())


def test_a_function_of_the_users_gives_a_model(plugin: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(".")
    found = find_model("own_plugin:build")
    assert found.origin == "function"
    assert list(found.example_inputs) == ["states"]
    assert build_own("own_plugin:alone")[1] is None
    model, inputs = zoo.small.build("own_plugin:build")
    assert model(**inputs).shape == (2, 4)
    assert zoo.small.names(["own_plugin:build"]) == ["own_plugin:build"]


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("own_plugin:biuld", UnknownModelError, "no function 'biuld'. Did you mean 'build'"),
        ("no_plugin:build", UnknownModelError, "there is no module 'no_plugin'"),
        ("own_plugin:wrong", ConfigError, "returned str; it has to return an nn.Module"),
        ("own_plugin:failing", ConfigError, "failed: OSError: no weights here"),
    ],
)
def test_a_function_that_gives_no_model_is_told(
    plugin: str, name: str, error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(".")
    with pytest.raises(error, match=message):
        find_model(name)


@pytest.mark.slow
def test_the_survey_examines_a_model_of_the_users_in_its_own_process(plugin: str) -> None:
    result = runner.invoke(app, ["survey", "own_plugin:build", "--plugin", plugin], env={"COLUMNS": "120"})
    assert result.exit_code == 0, result.output
    assert "no transformer" in result.output


def test_recipes_are_listed_with_task_model_data_and_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_console, "_width", 160)  # it may have been made before this test
    result = runner.invoke(app, ["recipes"])
    assert result.exit_code == 0, result.output
    for name in recipe_names():
        assert name in result.output
    (line,) = (line for line in result.output.splitlines() if line.startswith("blip_nlvr "))
    assert line.split()[1:4] == ["reasoning", "blip_nlvr", "nlvr2"]
    assert "model_base_nlvr.pth, data/nlvr2, data/vocab.txt" in line
    assert "nothing else" in next(line for line in result.output.splitlines() if line.startswith("clip_mini "))
    assert "madtp[open-clip]" in result.output


def test_what_a_recipe_is_for_is_read_from_its_file() -> None:
    entries = {recipe.name: recipe for recipe in list_recipes()}
    assert len(entries) == len(list((Path(zoo.__file__).parent / "recipes").glob("*.toml")))
    assert entries["clip_mini"].command == "train"
    assert entries["clip_mini_compress"].command == "compress"
    for recipe in entries.values():
        zoo.describe(recipe.model)
        if recipe.command == "compress" and recipe.model.endswith("_mini") and recipe.model != "llava_mini":
            assert recipe.needs == ()


@pytest.mark.parametrize("given", ["blip_nlvr", "blip_nlvr.toml"])
def test_a_config_is_found_by_the_name_of_a_recipe(given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert recipe_path(given).samefile(Path(zoo.__file__).parent / "recipes" / "blip_nlvr.toml")
    (tmp_path / given).write_text("mine")
    assert recipe_path(given) == Path(given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("blip_nlvr_mni", "Did you mean 'blip_nlvr_mini'"),
        ("zoo/recipes/clip_mini.toml", "--config clip_mini"),
        ("no_such", "madtp recipes"),
    ],
)
def test_a_misspelt_config_is_told(given: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for command in (["train"], ["compress", "-r", "0.5"]):
        result = runner.invoke(app, [*command, "--config", given])
        assert result.exit_code == 1
        assert message in " ".join(result.output.split())


def test_train_and_compress_run_a_recipe_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def train(config: Any, output: Path, **options: Any) -> Any:
        seen.append(config)
        raise ConfigError("far enough")

    monkeypatch.setattr(madtp.training.run, "train", train)
    monkeypatch.chdir(tmp_path)
    runner.invoke(app, ["train", "--config", "clip_mini"])
    runner.invoke(app, ["compress", "--config", "blip_vqa", "-r", "0.3"])
    assert [config["settings"]["model"] for config in seen] == ["clip_mini", "blip_vqa"]
    assert seen[1]["settings"]["reduction"] == 0.3


def test_the_id_of_a_hub_is_told_to_inspect() -> None:
    result = runner.invoke(app, ["inspect", "openai/clip-vit-base-patch32"])
    assert result.exit_code == 1
    told = " ".join(result.output.split())
    assert "nothing is downloaded here" in told
    assert "config.json" in told


@pytest.mark.slow
def test_show_draws_a_saved_model_on_images_of_the_users(tmp_path: Path) -> None:
    photos = [tmp_path / "left.png", tmp_path / "right.png"]
    for number, path in enumerate(photos):
        Image.effect_noise((60, 40), 30 + 60 * number).save(path)
    output = tmp_path / "kept.png"
    with shallow_models():
        model = zoo.create("blip_nlvr_shallow")
        madtp.save(madtp.rewrite(model), tmp_path / "saved")
        given = [*map(str, photos), "--model", str(tmp_path / "saved"), "-o", str(output)]
        result = runner.invoke(app, ["show", *given])
        assert result.exit_code == 0, result.output
        with Image.open(output) as drawn:
            assert drawn.width > 800
        one = runner.invoke(app, ["show", str(photos[0]), *given[2:]])
        inputs = inputs_of_images(model, photos)
    assert inputs["images"].shape == (1, 2, 3, 96, 96)
    assert one.exit_code == 1
    assert "takes 2 images a sample, and 1 are given" in " ".join(one.output.split())


def test_show_refuses_what_is_not_pruned_and_what_is_unknown(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds a dense clip_mini"):
        open_pruned("clip_mini", ["dense"])
    with pytest.raises(ConfigError, match="no pruned weights of blip_nlvr ship"):
        open_pruned("blip_nlvr")
    with pytest.raises(UnknownModelError, match="is no folder, either"):
        open_pruned("clip_mni")
    with pytest.raises(ConfigError, match="leave --checkpoint out"):
        open_pruned(str(tmp_path), ["dense"])
    result = runner.invoke(app, ["show", "a.jpg", "--model", "clip_mini", "-o", "kept.docx"])
    assert result.exit_code == 2
