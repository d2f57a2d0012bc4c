"""How much memory this process has taken at most."""

from __future__ import annotations

import sys


def peak_bytes() -> int:
    """The largest resident size so far; 0 where the system does not say."""
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10
