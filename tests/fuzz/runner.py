"""Attempts by the thousand, in processes of their own: :class:`Runner`."""

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

from .verdicts import CRASH, FAULTS, SLOW, Limits, Verdict

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


class Runner:
    """Makes the attempts of readers in a process of its own, and starts another one where an attempt ends that.

    Args:
        failures: folder for the inputs of attempts that went wrong.
        limits: for each attempt.
        readers: module with the table of readers.
    """

    def __init__(self, failures: Path, limits: Limits, readers: str = ALL_READERS) -> None:
        self.failures, self.limits, self.readers = failures, limits, readers
        self._worker: _Worker | None = None

    def list_readers(self) -> dict[str, str]:
        """Return the names of all readers, with a line about each."""
        return self._running().about

    def _running(self) -> _Worker:
        self._worker = self._worker or _Worker(self.readers)
        return self._worker

    def run(
        self, reader: str, seeds: range, ended: Callable[[int, Verdict], None] = lambda seed, verdict: None
    ) -> Tally:
        """Make attempts.

        Args:
            reader: name of the reader.
            seeds: of the attempts, one after the other.
            ended: called after each attempt.
        """
        tally, first = Tally(reader), seeds.start
        while first < seeds.stop:
            worker = self._running()
            with tempfile.TemporaryDirectory() as folder:
                job = {"reader": reader, "first": first, "stop": seeds.stop, "folder": folder}
                job |= {"failures": str(self.failures.absolute()), "limits": asdict(self.limits)}
                for seed, verdict in worker.verdicts(job, self.limits):
                    tally.add(seed, verdict)
                    ended(seed, verdict)
                    first = seed + 1
                    if verdict.kind in FAULTS:
                        _keep(Path(folder) / "input", self.failures / f"{reader}-{seed}")
            if worker.process.poll() is not None:
                self._worker = None
        return tally

    def close(self) -> None:
        """End the process."""
        if self._worker is not None:
            self._worker.end()


def _keep(changed: Path, target: Path) -> None:
    """Save the input at which a process ended; a process that goes on has saved it itself."""
    if not target.exists() and changed.exists():
        shutil.copytree(changed, target, symlinks=True)


class _Worker:
    """A process that makes attempts."""

    def __init__(self, readers: str) -> None:
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed where the process ends)
        paths = os.pathsep.join((str(ROOT), str(SUPPORT), os.environ.get("PYTHONPATH", "")))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.fuzz.worker", readers],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": paths.rstrip(os.pathsep)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )
        self.lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        first = self._line(START)
        if not first:
            raise RuntimeError(f"no process for attempts could be started: {self.end()[1][-3000:]}")
        self.about: dict[str, str] = json.loads(first)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put(ENDED)

    def verdicts(self, job: dict[str, Any], limits: Limits) -> Iterator[tuple[int, Verdict]]:
        """Yield seeds and verdicts; where an attempt ends the process, that is the last one."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        began, patience = None, START
        while (line := self._line(patience)) not in (None, ENDED):
            content = json.loads(line or "")
            patience = limits.seconds + MARGIN
            if "done" in content:
                return
            if "began" in content:
                began = content["began"]
            else:
                yield content.pop("ended"), Verdict(**content)
                began = None
        code, said = self.end()
        if began is None:
            raise RuntimeError(f"the process of the attempts ended with {code}: {said[-3000:]}")
        slow = line is None or "Timeout (" in said
        reason = f"it took more than {limits.seconds:g} s" if slow else f"the process ended with {code}"
        yield began, Verdict(SLOW if slow else CRASH, f"{reason}. {said[-3000:]}", _top(said), limits.seconds)

    def _line(self, patience: float) -> str | None:
        """The next line; :data:`ENDED` after the last one, None where none comes."""
        try:
            return self.lines.get(timeout=patience)
        except queue.Empty:
            return None

    def end(self) -> tuple[int, str]:
        """End the process, which may need a moment to end itself; return its exit code, and what it wrote."""
        assert self.process.stdin is not None
        with suppress(OSError):
            self.process.stdin.close()
        try:
            code = self.process.wait(MARGIN)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        with self.errors:
            self.errors.seek(0)
            return code, self.errors.read().decode(errors="replace")


def _top(said: str) -> str:
    """The innermost frame of the traceback that a process wrote when it ended."""
    frames = [line.strip() for line in said.splitlines() if line.startswith("  File ")]
    return frames[0] if frames else ""
