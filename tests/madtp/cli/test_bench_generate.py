"""``madtp bench --generate``: its options, tables and messages. What it measures is made up; tests/zoo/benchmark measures."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result as Outcome
from typer.testing import CliRunner

import zoo.benchmark
from madtp.benchmark import describe_environment
from madtp.benchmark.generation import GenerationMeasurement, GenerationResult, Times
from madtp.cli.app import app
from zoo.benchmark import GenerationSettings


def run(*arguments: str) -> Outcome:
    return CliRunner().invoke(app, ["bench", *arguments])


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[GenerationSettings]:
    """The settings that the command measures with; it saves one measurement and is interrupted if asked for -r 0.99."""
    seen = []

    def measure(
        settings: GenerationSettings, command: str, *, save: Callable[[GenerationResult], None], notify: Any
    ) -> None:
        seen.append(settings)
        notify("measuring", 0, 1)
        times = Times((8.0,), (4.0,))
        one = GenerationMeasurement(
            batch=1, image_tokens=64, text_tokens=16, new_tokens=4, target="", macs=1, cache_bytes=2048,
            prefill=times, step=times,
        )  # fmt: skip
        environment = describe_environment()
        shown = {"warm_up": 1, "dtype": "float32", "seed": 0, "new_tokens": 4}
        save(GenerationResult(command=command, settings=shown, environment=environment, measurements=(one,)))
        if settings.reductions == (0.99,):
            raise KeyboardInterrupt

    monkeypatch.setattr(zoo.benchmark, "measure_generation", measure)
    return seen


def test_options_reach_the_measurement_and_the_record_is_written(
    measured: list[GenerationSettings], tmp_path: Path
) -> None:
    path = tmp_path / "g.json"
    sizes = (
        "--image-size",
        "64",
        "--image-size",
        "96",
        "--text-tokens",
        "8",
        "--new-tokens",
        "4",
        "-b",
        "3",
        "-r",
        "0.3",
    )
    fields = ("--set", "text_config.num_hidden_layers=3", "--set", "name=x", "--pruning", "layers=[1,3]")
    outcome = run("hf:Some", "--generate", *sizes, *fields, "--json", str(path))
    assert outcome.exit_code == 0, outcome.output
    assert measured == [
        GenerationSettings(
            model="hf:Some",
            fields={"text_config.num_hidden_layers": 3, "name": "x"},
            pruning={"layers": [1, 3]},
            image_sizes=(64, 96),
            text_tokens=(8,),
            new_tokens=4,
            batch_sizes=(3,),
            reductions=(0.3,),
        )
    ]
    for part in (
        "hf:Some: generation, batch of 1, cpu time",
        "64 + 16",
        "4.00 ×1.00",
        "2.00 ×1.00",
        "results written to",
    ):
        assert part in outcome.output
    assert GenerationResult.read(path).measurements[0].cache_bytes == 2048


def test_defaults_are_those_of_bench(measured: list[GenerationSettings], tmp_path: Path) -> None:
    assert run("hf:Some", "--generate", "-o", str(tmp_path / "g.json")).exit_code == 0
    assert measured == [GenerationSettings(model="hf:Some")]


def test_an_interruption_leaves_what_was_measured(measured: list[GenerationSettings], tmp_path: Path) -> None:
    outcome = run("hf:Some", "--generate", "-r", "0.99", "-o", str(tmp_path / "g.json"))
    assert outcome.exit_code == 130
    assert "Interrupted." in outcome.output
    assert len(GenerationResult.read(tmp_path / "g.json").measurements) == 1


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--generate",), 2, "name a model"),
        (("hf:Some", "--generate", "--memory"), 2, "does not go with --generate"),
        (("hf:Some", "--generate", "-k", "dense"), 2, "does not go with --generate"),
        (("blip_nlvr_mini", "--text-tokens", "8"), 2, "needs --generate"),
        (("hf:Some", "--generate", "--set", "seven"), 2, "is not FIELD=VALUE"),
        (("hf:Some", "--generate", "--pruning", "seven"), 2, "is not FIELD=VALUE"),
        (("blip_nlvr_mini", "--pruning", "layers=[1]"), 2, "needs --generate"),
        (("blip_caption_mini", "--generate"), 1, "does not generate from an image and words"),
    ],
)
def test_what_does_not_fit_is_a_message(
    arguments: tuple[str, ...], code: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = run(*arguments)
    assert outcome.exit_code == code
    assert message in outcome.output
    assert not list(tmp_path.iterdir())


def test_without_transformers_the_way_out_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    outcome = run("hf:LlavaForConditionalGeneration", "--generate")
    assert outcome.exit_code == 1
    assert "pip install 'madtp[hf]'" in outcome.output
