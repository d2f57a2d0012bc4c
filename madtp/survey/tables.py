"""What a survey found, in words: a summary with its denominator, reasons by frequency, and a row for each architecture.

:func:`markdown` makes the page that docs/coverage.md holds, :func:`terminal` the table of the command.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from madtp.survey.record import IDENTITY, INDEPENDENCE, OUTCOMES, TRAITS, Record

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = (
    "architecture",
    "outcome",
    "capture",
    "blocks",
    "sites",
    "streams",
    "identity",
    "alone",
    "MACs saved",
    "trains",
    "s",
)
LONGEST = 160
# Kinds that are left out of the denominator, one after the other.
WITHOUT = (
    (frozenset({"language"}), "that are more than a language model"),
    (frozenset({"windows", "hierarchy"}), "whose attention runs over all tokens at one resolution"),
)
LEGEND = f"""*streams*: pruned of found; *identity*: largest error with pruning off, relative to the output's scale (limit
{IDENTITY:g}; in double precision where the original's own rounding is larger); *alone*: of a sample by itself against itself in
a batch, pruning strongly (limit {INDEPENDENCE:g}; in double precision where single precision leaves scores tied); *s*: seconds
of everything, on a shared machine. The models are about a twelfth as wide as real ones, and rewritten with as many fewer
alignment tokens."""


def counted(records: Iterable[Record]) -> list[Record]:
    """The denominator: architectures that could be built and hold attention."""
    return [r for r in records if r.outcome not in ("unbuildable", "no transformer")]


def row(record: Record) -> tuple[str, ...]:
    """The record in the order of :data:`COLUMNS`."""
    return (
        record.name,
        record.outcome,
        record.capture,
        ", ".join(f"{count} {kind}" for kind, count in record.blocks.items()),
        str(record.sites) if record.blocks else "",
        f"{record.pruned}/{record.streams}" if record.blocks else "",
        _error(record.identity),
        _error(record.independence),
        "" if record.reduction is None else f"{record.reduction:.0%}",
        {True: "yes", False: "no", None: ""}[record.trains],
        f"{record.seconds:.0f}",
    )


def reasons(records: Iterable[Record]) -> list[tuple[str, list[str]]]:
    """Why something is left alone or fails, most frequent first, with the architectures that it meets."""
    found: dict[str, list[str]] = defaultdict(list)
    for record in records:
        texts = [refusal.reason for refusal in record.refusals] + ([record.failure] if record.failure else [])
        for text in dict.fromkeys(general(text) for text in texts):
            found[text].append(record.name)
    return sorted(found.items(), key=lambda item: (-len(item[1]), item[0]))


def general(text: str) -> str:
    """A reason without what differs from model to model: class and node names, numbers, quotations."""
    text = re.split(r" Remove data-dependent| what would help:|; pass such a model", " ".join(text.split()))[0]
    text = re.sub(r"\b[A-Z]\w+ (runs on the example inputs|is built in a way)", r"the model \1", text)
    text = re.sub(r"found in \w+", "found", text)
    text = re.sub(r"\S+ \(node \w+\)", "a block", text)
    text = re.sub(r"'[^']*'", "'...'", text)
    text = re.sub(r"\d+(\.\d+)?(e[+-]?\d+)?", "n", text)
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."


def summary(records: Sequence[Record]) -> str:
    """One sentence with the numbers that matter."""
    outcomes = Counter(record.outcome for record in records)
    base = counted(records)
    listed = ", ".join(f"{outcomes[name]} {name}" for name in OUTCOMES if outcomes[name])
    return (
        f"{len(records)} architectures: {listed}. Rewritten, with every invariant that was measured holding, are "
        f"{', and '.join(f'{_share(kept)} {of}' for of, kept in _denominators(base))}."
    )


def _denominators(base: Sequence[Record]) -> list[tuple[str, list[Record]]]:
    """What the rewritten ones are a share of: all, and fewer and fewer kinds where records tell them apart."""
    found = [("that could be built and hold attention", list(base))]
    for lacking, words in WITHOUT:
        kept = [r for r in found[-1][1] if not lacking & set(r.traits or ())]
        if len(kept) < len(found[-1][1]):
            found.append((words, kept))
    return found


def _share(records: Sequence[Record]) -> str:
    done = sum(record.outcome == "rewritten" for record in records)
    return f"{done} of the {len(records)} ({done / len(records) if records else 0:.0%})"


def terminal(records: Sequence[Record]) -> Table:
    """A table for the terminal, a row for each architecture."""
    from rich.table import Table

    colours = {"rewritten": "green", "partly": "yellow", "wrong": "bold red", "error": "red"}
    table = Table(*COLUMNS, box=None, pad_edge=False, header_style="bold")
    for record in records:
        table.add_row(*row(record), style=colours.get(record.outcome, "dim"))
    return table


def markdown(records: Sequence[Record], note: str = "") -> str:
    """The page: summary, meaning of the outcomes, reasons, and the table."""
    records = sorted(records, key=lambda record: record.name)
    lines = ["# Coverage", "", summary(records), ""]
    lines += [note, ""] if note else []
    lines += ["| outcome | architectures | meaning |", "|---|---|---|"]
    outcomes = Counter(record.outcome for record in records)
    lines += [f"| {name} | {outcomes[name]} | {meaning} |" for name, meaning in OUTCOMES.items()]
    lines += ["", LEGEND]
    if any(record.traits is not None for record in records):
        lines += ["", "| kind | architectures | how it is told |", "|---|---|---|"]
        kinds = Counter(trait for record in records for trait in record.traits or ())
        lines += [f"| {name} | {kinds[name]} | {meaning} |" for name, meaning in TRAITS.items()]
    lines += ["", "## Every architecture", "", _row(COLUMNS), "|" + "---|" * len(COLUMNS)]
    lines += [_row(row(record)) for record in records]
    lines += ["", "## Reasons", "", "| architectures | reason | for example |", "|---|---|---|"]
    lines += [_row((str(len(names)), _escape(text), ", ".join(names[:3]))) for text, names in reasons(records)]
    return "\n".join(lines) + "\n"


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def _error(value: float | None) -> str:
    return "" if value is None else "0" if value == 0 else f"{value:.0e}"
