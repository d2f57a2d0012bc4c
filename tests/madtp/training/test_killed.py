"""A compression that is killed and resumed ends where it would have ended; the same command in two processes does, too."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_training as tiny
import torch
from killing import CASES, kill_and_resume
from process_group import environment, kill
from safetensors.torch import load_file

from madtp.training import train
from madtp.training.progress import Progress

STEPS = 10
CONFIG = f"""
recipe = "tiny_training"
[training]
steps = {STEPS}
warmup_steps = 2
precision = "float32"
checkpoint_every = 2
evaluate_every = 0
log_every = 1
[settings]
dropout = 0.2
teach_every = 3
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(CONFIG)
    return path


def started(config: Path, output: Path, *launcher: str) -> subprocess.Popen[str]:
    """``madtp train`` in a child process."""
    command = [sys.executable, "-m", *launcher, *(["-m"] if launcher else []), "madtp", "train", "--resume"]
    return subprocess.Popen(
        [*command, "--config", str(config), "--output", str(output)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(),
        start_new_session=True,
    )


def run_to(child: subprocess.Popen[str], step: int) -> None:
    """Kill a child as soon as it says that a step is done."""
    lines = []
    try:
        assert child.stdout is not None
        for line in child.stdout:
            lines.append(line)
            if line.split()[:2] == ["step", str(step)]:
                return
        pytest.fail("".join(lines))
    finally:
        kill(child)


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / tiny.WEIGHTS)


def finished(child: subprocess.Popen[str], timeout: float = 300) -> str:
    try:
        return child.communicate(timeout=timeout)[0]
    finally:
        kill(child)


@pytest.mark.slow
def test_a_killed_compression_resumes_to_the_same_weights(config: Path, tmp_path: Path) -> None:
    draw = random.Random(20)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(config, whole, progress=Progress(quiet=True))
    first = draw.randrange(1, STEPS - 2)
    # Not the last but one: the run might end before it is killed.
    for step in (first, draw.randrange(first + 1, STEPS - 1)):
        run_to(started(config, killed), step)
        assert not (killed / tiny.WEIGHTS).exists()
    text = finished(started(config, killed))
    assert f"{STEPS} steps done" in text, text
    again = weights(killed)
    for name, value in weights(whole).items():
        assert torch.equal(value, again[name]), name
    states = [json.loads((output / "state.json").read_text()) for output in (whole, killed)]
    assert states[0] == states[1]
    assert states[0]["controller"]["gain"] != 1.0
    assert not list((killed / "checkpoints").glob(".*"))


@pytest.mark.slow
def test_torchrun_trains_as_one_process_in_two_micro_batches_does(config: Path, tmp_path: Path) -> None:
    launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python", sys.executable)
    child = started(config, tmp_path / "two", *launcher)
    text = finished(child)
    assert child.returncode == 0, text
    assert text.count(f"{STEPS} steps done") == 1, text
    config.write_text(CONFIG.replace("[settings]", "accumulate = 2\n[settings]"))
    train(config, tmp_path / "one", progress=Progress(quiet=True))
    ours = weights(tmp_path / "one")
    for name, value in weights(tmp_path / "two").items():
        torch.testing.assert_close(value, ours[name], rtol=1e-5, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.heavy
@pytest.mark.parametrize("name", CASES)
def test_commands_that_are_killed_at_random_moments_end_alike(name: str, tmp_path: Path) -> None:
    assert kill_and_resume(CASES[name], tmp_path, kills=7) >= 2
