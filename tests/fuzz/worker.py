"""A process that makes attempts and writes a line of JSON for each: what it begins, then what became of it.

``runner.py`` starts it. A process of its own can be ended when it hangs, and its end is attributed to the attempt that it had
begun.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import importlib
import json
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from .changes import Attempt, drawn_attempt
from .judging import Bench
from .reading import Reader
from .verdicts import Limits

ROOM = 8 << 30
"""Bytes of addresses that an attempt may ask for: what would take all memory fails before it does."""


def attempt_of(bench: Bench, seed: int) -> Attempt:
    """The attempt with a seed, which is another one for each reader."""
    return drawn_attempt(bench.formats, f"{bench.reader.name} {seed}")


def main() -> None:
    """Say which readers there are, and do one job after the other, each a line of JSON from the standard input."""
    faulthandler.enable()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable()
    readers = importlib.import_module(sys.argv[1]).READERS
    _limit_addresses()
    lines = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no verdict
    lines.write(json.dumps({name: reader.about for name, reader in readers.items()}) + "\n")
    for job in sys.stdin:
        for said in work(readers, **json.loads(job)):
            lines.write(json.dumps(said) + "\n")


def work(
    readers: Mapping[str, Reader],
    *,
    reader: str,
    first: int,
    stop: int,
    folder: str,
    failures: str,
    limits: Mapping[str, float],
) -> Iterator[dict[str, Any]]:
    """Make the attempts with the seeds from ``first`` up to ``stop``; yield what they begin and how they end."""
    of_each = Limits(**limits)
    bench = Bench(readers[reader], Path(folder), of_each)
    for seed in range(first, stop):
        yield {"began": seed}
        attempt = attempt_of(bench, seed)
        faulthandler.dump_traceback_later(of_each.seconds, exit=True)
        verdict = bench.judge(attempt)
        faulthandler.cancel_dump_traceback_later()
        if not verdict.allowed:
            keep(bench, attempt, Path(failures) / f"{reader}-{seed}")
        yield {"ended": seed, **dataclasses.asdict(verdict)}
    yield {"done": stop}


def keep(bench: Bench, attempt: Attempt, target: Path) -> None:
    """Save a changed input, with what was changed."""
    bench.prepare(attempt)
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(bench.input, target, symlinks=True)
    (target / "attempt.txt").write_text(repr(attempt) + "\n")


def _limit_addresses() -> None:
    if sys.platform != "win32":
        import resource

        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() if _counts() else 0
        resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, resource.RLIM_INFINITY))


def _counts() -> bool:
    return Path("/proc/self/statm").is_file()


if __name__ == "__main__":
    main()
