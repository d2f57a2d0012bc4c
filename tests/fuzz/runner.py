"""Attempts by the thousand, in processes of their own: :func:`run_reader`."""

from __future__ import annotations

import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from project_paths import ROOT, SUPPORT

from .judging import CRASH, FAULTS, SLOW, Limits, Verdict

START = 300.0
"""Seconds for a process to import everything and to make its input."""

MARGIN = 5.0
"""Seconds after which a process is ended that did not end itself when an attempt took too long."""

ENDED = ""
"""What stands for the end of the lines of a process."""

ALL_READERS = "tests.fuzz.readers"


@dataclass
class Tally:
    """What became of the attempts of a reader.

    Attributes:
        reader: its name.
        counts: of outcomes, by kind.
        faults: seed and verdict of each attempt that went wrong.
        seconds: that all attempts took.
        slowest: seconds of the slowest one.
        largest: bytes of the one that took the most memory.
    """

    reader: str
    counts: Counter[str] = field(default_factory=Counter)
    faults: list[tuple[int, Verdict]] = field(default_factory=list)
    seconds: float = 0.0
    slowest: float = 0.0
    largest: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return everything in JSON values."""
        faults = [{"seed": seed, **asdict(verdict)} for seed, verdict in self.faults]
        return {**vars(self), "counts": dict(self.counts), "faults": faults}

    def add(self, seed: int, verdict: Verdict) -> None:
        """Count an outcome."""
        self.counts[verdict.kind] += 1
        self.seconds += verdict.seconds
        self.slowest = max(self.slowest, verdict.seconds)
        self.largest = max(self.largest, verdict.bytes)
        if verdict.kind in FAULTS:
            self.faults.append((seed, verdict))


def run_reader(
    reader: str,
    seeds: range,
    failures: Path,
    *,
    limits: Limits = Limits(),  # noqa: B008 (it is frozen)
    readers: str = ALL_READERS,
    ended: Callable[[int, Verdict], None] = lambda seed, verdict: None,
) -> Tally:
    """Make the attempts of a reader, and go on where one ends its process.

    Args:
        reader: its name.
        seeds: of the attempts, one after the other.
        failures: folder for the inputs of attempts that went wrong.
        limits: for each attempt.
        readers: module with the table of readers.
        ended: called after each attempt.
    """
    tally, first = Tally(reader), seeds.start
    while first < seeds.stop:
        with tempfile.TemporaryDirectory() as folder:
            worker = _Worker([readers, reader, first, seeds.stop, folder, failures, limits.seconds, limits.bytes])
            for seed, verdict in worker.verdicts(limits):
                tally.add(seed, verdict)
                ended(seed, verdict)
                first = seed + 1
                if verdict.kind in (CRASH, SLOW):
                    _keep(Path(folder) / "input", failures / f"{reader}-{seed}")
    return tally


def _keep(changed: Path, target: Path) -> None:
    """Save the input at which a process ended; one that only took long is saved already."""
    if not target.exists() and changed.exists():
        shutil.copytree(changed, target, symlinks=True)


class _Worker:
    """A process that makes attempts."""

    def __init__(self, arguments: list[Any]) -> None:
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed where it is read)
        paths = os.pathsep.join((str(ROOT), str(SUPPORT), os.environ.get("PYTHONPATH", "")))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.fuzz.worker", *map(str, arguments)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": paths.rstrip(os.pathsep), "MALLOC_ARENA_MAX": "2"},
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )
        self.lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put(ENDED)

    def verdicts(self, limits: Limits) -> Iterator[tuple[int, Verdict]]:
        """Yield seeds and verdicts; the last one says why the process ended, if an attempt did that."""
        began, silent, patience = None, False, START
        try:
            while (line := self._line(patience)) != ENDED:
                if line is None:
                    silent = True
                    break
                content = json.loads(line)
                patience = limits.seconds + MARGIN
                if "began" in content:
                    began = content["began"]
                else:
                    yield content.pop("ended"), Verdict(**content)
                    began = None
        finally:
            code = self._end(silent)
        said = self._said()
        if began is not None:
            slow = silent or "Timeout (" in said
            reason = f"it took more than {limits.seconds:g} s" if slow else f"the process ended with {code}"
            yield began, Verdict(SLOW if slow else CRASH, f"{reason}. {said[-3000:]}", _top(said), limits.seconds)
        elif code:
            raise RuntimeError(f"the process of the attempts ended with {code}: {said[-3000:]}")

    def _line(self, patience: float) -> str | None:
        """The next line; :data:`ENDED` after the last one, None where none comes."""
        try:
            return self.lines.get(timeout=patience)
        except queue.Empty:
            return None

    def _end(self, silent: bool) -> int:
        """End the process, which may need a moment to end itself; return its exit code."""
        if not silent:
            with suppress(subprocess.TimeoutExpired):
                return self.process.wait(MARGIN)
        self.process.kill()
        return self.process.wait()

    def _said(self) -> str:
        with self.errors:
            self.errors.seek(0)
            return self.errors.read().decode(errors="replace")


def _top(said: str) -> str:
    """The innermost frame of the traceback that a process wrote when it ended."""
    frames = [line.strip() for line in said.splitlines() if line.startswith("  File ")]
    return frames[0] if frames else ""
