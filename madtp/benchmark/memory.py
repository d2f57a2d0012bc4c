"""Peak memory of a call: :func:`peak_memory`.

The profiler of torch reports every allocation of a tensor with its size and time, so the peak is exact, and the same on a busy
machine. Memory that an operation takes from the system by itself is not among them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile


def peak_memory(call: Callable[[], object]) -> int:
    """Return the largest number of bytes that tensors made by ``call`` held at a time; those from before do not count."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it writes to stderr else
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        output = call()
    del output
    inner: Any = profiler.profiler
    events = [event for event in inner.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
