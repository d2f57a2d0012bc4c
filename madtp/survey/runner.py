"""Run a survey: a process for each architecture, several at a time, with limits on time and memory.

Start at :func:`run`. The caller can save each record as it arrives, so that an interrupted survey continues where it stopped.
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
from madtp.files.json_text import read_description
from madtp.survey.surveys import REWRITES, AnyRecord, Survey

FORMAT = 1


@dataclass(frozen=True)
class Limits:
    """What one architecture may use.

    Attributes:
        seconds: duration.
        memory: memory, in GiB.
    """

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
    survey: Survey[AnyRecord],
    *,
    jobs: int = 1,
    limits: Limits | None = None,
    preload: Iterable[str] = (),
    each: Callable[[AnyRecord], None] = lambda record: None,
) -> list[AnyRecord]:
    """Examine every name.

    Args:
        names: names of the models.
        source: name of the module that makes them, a :class:`~madtp.survey.source.Source`.
        survey: what is found out.
        jobs: number of processes at a time.
        limits: what one architecture may use.
        preload: modules to import once for all processes.
        each: called with every record as soon as it is available.
    """
    limits = Limits() if limits is None else limits
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["madtp.survey.worker", source, *preload])
    waiting, running, done = list(reversed(names)), list[_Job](), list[AnyRecord]()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(_start(context, waiting.pop(), source, limits, survey))
            wait([job.answer for job in running], timeout=0.5)
            for job in list(running):
                record = _collect(job, limits, survey)
                if record is not None:
                    running.remove(job)
                    done.append(record)
                    each(record)
    finally:
        for job in running:
            job.process.kill()
            job.process.join()
    return done


def _start(
    context: multiprocessing.context.ForkServerContext,
    name: str,
    source: str,
    limits: Limits,
    survey: Survey[AnyRecord],
) -> _Job:
    from madtp.survey.worker import work

    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(name, source, limits.memory, survey, sender), daemon=True)
    process.start()
    sender.close()
    return _Job(name, process, receiver, time.monotonic())


def _collect(job: _Job, limits: Limits, survey: Survey[AnyRecord]) -> AnyRecord | None:
    """The record of a finished job, or None while it runs."""
    if job.answer.poll():
        try:
            record = survey.record.from_dict(job.answer.recv())
        except EOFError:
            job.process.join()
            record = survey.record(job.name, "error", failure=f"the process ended with code {job.process.exitcode}")
    elif time.monotonic() - job.started > limits.seconds:
        job.process.kill()
        record = survey.record(
            job.name, "error", failure=f"took more than {limits.seconds:g} s", seconds=limits.seconds
        )
    else:
        return None
    job.process.join()
    job.answer.close()
    return record


def load(path: Path, survey: Survey[AnyRecord]) -> list[AnyRecord]:
    """Read the records of an earlier run; a file that does not exist holds none.

    Args:
        path: the file.
        survey: what it is to hold.

    Raises:
        DataError: if the file is not a survey.
    """
    if not path.exists():
        return []
    try:
        content = read_description(path)
        if content["format"] != FORMAT:
            raise DataError(
                f"{path} is a survey of format {content['format']}, this version reads {FORMAT}; start a new file."
            )
        found = content.get("survey", REWRITES.name)
        if found != survey.name:
            raise DataError(f"{path} is a survey of {found}, not of {survey.name}; name another file.")
        return [survey.record.from_dict(values) for values in content["records"]]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not a survey ({type(error).__name__}: {error}); name another file.") from error


def save(path: Path, records: Iterable[AnyRecord], survey: Survey[AnyRecord]) -> None:
    """Write records as JSON, completely or not at all."""
    by_name = sorted(records, key=lambda record: record.name)
    content = {"format": FORMAT, "survey": survey.name, "records": [record.to_dict() for record in by_name]}
    write_text(path, json.dumps(content, indent=1) + "\n")
