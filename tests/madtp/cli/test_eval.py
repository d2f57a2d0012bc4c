"""``madtp eval`` with the shipped models, on scenes and on files in the published formats."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import dataset_files
import pytest
from click.testing import Result as Outcome
from process_group import environment, kill
from typer.testing import CliRunner

import madtp
import zoo
from madtp.cli.app import app
from madtp.errors import DataError
from zoo.scenes import SceneDataset
from zoo.tasks.reasoning import Reasoning
from zoo.tasks.vocabulary import words_for

STATEMENTS = (("there is a red circle in the left image", "True"), ("no image contains a blue cross", "False"))


def run(*arguments: str, model: str = "blip_nlvr_mini") -> Outcome:
    return CliRunner().invoke(app, ["eval", "--model", model, *arguments])


def evaluated(path: Path, *arguments: str, model: str = "blip_nlvr_mini") -> dict[str, Any]:
    outcome = run("--output", str(path), *arguments, model=model)
    assert outcome.exit_code == 0, outcome.output
    return json.loads(path.read_text())


def test_the_dense_model_on_scenes(tmp_path: Path) -> None:
    content = evaluated(tmp_path / "e.json", "-k", "dense", "-n", "10", "-b", "4", "--per-sample")
    assert content["metrics"]["accuracy"] == 1.0
    assert content["samples"] == 10
    assert content["configuration"]["checkpoint"] == "dense"
    known = SceneDataset("test", 10)
    answers = [entry["reasoning"]["answer"] for entry in content["per_sample"]]
    assert answers == [known[number]["label"] for number in range(10)]
    assert [path.name for path in tmp_path.iterdir()] == ["e.json"]


def test_files_of_nlvr2_in_both_formats(tmp_path: Path) -> None:
    dataset_files.nlvr2_lines(tmp_path / "a", STATEMENTS)
    content = evaluated(
        tmp_path / "a.json", "-k", "dense", "-d", "nlvr2", "--root", str(tmp_path / "a"), "--split", "val"
    )
    assert content["samples"] == 2
    assert set(content["metrics"]) == {"accuracy"}
    path = dataset_files.nlvr2_list(tmp_path / "b", "test")
    listed = [{**entry, "sentence": STATEMENTS[0][0]} for entry in json.loads(path.read_text())]
    dataset_files.write_json(path, listed)
    content = evaluated(tmp_path / "b.json", "-k", "dense", "-d", "nlvr2", "--root", str(tmp_path / "b"))
    assert content["samples"] == 3


def test_an_interrupted_evaluation_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("-k", "dense", "-n", "6", "-b", "2", "--per-sample")
    whole = evaluated(tmp_path / "whole.json", *arguments)
    own, ran = Reasoning.run, []

    def interrupted(self: Reasoning, model: Any, samples: range, earlier: Any) -> Any:
        ran.append(samples.start)
        if ran == [0, 2]:
            raise KeyboardInterrupt
        return own(self, model, samples, earlier)

    monkeypatch.setattr(Reasoning, "run", interrupted)
    assert run("--output", str(tmp_path / "e.json"), *arguments).exit_code == 130
    assert not (tmp_path / "e.json").exists()
    content = evaluated(tmp_path / "e.json", *arguments)
    assert ran == [0, 2, 2, 4]
    assert content["metrics"] == whole["metrics"]
    assert content["per_sample"] == whole["per_sample"]


def change_a_statement(root: Path) -> None:
    path = root / "nlvr_test.json"
    path.write_text(path.read_text().replace("blue", "red"))


def change_an_image(root: Path) -> None:
    dataset_files.write_image(next(root.rglob("*.png")), (1, 2, 3), (30, 20))


def turn_the_order(root: Path) -> None:
    path = root / "nlvr_test.json"
    path.write_text(json.dumps(json.loads(path.read_text())[::-1]))


@pytest.mark.parametrize("change", [change_a_statement, change_an_image, turn_the_order])
def test_results_of_two_states_of_the_data_are_never_mixed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any
) -> None:
    root = tmp_path / "data"
    path = dataset_files.nlvr2_list(root, "test")
    texts = [STATEMENTS[number][0] for number in (0, 1, 0)]
    listed = [{**entry, "sentence": text} for entry, text in zip(json.loads(path.read_text()), texts, strict=True)]
    dataset_files.write_json(path, listed)
    arguments = ("-k", "dense", "-d", "nlvr2", "--root", str(root), "-b", "1", "--output", str(tmp_path / "e.json"))
    own, ran = Reasoning.run, []

    def interrupted(self: Reasoning, model: Any, samples: range, earlier: Any) -> Any:
        ran.append(samples.start)
        if ran == [0, 1]:
            raise KeyboardInterrupt
        return own(self, model, samples, earlier)

    monkeypatch.setattr(Reasoning, "run", interrupted)
    assert run(*arguments).exit_code == 130
    change(root)
    outcome = run(*arguments)
    assert outcome.exit_code == 1
    assert "holds parts of another evaluation: samples." in outcome.output
    assert ran == [0, 1]


def test_a_second_evaluation_to_the_same_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("-k", "dense", "-n", "2", "--output", str(tmp_path / "e.json"))
    own, told = Reasoning.run, []

    def meanwhile(self: Reasoning, model: Any, samples: range, earlier: Any) -> Any:
        told.append(run(*arguments))
        return own(self, model, samples, earlier)

    monkeypatch.setattr(Reasoning, "run", meanwhile)
    assert run(*arguments).exit_code == 0
    assert told[0].exit_code == 1
    assert f"in use by process {os.getpid()} on" in told[0].output
    assert [path.name for path in tmp_path.iterdir()] == ["e.json"]


def test_a_model_with_a_vocabulary_of_word_pieces(tmp_path: Path) -> None:
    dataset_files.nlvr2_lines(tmp_path / "data", (('There\'s a "red" circle!', "True"),))
    # As many pieces as the mini model has ids, [DEC] and [ENC] counted, which come behind.
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"a circle red there ' s".split()]
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join([*pieces, *(f"[unused{number}]" for number in range(126 - len(pieces)))]) + "\n")
    arguments = ("-k", "dense", "-d", "nlvr2", "--root", str(tmp_path / "data"), "--split", "val")
    content = evaluated(tmp_path / "e.json", *arguments, "--vocabulary", str(vocabulary))
    assert content["samples"] == 1
    words = words_for(128, vocabulary)
    assert words.cleaned
    ids = words.encode(["there ' s a red circle"])[0][0].tolist()
    assert ids == [127, 7, 8, 9, 4, 6, 5, 3]
    assert words.decode(ids) == "there's a red circle"
    vocabulary.write_text("\n".join(pieces) + "\n")
    with pytest.raises(DataError, match=r"gives 12 word pieces.* has 128"):
        words_for(128, vocabulary)
    with pytest.raises(DataError, match="reads 30524 word pieces"):
        words_for(30524, None)


def test_parts_of_other_settings_are_refused(tmp_path: Path) -> None:
    arguments = ("--output", str(tmp_path / "e.json"), "-k", "dense")
    dataset_files.write_json(tmp_path / "e.json.parts" / "setup.json", {"model": "another"})
    outcome = run(*arguments)
    assert outcome.exit_code == 1
    assert "holds parts of another evaluation" in outcome.output


@pytest.mark.slow
def test_pruned_to_half_of_the_macs(tmp_path: Path) -> None:
    arguments = ("-k", "dense", "-n", "8", "-b", "8", "-r", "0.5", "--calibration-samples", "8", "--per-sample")
    content = evaluated(tmp_path / "e.json", *arguments, "--calibration-split", "test")
    assert content["compute"]["reduction"] == pytest.approx(0.5, abs=0.015)
    assert content["configuration"]["pruning"]["gain"] > 0
    tokens = content["per_sample"][0]["tokens"]["reasoning"]
    assert len(tokens["visual_encoder.blocks.0"]) == 2
    assert tokens["visual_encoder.blocks.5"][0] < 145


# Seven samples make batches of different sizes, and two processes share them unevenly.
PRUNED = ("-k", "dense", "-n", "7", "-b", "2", "-r", "0.4", "--calibration-samples", "4", "--per-sample")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a pruned evaluation in one process finds that nothing interrupts."""
    return evaluated(tmp_path_factory.mktemp("whole") / "e.json", *PRUNED)


