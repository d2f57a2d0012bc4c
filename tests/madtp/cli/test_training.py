"""``madtp train`` and `madtp compress`: what reaches the training run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import madtp.training.run
from madtp.cli.app import app
from madtp.cli.training_commands import apply_overrides, parse_overrides
from madtp.errors import ConfigError

CONFIG = 'recipe = "zoo.recipes.none"\n[training]\nsteps = 10\n[settings]\nkinds = ["a"]\n'


@dataclass(frozen=True)
class FakeResult:
    steps: int = 10


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    seen: list[dict[str, Any]] = []

    def fake_train(config: dict[str, Any], output: Path, **options: Any) -> FakeResult:
        seen.append({"config": config, "output": output, **options})
        return FakeResult()

    monkeypatch.setattr(madtp.training.run, "train", fake_train)
    return seen


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "c.toml"
    path.write_text(CONFIG)
    return path


def test_train_passes_config_overrides_and_resume(calls: list[dict[str, Any]], config: Path, tmp_path: Path) -> None:
    arguments = ["train", "-c", str(config), "-o", str(tmp_path / "out"), "--resume"]
    result = CliRunner().invoke(app, [*arguments, "--override", "training.steps=3", "--override", "settings.name=x y"])
    assert result.exit_code == 0, result.output
    (call,) = calls
    assert call["config"]["training"] == {"steps": 3}
    assert call["config"]["settings"] == {"kinds": ["a"], "name": "x y"}
    assert call["output"] == tmp_path / "out"
    assert call["resume"] is True


def test_compress_sets_reduction_and_names_the_folder_by_it(calls: list[dict[str, Any]], config: Path) -> None:
    result = CliRunner().invoke(app, ["compress", "-r", "0.8", "-c", str(config), "--checkpoint", "d.safetensors"])
    assert result.exit_code == 0, result.output
    (call,) = calls
    assert call["config"]["settings"] == {"kinds": ["a"], "reduction": 0.8, "checkpoint": "d.safetensors"}
    assert call["output"] == Path("runs/pruned-80")


def test_a_reduction_outside_0_and_1_is_wrong_usage(config: Path) -> None:
    assert CliRunner().invoke(app, ["compress", "-r", "80", "-c", str(config)]).exit_code == 2


def test_a_missing_config_is_a_message(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["train", "-c", str(tmp_path / "none.toml")])
    assert result.exit_code == 1
    assert "ConfigError" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--device", "banana"), "ConfigError: device is 'banana', which names no device; this machine has cpu"),
        (("--device", "cuda:99"), "ConfigError: device is 'cuda:99', which cannot be used here"),
        (("--output", "taken"), "UnwritableError: taken cannot be written (taken is a file); choose another name."),
        (("--output", "taken/run"), "UnwritableError: taken/run cannot be written (taken is a file)"),
    ],
)
@pytest.mark.parametrize("command", [("train",), ("compress", "--reduction", "0.5")])
def test_a_device_or_an_output_that_cannot_be_used_is_a_message(
    command: tuple[str, ...],
    arguments: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("taken").write_text("mine")
    result = CliRunner().invoke(app, [*command, *arguments])
    assert result.exit_code == 1
    assert message in result.output
    assert Path("taken").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


@pytest.mark.parametrize("text", ["steps", "=3", " = 3"])
def test_an_override_without_name_or_value_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="NAME=VALUE"):
        parse_overrides([text])


def test_an_override_through_a_value_is_refused() -> None:
    with pytest.raises(ConfigError, match="not a table"):
        apply_overrides({"training": {"steps": 3}}, {"training.steps.more": 1})


@given(st.dictionaries(st.from_regex(r"[a-z]{1,4}", fullmatch=True), st.integers() | st.text() | st.booleans()))
def test_overrides_replace_what_they_name_and_nothing_else(values: dict[str, Any]) -> None:
    content = {"recipe": "r", "training": {"zzzzz": 1}}
    changed = apply_overrides(content, {f"training.{name}": value for name, value in values.items()})
    assert changed == {"recipe": "r", "training": {"zzzzz": 1, **values}}
    assert content == {"recipe": "r", "training": {"zzzzz": 1}}
