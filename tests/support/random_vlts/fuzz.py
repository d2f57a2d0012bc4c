"""Draw random models by the thousand: ``python -m random_vlts 0 2000 --workers 2`` in the folder ``tests``.

Start at :func:`main`. Prints what went wrong, with a reproduction, and ends in a table of what was rewritten and what refused,
by reason. The exit code is 1 if any result was wrong.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import madtp
from random_vlts.checks import examine, reproduction
from random_vlts.design import draw

console = Console()


@dataclass(frozen=True)
class Verdict:
    """What became of one draw. kind: "rewritten", "in part" (some blocks refused), "refused", "wrong". reasons: of refusals."""

    seed: int
    arrangement: str
    kind: str
    reasons: tuple[str, ...]
    message: str
    seconds: float


def judge(seed: int) -> Verdict:
    """Draw, rewrite and check one design."""
    torch.set_num_threads(1)
    design, started = draw(seed), time.perf_counter()
    kind, message, reasons = "rewritten", "", ()
    try:
        subject = examine(design)
        reasons = tuple(sorted(set(subject.lost().values())))
        kind = "in part" if reasons else kind
    except madtp.MadtpError as error:
        kind, message = "refused", str(error)
        reasons = (_reason(message),)
    except Exception as error:
        kind, message = "wrong", f"{type(error).__name__}: {error}\n{reproduction(design)}"
    return Verdict(seed, design.arrangement, kind, reasons, message, time.perf_counter() - started)


def _reason(message: str) -> str:
    """The first reason of an exception's message, without names of nodes."""
    first = message.partition("Refused: ")[2] or message
    return first.partition("): ")[2].partition(";")[0] or first[:120]


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="random_vlts", description=__doc__)
    parser.add_argument("first", type=int, help="first seed")
    parser.add_argument("last", type=int, help="seed to stop before")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path, help="file for all verdicts, as JSON")
    options = parser.parse_args()
    verdicts: list[Verdict] = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.workers, mp_context=context) as pool, Progress(console=console) as progress:
        task = progress.add_task("drawing", total=options.last - options.first)
        for done in as_completed([pool.submit(judge, seed) for seed in range(options.first, options.last)]):
            verdicts.append(done.result())
            progress.advance(task)
            if verdicts[-1].kind == "wrong":
                console.print(f"[red]seed {verdicts[-1].seed}[/red]: {verdicts[-1].message}", highlight=False)
            if options.out is not None:
                options.out.write_text(json.dumps([asdict(v) for v in verdicts], indent=1))
    console.print(by_arrangement(verdicts), by_reason(verdicts))
    return int(any(v.kind == "wrong" for v in verdicts))


def by_arrangement(verdicts: list[Verdict]) -> Table:
    """Counts of what became of the draws."""
    table = Table(title=f"{len(verdicts)} draws")
    for column in ("arrangement", "rewritten", "in part", "refused", "wrong"):
        table.add_column(column)
    counts = Counter((v.arrangement, v.kind) for v in verdicts)
    for name in (*sorted({v.arrangement for v in verdicts}), "all"):
        row = [sum(n for (a, k), n in counts.items() if k == kind and name in (a, "all")) for kind in _kinds()]
        table.add_row(name, *map(str, row))
    return table


def by_reason(verdicts: list[Verdict]) -> Table:
    """Draws by reason of refusal."""
    table = Table("reason", "refused", "in part", title="refusals")
    counts = Counter((reason, v.kind) for v in verdicts for reason in v.reasons)
    for reason in sorted({r for r, _ in counts}, key=lambda r: -counts[r, "refused"] - counts[r, "in part"]):
        table.add_row(reason, str(counts[reason, "refused"]), str(counts[reason, "in part"]))
    return table


def _kinds() -> tuple[str, ...]:
    return "rewritten", "in part", "refused", "wrong"
