"""Examine one architecture in a process of its own: :func:`work`.

The fork server imports this module once, so that every new process starts with torch in memory.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import resource
import sys
import warnings
from multiprocessing.connection import Connection
from typing import cast

import torch

import madtp
from madtp.survey.source import Source
from madtp.survey.surveys import AnyRecord, Survey

GIBI = 2**30


def work(name: str, source: str, memory: float, survey: Survey[AnyRecord], answer: Connection) -> None:
    """Examine one model and send its record.

    Args:
        name: name of the model.
        source: name of the module that makes it, a :class:`~madtp.survey.source.Source`.
        memory: limit on memory, in GiB.
        survey: what is found out about it.
        answer: where to send the record.
    """
    limit = int(memory * GIBI)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with open(os.devnull, "w") as unread, contextlib.redirect_stdout(unread), contextlib.redirect_stderr(unread):
        os.dup2(unread.fileno(), sys.__stderr__.fileno() if sys.__stderr__ else 2)
        try:
            record = survey.examine(name, cast(Source, importlib.import_module(source)))
        except MemoryError:
            record = survey.record(name, "error", failure=f"needs more than {memory:g} GiB of memory")
        except BaseException as error:  # whatever ends the process belongs in the record
            record = survey.record(name, "error", failure=f"{type(error).__name__}: {error}")
    answer.send(record.to_dict())
    answer.close()


__all__ = ["madtp", "work"]
