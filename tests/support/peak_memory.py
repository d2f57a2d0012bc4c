"""How much memory this process has taken at most."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path


def peak_bytes() -> int:
    """The largest resident size so far; 0 where the system does not say."""
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


def restart_peak() -> None:
    """Let :func:`peak_bytes` start anew from what is taken now, where the system can do that."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
