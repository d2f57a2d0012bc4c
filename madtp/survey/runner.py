"""Run a survey: a process for each architecture, several at a time, with limits of time and memory, and resumable.

Start at :func:`run`. Records are written as they come, so an interrupted survey goes on where it stopped.
"""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from madtp.atomic_files import write_text
from madtp.errors import DataError
from madtp.survey.record import Record

FORMAT = 1


@dataclass(frozen=True)
class Limits:
    """What one architecture may take: seconds, and GiB of memory."""

    seconds: float = 300.0
    memory: float = 8.0


@dataclass
class _Job:
    name: str
    process: ForkServerProcess
    answer: Connection
    started: float


def run(
    names: Sequence[str],
    source: str,
    *,
    jobs: int = 1,
    limits: Limits | None = None,
    preload: Iterable[str] = (),
    each: Callable[[Record], None] = lambda record: None,
) -> list[Record]:
    """Examine every name, `jobs` at a time; `each` is called with a record as soon as it is there.

    Args:
        source: module whose `build(name)` returns a model and example inputs.
        preload: modules to import once for all processes.
    """
    limits = Limits() if limits is None else limits
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["madtp.survey.worker", source, *preload])
    waiting, running, done = list(reversed(names)), list[_Job](), list[Record]()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(_start(context, waiting.pop(), source, limits))
            wait([job.answer for job in running], timeout=0.5)
            for job in list(running):
                record = _collect(job, limits)
                if record is not None:
                    running.remove(job)
                    done.append(record)
                    each(record)
    finally:
        for job in running:
            job.process.kill()
            job.process.join()
    return done


def _start(context: multiprocessing.context.ForkServerContext, name: str, source: str, limits: Limits) -> _Job:
    from madtp.survey.worker import work

    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(name, source, limits.memory, sender), daemon=True)
    process.start()
    sender.close()
    return _Job(name, process, receiver, time.monotonic())


def _collect(job: _Job, limits: Limits) -> Record | None:
    """The record of a finished job, or None while it runs."""
    if job.answer.poll():
        try:
            record = Record.from_dict(job.answer.recv())
        except EOFError:
            job.process.join()
            record = Record(job.name, "error", failure=f"the process ended with code {job.process.exitcode}")
    elif time.monotonic() - job.started > limits.seconds:
        job.process.kill()
        record = Record(job.name, "error", failure=f"took more than {limits.seconds:g} s", seconds=limits.seconds)
    else:
        return None
    job.process.join()
    job.answer.close()
    return record


def load(path: Path) -> list[Record]:
    """The records of an earlier run; none where the file is not there.

    Raises:
        DataError: the file is no survey.
    """
    if not path.exists():
        return []
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise DataError(
                f"{path} is a survey of format {content['format']}, this version reads {FORMAT}; start afresh."
            )
        return [Record.from_dict(values) for values in content["records"]]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is no survey ({type(error).__name__}: {error}); give another file.") from error


def save(path: Path, records: Iterable[Record]) -> None:
    """Write records as JSON, whole or not at all."""
    content = {"format": FORMAT, "records": [record.to_dict() for record in sorted(records, key=lambda r: r.name)]}
    write_text(path, json.dumps(content, indent=1) + "\n")