@pytest.mark.slow
def test_an_interrupted_pruned_evaluation_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: dict[str, Any]
) -> None:
    own, ran = Reasoning.run, []

    def interrupted(self: Reasoning, model: Any, samples: range, earlier: Any) -> Any:
        ran.append(samples.start)
        if ran == [0, 2]:
            raise KeyboardInterrupt
        return own(self, model, samples, earlier)

    monkeypatch.setattr(Reasoning, "run", interrupted)
    assert run("--output", str(tmp_path / "e.json"), *PRUNED).exit_code == 130
    monkeypatch.setattr(madtp, "calibrate", None)  # what was found before is taken
    content = evaluated(tmp_path / "e.json", *PRUNED)
    assert ran == [0, 2, 2, 4, 6]
    assert content["per_sample"] == whole["per_sample"]
    assert content["compute"]["macs"] == whole["compute"]["macs"]


@pytest.mark.slow
def test_a_saved_pruned_model_is_evaluated_as_it_is(tmp_path: Path) -> None:
    content = evaluated(tmp_path / "e.json", "-k", "pruned-80", "-n", "8")
    assert content["compute"]["reduction"] > 0.6


@pytest.mark.slow
def test_the_pruned_model_for_questions_answers_them(tmp_path: Path) -> None:
    arguments = ("-k", "pruned-80", "-d", "scenes_questions", "-n", "64")
    content = evaluated(tmp_path / "e.json", *arguments, model="blip_vqa_mini")
    assert content["compute"]["reduction"] > 0.7
    assert content["metrics"]["vqa_accuracy"] > 0.8


