"""Keep what a model and torch log and warn while they are traced from the user: :func:`quiet`.

Logging and warnings belong to the process. Other threads are not to be silenced, and what they set meanwhile has to stay. So
nothing is switched off: a filter is added once, and leaves out what comes from a thread that is quiet. It is never removed, as
other threads may be going through the filters.
"""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


class _QuietThreads:
    """Leaves out log records of quiet threads, and matches their warnings, as a pattern of a warning filter does."""

    pattern = "(?!)"
    """What libraries show that copy warning filters to their workers: it matches nothing."""

    def __init__(self) -> None:
        self.threads: list[int] = []

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record is to be logged."""
        return record.thread not in self.threads

    def match(self, text: str) -> bool:
        """Whether a warning comes from a quiet thread."""
        return threading.get_ident() in self.threads


QUIET_THREADS = _QuietThreads()
IGNORED = ("ignore", QUIET_THREADS, Warning, None, 0)


@contextmanager
def quiet() -> Iterator[None]:
    """Inside the block, nothing that this thread logs or warns reaches the user."""
    for handler in _handlers():
        handler.addFilter(QUIET_THREADS)
    if IGNORED not in warnings.filters:  # type: ignore[comparison-overlap]
        warnings.filters.insert(0, IGNORED)  # type: ignore[attr-defined]
    QUIET_THREADS.threads.append(threading.get_ident())
    try:
        yield
    finally:
        QUIET_THREADS.threads.remove(threading.get_ident())


def _handlers() -> list[logging.Handler]:
    """All handlers of the process, and the one that logging has where there is none."""
    loggers = [one for one in list(logging.root.manager.loggerDict.values()) if isinstance(one, logging.Logger)]
    found = [handler for logger in (logging.root, *loggers) for handler in logger.handlers]
    return [*found, *([] if logging.lastResort is None else [logging.lastResort])]
