"""The result of a survey in words: a summary with its denominators, reasons by frequency, and a row for each architecture.

:func:`markdown` writes the page docs/coverage.md, :func:`terminal` the table of the command.
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
LONGEST_REASON = 160
# Traits that narrower denominators leave out, one after the other.
NARROWER_DENOMINATORS = (
    (frozenset({"language"}), "that are more than a language model"),
    (frozenset({"windows", "hierarchy"}), "whose attention runs over all tokens at one resolution"),
)
LEGEND = f"""*streams*: streams pruned, of streams found; *identity*: largest error with pruning off, relative to the output's
scale (limit {IDENTITY:g}; in double precision where the original's own rounding is larger); *alone*: largest error of a sample
by itself against the same sample in a batch, with strong pruning (limit {INDEPENDENCE:g}; in double precision where single
precision leaves scores tied); *s*: seconds in total, on a shared machine. The models are about a twelfth as wide as real ones,
and have about a twelfth of the alignment tokens."""


def denominator(records: Iterable[Record]) -> list[Record]:
    """Return the architectures that could be built and hold attention."""
    return [r for r in records if r.outcome not in ("unbuildable", "no transformer")]


def table_row(record: Record) -> tuple[str, ...]:
    """Return the cells of a record in the order of :data:`COLUMNS`."""
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
    """Return the reasons for refusals and failures, most frequent first, with the architectures of each."""
    found: dict[str, list[str]] = defaultdict(list)
    for record in records:
        texts = [refusal.reason for refusal in record.refusals] + ([record.failure] if record.failure else [])
        for text in dict.fromkeys(generalised(text) for text in texts):
            found[text].append(record.name)
    return sorted(found.items(), key=lambda item: (-len(item[1]), item[0]))


def generalised(text: str) -> str:
    """Return a reason without what differs from model to model: class and node names, numbers, quotations."""
    text = re.split(r" Remove data-dependent| what would help:|; pass such a model", " ".join(text.split()))[0]
    text = re.sub(r"\b[A-Z]\w+ (runs on the example inputs|is built in a way)", r"the model \1", text)
    text = re.sub(r"found in \w+", "found", text)
    text = re.sub(r"\S+ \(node \w+\)", "a block", text)
    text = re.sub(r"'[^']*'", "'...'", text)
    text = re.sub(r"\d+(\.\d+)?(e[+-]?\d+)?", "n", text)
    return text if len(text) <= LONGEST_REASON else text[: LONGEST_REASON - 3] + "..."


def summary(records: Sequence[Record]) -> str:
    """Return the numbers that matter in two sentences."""
    outcomes = Counter(record.outcome for record in records)
    base = denominator(records)
    listed = ", ".join(f"{outcomes[name]} {name}" for name in OUTCOMES if outcomes[name])
    return (
        f"{len(records)} architectures: {listed}. Rewritten, with every measured invariant holding, are "
        f"{', and '.join(f'{_share(kept)} {of}' for of, kept in _denominators(base))}."
    )


def _denominators(base: Sequence[Record]) -> list[tuple[str, list[Record]]]:
    """The denominators with their names: first all, then fewer and fewer kinds where the records distinguish them."""
    found = [("that could be built and hold attention", list(base))]
    for excluded, words in NARROWER_DENOMINATORS:
        kept = [r for r in found[-1][1] if not excluded & set(r.traits or ())]
        if len(kept) < len(found[-1][1]):
            found.append((words, kept))
    return found


def _share(records: Sequence[Record]) -> str:
    done = sum(record.outcome == "rewritten" for record in records)
    return f"{done} of the {len(records)} ({done / len(records) if records else 0:.0%})"


def terminal(records: Sequence[Record]) -> Table:
    """Return a table for the terminal, with a row for each architecture."""
    from rich.table import Table

    colours = {"rewritten": "green", "partly": "yellow", "wrong": "bold red", "error": "red"}
    table = Table(*COLUMNS, box=None, pad_edge=False, header_style="bold")
    for record in records:
        table.add_row(*table_row(record), style=colours.get(record.outcome, "dim"))
    return table


def markdown(records: Sequence[Record], note: str = "") -> str:
    """Return the page: summary, meaning of the outcomes, table, and reasons."""
    records = sorted(records, key=lambda record: record.name)
    lines = ["# Coverage", "", summary(records), ""]
    lines += [note, ""] if note else []
    lines += ["| outcome | architectures | meaning |", "|---|---|---|"]
    outcomes = Counter(record.outcome for record in records)
    lines += [f"| {name} | {outcomes[name]} | {meaning} |" for name, meaning in OUTCOMES.items()]
    lines += ["", LEGEND]
    if any(record.traits is not None for record in records):
        lines += ["", "| kind | architectures | how it is recognised |", "|---|---|---|"]
        kinds = Counter(trait for record in records for trait in record.traits or ())
        lines += [f"| {name} | {kinds[name]} | {meaning} |" for name, meaning in TRAITS.items()]
    lines += ["", "## Every architecture", "", table_line(COLUMNS), "|" + "---|" * len(COLUMNS)]
    lines += [table_line(table_row(record)) for record in records]
    lines += ["", "## Reasons", "", "| architectures | reason | for example |", "|---|---|---|"]
    lines += [table_line((str(len(names)), escaped(text), ", ".join(names[:3]))) for text, names in reasons(records)]
    return "\n".join(lines) + "\n"


def table_line(cells: Iterable[str]) -> str:
    """A row of a markdown table."""
    return "| " + " | ".join(cells) + " |"


def escaped(text: str) -> str:
    """A text for a cell of a markdown table."""
    return text.replace("|", "\\|").replace("<", "&lt;")


def _error(value: float | None) -> str:
    return "" if value is None else "0" if value == 0 else f"{value:.0e}"
