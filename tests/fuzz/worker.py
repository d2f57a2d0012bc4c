"""A process that makes attempts and writes a line of JSON for each: what it begins, then what became of it.

``runner.py`` starts it. A process of its own can be ended when it hangs, and its end is attributed to the attempt that it had
begun.
"""

from __future__ import annotations

import argparse
import dataclasses
import faulthandler
import importlib
import json
import os
import shutil
import sys
import warnings
from pathlib import Path

import torch

from .changes import Attempt, drawn_attempt
from .judging import Bench, Limits

ROOM = 8 << 30
"""Bytes of addresses that an attempt may ask for: what would take all memory fails before it does."""


def attempt_of(bench: Bench, seed: int) -> Attempt:
    """The attempt with a seed, which is another one for each reader."""
    return drawn_attempt(bench.formats, f"{bench.reader.name} {seed}")


def main() -> None:
    """Make the attempts with the seeds from ``first`` up to ``last``."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("readers", "reader", "first", "last", "folder", "failures", "seconds", "bytes"):
        parser.add_argument(name)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    limits = Limits(float(options.seconds), int(options.bytes))
    bench = Bench(importlib.import_module(options.readers).READERS[options.reader], Path(options.folder), limits)
    _limit_addresses()
    lines = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no verdict
    for seed in range(int(options.first), int(options.last)):
        lines.write(json.dumps({"began": seed}) + "\n")
        attempt = attempt_of(bench, seed)
        faulthandler.dump_traceback_later(limits.seconds, exit=True)
        verdict = bench.judge(attempt)
        faulthandler.cancel_dump_traceback_later()
        if not verdict.allowed:
            keep(bench, attempt, Path(options.failures) / f"{options.reader}-{seed}")
        lines.write(json.dumps({"ended": seed, **dataclasses.asdict(verdict)}) + "\n")


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
    faulthandler.enable()
    main()
