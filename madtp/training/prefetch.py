"""Make batches in the background: :func:`prefetch`."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")

_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class _Made(Generic[T]):
    value: T


@dataclass(frozen=True)
class _Failed:
    error: BaseException


def prefetch(make: Callable[[int], T], start: int, stop: int, depth: int = 4) -> Iterator[T]:
    """Yield ``make(start), ..., make(stop - 1)``, computed ahead by a thread.

    A thread and not a process: torch releases the interpreter lock while it computes, and nothing has to be pickled.
    An exception of ``make`` is raised in place of its batch.

    Args:
        make: makes the batch of a step.
        start: first step.
        stop: step to stop before.
        depth: number of batches that wait at most.
    """
    ready: queue.Queue[_Made[T] | _Failed] = queue.Queue(maxsize=depth)
    stopped = threading.Event()

    def put(entry: _Made[T] | _Failed) -> bool:
        while not stopped.is_set():
            try:
                ready.put(entry, timeout=_POLL_SECONDS)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        for step in range(start, stop):
            try:
                entry = _Made(make(step))
            except BaseException as error:  # the consumer raises it
                put(_Failed(error))
                return
            if not put(entry):
                return

    worker = threading.Thread(target=work, name="prefetch", daemon=True)
    worker.start()
    try:
        for _ in range(start, stop):
            entry = ready.get()
            if isinstance(entry, _Failed):
                raise entry.error
            yield entry.value
    finally:
        stopped.set()
        worker.join()
