"""A line on the terminal that says what takes long: :func:`progress_line`, and :func:`stage` inside it."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TextIO

PATIENCE = 3.0
"""Seconds after which the line appears."""
PAUSE = 0.5
"""Seconds between two updates."""


class _Line:
    """Writes what is being done, from a thread of its own, until it is told to stop."""

    def __init__(self, what: str, stream: TextIO) -> None:
        self.what, self.stage, self.stream = what, "", stream
        self._started, self._done = time.perf_counter(), threading.Event()
        self._thread = threading.Thread(target=self._write, name="madtp progress", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Wipe the line."""
        self._done.set()
        self._thread.join()

    def _write(self) -> None:
        if self._done.wait(PATIENCE):
            return
        while True:
            seconds = time.perf_counter() - self._started
            self.stream.write(f"\r\033[K{self.what}: {self.stage} ({seconds:.0f} s)")
            self.stream.flush()
            if self._done.wait(PAUSE):
                break
        self.stream.write("\r\033[K")
        self.stream.flush()


_LINE: ContextVar[_Line | None] = ContextVar("progress line", default=None)


@contextmanager
def progress_line(what: str, stream: TextIO | None = None) -> Iterator[None]:
    """Inside the block, show a line on a terminal once it takes more than :data:`PATIENCE` seconds.

    Args:
        what: what is being done.
        stream: where to write; None takes standard error. Nothing is written to what is no terminal.
    """
    stream = sys.stderr if stream is None else stream
    if stream is None or not stream.isatty() or _LINE.get() is not None:
        yield
        return
    line = _Line(what, stream)
    before = _LINE.set(line)
    try:
        yield
    finally:
        _LINE.reset(before)
        line.stop()


def stage(text: str) -> None:
    """Say on the line that is shown, if there is one, what is done now."""
    line = _LINE.get()
    if line is not None:
        line.stage = text
