"""Make batches in the background: :func:`prefetch`."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

T = TypeVar("T")

_POLL_SECONDS = 0.2


def prefetch(make: Callable[[int], T], start: int, stop: int, depth: int = 4) -> Iterator[T]:
    """Yield make(start), ..., make(stop - 1), made ahead by a thread, at most `depth` waiting.

    A thread and not a process: torch releases the interpreter lock while it computes, and nothing need be pickled.
    An exception of `make` is raised where its batch would have come.
    """
    ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(maxsize=depth)
    stopped = threading.Event()

    def put(entry: tuple[T | None, BaseException | None]) -> bool:
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
                entry: tuple[T | None, BaseException | None] = (make(step), None)
            except BaseException as error:  # handed to the consumer, which raises it
                put((None, error))
                return
            if not put(entry):
                return

    worker = threading.Thread(target=work, name="prefetch", daemon=True)
    worker.start()
    try:
        for _ in range(start, stop):
            value, error = ready.get()
            if error is not None:
                raise error
            yield value  # type: ignore[misc]  # without an error there is a value
    finally:
        stopped.set()
        worker.join()
