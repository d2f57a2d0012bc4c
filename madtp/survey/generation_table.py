"""The survey of what models write, in words: :func:`terminal` for the command, :func:`markdown` for a page of the docs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from madtp.survey.generation import CHECKS, OUTCOMES, GenerationRecord
from madtp.survey.tables import escaped, table_line

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = ("architecture", "outcome", "sites", *CHECKS, "cache", "s")
SIGNS = {"same": "yes", "differs": "**no**", "not taken": "", "dense differs": "-", "fails": "**fails**"}
LEGEND = """*yes*: the check holds. Empty: the dense model does not take such a call, or no image is pruned. *-*: the dense
model does not agree with itself there. *cache*: bytes that the cache of the strongly pruned prompts takes, of those of an
unpruned one; empty where no program fills a cache. *s*: seconds in total, on a shared machine."""


def table_row(record: GenerationRecord) -> tuple[str, ...]:
    """Return the cells of a record in the order of :data:`COLUMNS`."""
    return (
        record.name,
        record.outcome,
        str(record.sites) if record.sites else "",
        *(SIGNS[record.checks[name]] if name in record.checks else "" for name in CHECKS),
        "" if record.cache is None else f"{record.cache:.0%}",
        f"{record.seconds:.0f}",
    )


def summary(records: Sequence[GenerationRecord]) -> str:
    """Return the numbers that matter in a sentence."""
    outcomes = Counter(record.outcome for record in records)
    listed = ", ".join(f"{outcomes[name]} {name}" for name in OUTCOMES if outcomes[name])
    tokens = sorted({record.tokens for record in records})
    return f"{len(records)} architectures, {' or '.join(map(str, tokens))} new tokens: {listed}."


def terminal(records: Sequence[GenerationRecord]) -> Table:
    """Return a table for the terminal, with a row for each architecture."""
    from rich.table import Table

    colours = {"as it should": "green", "wrong": "bold red", "error": "red"}
    table = Table(*COLUMNS, box=None, pad_edge=False, header_style="bold")
    for record in records:
        table.add_row(*(cell.strip("*") for cell in table_row(record)), style=colours.get(record.outcome, "dim"))
    return table


def markdown(records: Sequence[GenerationRecord], note: str = "") -> str:
    """Return the page: summary, what is checked, table, and what went wrong or was not done."""
    records = sorted(records, key=lambda record: record.name)
    outcomes = Counter(record.outcome for record in records)
    lines = ["# What pruned models write", "", summary(records), ""]
    lines += [note, ""] if note else []
    lines += ["| outcome | architectures | meaning |", "|---|---|---|"]
    lines += [table_line((name, str(outcomes[name]), meaning)) for name, meaning in OUTCOMES.items()]
    lines += ["", "| check | it holds if it is |", "|---|---|"]
    lines += [table_line((name, check.meaning)) for name, check in CHECKS.items()]
    lines += ["", LEGEND, "", "## Every architecture", "", table_line(COLUMNS), "|" + "---|" * len(COLUMNS)]
    lines += [table_line(table_row(record)) for record in records]
    said = [(record.name, escaped(record.failure)) for record in records if record.failure]
    if said:
        lines += ["", "## Reasons", "", "| architecture | reason |", "|---|---|", *map(table_line, said)]
    return "\n".join(lines) + "\n"
