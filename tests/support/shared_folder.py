"""Processes that save into one model folder and read it at the same time: :func:`run_rounds`.

``cd tests/support && python -m shared_folder 1000`` has 1,000 rounds with two writers and three readers, and prints what came
of them. Every second round begins without the folder.
"""

from __future__ import annotations

import multiprocessing
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from madtp.saving.model_folder import CONFIG, read_folder, write_folder

WRITERS, READERS, SAVES = 2, 3, 2
SIZE = 10_000
# Seconds that the processes wait for each other: to import torch on a busy machine, and within a round.
START, TIMEOUT = 600.0, 120.0


@dataclass
class Outcome:
    """What came of the rounds.

    Attributes:
        saves: number of saves that succeeded.
        reads: number of whole models that were read.
        failures: everything else, in words.
    """

    saves: int = 0
    reads: int = 0
    failures: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Shared:
    """What the processes share: where they meet before and after a round, and how many writers are still at work."""

    folder: Path
    rounds: int
    meeting: Any
    writing: Any
    outcomes: Any


def save(folder: Path, value: float) -> None:
    """Save a model all of whose numbers are ``value``."""
    write_folder(folder, {"a": torch.full((SIZE,), value), "b": torch.full((3, 3), value)}, {"value": value})


def read(folder: Path) -> float:
    """Read such a model, and return its number.

    Raises:
        AssertionError: it is made of several models.
    """
    tensors, description = read_folder(folder)
    values = {float(one) for tensor in tensors.values() for one in tensor.unique()}
    assert values == {description["value"]}, f"a model of {values} is described as {description['value']}"
    return description["value"]


def _attempt(outcome: Outcome, who: str, action: Callable[[], object]) -> bool:
    try:
        action()
    except Exception as error:
        outcome.failures.append(f"{who}: {type(error).__name__}: {error}")
        return False
    return True


def _write(shared: _Shared, number: int) -> None:
    outcome = Outcome()
    shared.meeting.wait(START)
    for round_number in range(shared.rounds):
        shared.meeting.wait(TIMEOUT)
        for one in range(SAVES):
            value = float(1 + one + SAVES * (number + WRITERS * round_number))
            outcome.saves += _attempt(outcome, "writer", lambda value=value: save(shared.folder, value))
        with shared.writing:
            shared.writing.value -= 1
        shared.meeting.wait(TIMEOUT)
    shared.outcomes.put(outcome)


def _read(shared: _Shared) -> None:
    outcome = Outcome()
    shared.meeting.wait(START)
    for _ in range(shared.rounds):
        shared.meeting.wait(TIMEOUT)
        while shared.writing.value:
            if (shared.folder / CONFIG).exists():  # the first save of all may not have ended
                outcome.reads += _attempt(outcome, "reader", lambda: read(shared.folder))
        shared.meeting.wait(TIMEOUT)
    shared.outcomes.put(outcome)


def _after_a_round(folder: Path, round_number: int) -> None:
    """Check that the model is the last one of a writer, and that nothing else is left."""
    value = read(folder)
    lasts = {float(SAVES * (number + 1 + WRITERS * round_number)) for number in range(WRITERS)}
    assert value in lasts, f"{value} is not the last model of a writer: {lasts}"
    names = sorted(path.name for path in folder.iterdir())
    assert len(names) == 2, f"the folder holds {names}"


def run_rounds(folder: Path, rounds: int) -> Outcome:
    """Let two processes save into a folder, and three read it, in many rounds.

    Args:
        folder: where the model lies; its content is removed.
        rounds: number of rounds. In each of them, every writer saves twice.
    """
    torch.set_num_threads(1)
    context = multiprocessing.get_context("spawn")
    workers = WRITERS + READERS
    shared = _Shared(folder, rounds, context.Barrier(workers + 1), context.Value("i", WRITERS), context.Queue())
    processes = [context.Process(target=_write, args=(shared, number), daemon=True) for number in range(WRITERS)]
    processes += [context.Process(target=_read, args=(shared,), daemon=True) for _ in range(READERS)]
    for process in processes:
        process.start()
    total = Outcome()
    shared.meeting.wait(START)
    for round_number in range(rounds):
        if round_number % 2 == 0:
            shutil.rmtree(folder, ignore_errors=True)
        shared.writing.value = WRITERS
        shared.meeting.wait(TIMEOUT)
        shared.meeting.wait(TIMEOUT)
        _attempt(total, "after a round", lambda number=round_number: _after_a_round(folder, number))
    for _ in processes:
        one = shared.outcomes.get(timeout=TIMEOUT)
        total = Outcome(total.saves + one.saves, total.reads + one.reads, total.failures + one.failures)
    for process in processes:
        process.join(TIMEOUT)
    return total


def main() -> int:
    """Run as many rounds as the command line says."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        outcome = run_rounds(Path(scratch) / "model", rounds)
    print("\n".join(outcome.failures[:20]))
    print(
        f"{rounds} rounds of {WRITERS} writers and {READERS} readers in {time.monotonic() - began:.0f} s: "
        f"{outcome.saves} saves, {outcome.reads} reads, {len(outcome.failures)} failures"
    )
    return bool(outcome.failures)


if __name__ == "__main__":
    sys.exit(main())
