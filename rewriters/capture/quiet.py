"""Keep what a model and torch log and warn while they are traced from the user: :func:`quiet`.

Logging and warnings belong to the process. Other threads are not to be silenced, and what they set meanwhile has to stay. So
nothing is switched off: what comes from this thread is filtered out.
"""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


class _FromThread:
    """Filters out log records of one thread, and matches, as a pattern of a warning filter does, while that thread runs."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record is to be logged."""
        return record.thread != self.thread

    def match(self, text: str) -> bool:
        """Whether a warning is one of this thread."""
        return threading.get_ident() == self.thread


@contextmanager
def quiet() -> Iterator[None]:
    """Inside the block, nothing that this thread logs or warns reaches the user."""
    own = _FromThread()
    handlers = _handlers()
    for handler in handlers:
        handler.addFilter(own)
    entry = ("ignore", own, Warning, None, 0)
    warnings.filters.insert(0, entry)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(own)
        if entry in warnings.filters:  # type: ignore[comparison-overlap]
            warnings.filters.remove(entry)  # type: ignore[attr-defined]


def _handlers() -> list[logging.Handler]:
    """All handlers of the process, and the one that logging has where there is none."""
    loggers = [one for one in list(logging.root.manager.loggerDict.values()) if isinstance(one, logging.Logger)]
    found = [handler for logger in (logging.root, *loggers) for handler in logger.handlers]
    return [*found, *([] if logging.lastResort is None else [logging.lastResort])]