@pytest.mark.slow
def test_two_processes_evaluate_as_one_does(tmp_path: Path, whole: dict[str, Any]) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "madtp"]
    command = [*launcher, "eval", "--model", "blip_nlvr_mini", *PRUNED, "-o", str(tmp_path / "two.json")]
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment(), start_new_session=True
    )
    try:
        text = child.communicate(timeout=300)[0]
    finally:
        kill(child)
    assert child.returncode == 0, text
    assert text.count("results written to") == 1, text
    two = json.loads((tmp_path / "two.json").read_text())
    two["compute"]["seconds"] = whole["compute"]["seconds"]
    assert two == whole
    assert len({entry["id"] for entry in two["per_sample"]}) == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-d", "nlvr2"), "lies in files"),
        (("-d", "nlvr2", "--root", "/none"), "/none is not a folder"),
        (("--split", "dev"), "scenes has no split 'dev'"),
        (("-k", "best"), "'best' is neither a file, nor a saved folder, nor a shipped checkpoint"),
        (("--vocabulary", "/none.txt"), "no vocabulary file /none.txt"),
        (("-d", "other"), "no data set 'other'"),
        (("--device", "banana"), "device is 'banana', which names no device; this machine has cpu"),
        (("--device", "cuda:99"), "device is 'cuda:99', which cannot be used here"),
        (("--output", "/dev/null/e.json"), "/dev/null/e.json cannot be written (Not a directory); choose another name"),
        (("--output", "/dev/null"), "/dev/null cannot be written (File exists); choose another name"),
    ],
)
def test_what_does_not_fit_is_a_message(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    outcome = run("--output", str(tmp_path / "e.json"), *arguments)
    assert outcome.exit_code == 1
    assert message in outcome.output
    assert not list(tmp_path.iterdir())


def test_data_of_another_task_is_refused(tmp_path: Path) -> None:
    dataset_files.vqa_list(tmp_path, "test")
    outcome = run("-d", "vqav2", "--root", str(tmp_path), "--output", str(tmp_path / "e.json"))
    assert outcome.exit_code == 1
    assert "blip_nlvr_mini is for reasoning and vqav2 for questions" in outcome.output


def test_a_model_without_a_task_or_a_name_is_refused() -> None:
    assert CliRunner().invoke(app, ["eval"]).exit_code == 2
    outcome = run("--data", "scenes", model="none")
    assert outcome.exit_code == 1
    assert "no model 'none'" in outcome.output


def test_data_sets_are_listed() -> None:
    outcome = CliRunner().invoke(app, ["eval", "--list"])
    assert outcome.exit_code == 0
    assert all(name in outcome.output for name in zoo.list_data())
