"""The surveys that there are: :data:`REWRITES` and :func:`generation_survey`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

from madtp.survey.examination import examine
from madtp.survey.generation import GenerationRecord, examine_generation
from madtp.survey.record import Record
from madtp.survey.source import Source

AnyRecord = TypeVar("AnyRecord", Record, GenerationRecord)


@dataclass(frozen=True)
class Survey(Generic[AnyRecord]):
    """What is found out about each architecture.

    Attributes:
        name: of the survey, in its files.
        record: class of its records.
        examine: makes the record of a name.
    """

    name: str
    record: type[AnyRecord]
    examine: Callable[[str, Source], AnyRecord]


REWRITES = Survey("rewrites", Record, examine)


def generation_survey(tokens: int) -> Survey[GenerationRecord]:
    """The survey of what models write, with so many new tokens behind each prompt."""
    return Survey("generation", GenerationRecord, partial(examine_generation, tokens=tokens))
