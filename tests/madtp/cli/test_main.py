"""The command line: help, version, errors as messages."""

from __future__ import annotations

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from madtp.cli.app import app

runner = CliRunner()
COMMANDS = ("demo", "inspect", "show", "train", "compress", "convert", "eval", "recipes", "models")


def test_help_lists_every_command() -> None:
    result = runner.invoke(app, ["--help"], env={"COLUMNS": "100"})
    assert result.exit_code == 0
    for command in COMMANDS:
        assert command in result.output


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_gives_examples(command: str) -> None:
    result = runner.invoke(app, [command, "--help"], env={"COLUMNS": "100"})
    assert result.exit_code == 0
    assert f"madtp {command}" in result.output


def test_help_does_not_import_torch() -> None:
    program = "import sys; from madtp.cli.app import app; assert not {'torch', 'timm', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_version_is_printed() -> None:
    result = runner.invoke(app, ["--version"])
    assert result.exit_code == 0
    assert result.output.startswith("madtp ")


def test_an_error_of_ours_is_a_message_with_code_1() -> None:
    result = runner.invoke(app, ["inspect", "vit_bse_patch16_224"])
    assert result.exit_code == 1
    assert "UnknownModelError" in result.output
    assert "vit_base_patch16_224" in result.output
    assert "Traceback" not in result.output


def test_debug_lets_the_error_through() -> None:
    from madtp.errors import UnknownModelError

    result = runner.invoke(app, ["--debug", "inspect", "vit_bse_patch16_224"])
    assert isinstance(result.exception, UnknownModelError)


def test_wrong_usage_is_code_2() -> None:
    assert runner.invoke(app, ["inspect"]).exit_code == 2
    assert runner.invoke(app, ["demo", "--samples", "0"]).exit_code == 2


def test_models_lists_the_zoo_by_pattern() -> None:
    result = runner.invoke(app, ["models", "blip_nlvr*"])
    assert result.exit_code == 0
    assert "blip_nlvr_mini" in result.output
    assert "vit_base_patch16_384" in runner.invoke(app, ["models", "vit_base_patch16_3*", "--timm"]).output


def test_models_without_a_match_says_so() -> None:
    result = runner.invoke(app, ["models", "no-such-*"])
    assert result.exit_code == 1
    assert "no model matches" in result.output
