"""Kill commands at random moments, resume them, and compare the results bit for bit: :func:`kill_and_resume`.

As a command, for longer runs: ``cd tests/support && python -m killing compress 20``, or another of :data:`CASES`.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from process_group import environment, kill

POLL_SECONDS = 0.01
LONGEST = 500.0
"""Seconds for a run that nothing kills."""

SETTINGS: dict[str, Any] = {
    "training.steps": 6,
    "training.warmup_steps": 1,
    "training.checkpoint_every": 1,
    "training.evaluate_every": 0,
    "training.threads": 1,
    "settings.start_reduction": 0.2,
    "settings.pictures_per_step": 2,
    "settings.texts_per_picture": 2,
    "settings.teaching_samples": 2,
    "settings.teaching_steps": 2,
    "settings.teach_every": 3,
    "settings.calibration_items": 16,
    "settings.test_items": 8,
}


@dataclass(frozen=True)
class Case:
    """A command that resumes when it is given again.

    Attributes:
        arguments: those of ``madtp``, but for ``--output``.
        output: what ``--output`` names, below a folder.
        progress: takes the output; counts what is done, so that kills come near writes.
        result: takes the output; returns what has to be equal.
        processes: how many share the work.
    """

    arguments: Sequence[str]
    output: str
    progress: Callable[[Path], int]
    result: Callable[[Path], object]
    processes: int = 1


def _written(output: Path) -> int:
    """Steps whose checkpoints are there, and then whatever the finish writes."""
    steps = [int(path.name.removeprefix("step-")) for path in (output / "checkpoints").glob("step-*")]
    return max(steps, default=0) + len(list((output / "pruned").glob("[!.]*")))


def _model(output: Path) -> object:
    return {path.name: path.read_bytes() for path in sorted((output / "pruned").iterdir())}


def _parts(output: Path) -> int:
    return len(list(output.with_name(output.name + ".parts").glob("[!.]*"))) + 100 * output.exists()


def _evaluated(output: Path) -> object:
    content = json.loads(output.read_text())
    del content["compute"]["seconds"]
    return content


COMPRESS = ("compress", "-r", "0.3", "--resume", *(f"--override={name}={value}" for name, value in SETTINGS.items()))
EVAL = ("eval", "--model", "blip_nlvr_mini", "-k", "dense", "-n", "9", "-b", "2", "--per-sample")
PRUNED = (*EVAL, "-r", "0.4", "--calibration-samples", "4")
CASES = {
    "compress": Case(COMPRESS, "run", _written, _model),
    "eval": Case(EVAL, "e.json", _parts, _evaluated),
    "eval-pruned": Case(PRUNED, "e.json", _parts, _evaluated),
    "eval-in-two": Case(EVAL, "e.json", _parts, _evaluated, processes=2),
    "eval-pruned-in-two": Case(PRUNED, "e.json", _parts, _evaluated, processes=2),
}


def _started(case: Case, output: Path, log: Path) -> subprocess.Popen[bytes]:
    launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node", str(case.processes), "-m")
    command = [sys.executable, "-m", *(launcher if case.processes > 1 else ()), "madtp", *case.arguments]
    command += ["--output", str(output)]
    with log.open("wb") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, env=environment(), start_new_session=True)


def _killed(case: Case, output: Path, log: Path, draw: random.Random, whole_seconds: float) -> bool:
    """Start the command and kill it at a random moment, or soon after one of its next writes; False if it ended before."""
    child = _started(case, output, log)
    try:
        until = time.monotonic() + (draw.uniform(0, whole_seconds) if draw.random() < 0.25 else LONGEST)
        goal = case.progress(output) + draw.randrange(1, 4)
        while child.poll() is None and time.monotonic() < until and case.progress(output) < goal:
            time.sleep(POLL_SECONDS)
        time.sleep(draw.choice((0.0, draw.uniform(0, 0.05), draw.uniform(0, 1))))
        assert child.poll() in (None, 0), log.read_text()
        return child.poll() is None
    finally:
        kill(child)


def _finish(case: Case, output: Path, log: Path) -> object:
    child = _started(case, output, log)
    try:
        assert child.wait(LONGEST) == 0, log.read_text()
    finally:
        kill(child)
    return case.result(output)


def kill_and_resume(case: Case, folder: Path, kills: int, seed: int = 0) -> int:
    """Kill and resume the command ``kills`` times, in as many runs as that takes; check that each ends as a whole one does.

    Returns:
        The number of runs that were killed at least once, all of which ended alike.
    """
    draw, log = random.Random(seed), folder / "log.txt"
    began = time.monotonic()
    whole = _finish(case, folder / "whole" / case.output, log)
    seconds, done, runs = time.monotonic() - began, 0, 0
    while done < kills:
        output = folder / f"killed-{runs}" / case.output
        before = done
        while done < kills and done < before + 5 and _killed(case, output, log, draw, seconds):
            done += 1
        assert _finish(case, output, log) == whole, f"run {runs}, killed {done - before} times, ended otherwise"
        assert not list(output.parent.rglob("*.lock"))
        assert {path.name for path in output.parent.iterdir()} == {output.name}, "something was left behind"
        runs += 1
        print(f"run {runs}: killed {done - before} times, equal ({done} of {kills} kills)", flush=True)
    return runs


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        kill_and_resume(CASES[sys.argv[1]], Path(place), int(sys.argv[2]), *map(int, sys.argv[3:]))
