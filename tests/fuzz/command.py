"""The command ``python -m tests.fuzz``: :func:`main`."""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from .runner import Runner, Tally
from .verdicts import ALLOWED, FAULTS, Limits, Verdict

HELP = """Change saved models, checkpoints, data sets, images and configs at random, and read them.

Each attempt takes a small valid input, changes it up to four times (bytes,
JSON values, tensors, lines, members of archives, which files there are), and
reads it. Half of the attempts also make the hashes right again that the
input holds. Attempts run in a process of their own.

Outcomes that are allowed:

  loaded     the input was read, and what was read is usable; where a hash is
             stored and not made right again, it equals the original
  refused    an error of madtp, with the model as it was

Outcomes that are faults:

  wrong      loaded although it is not what was saved, or the model is changed
             although it was refused
  exception  another exception
  slow       no outcome in the time for one attempt
  large      more memory than an attempt may take
  crash      the process ended
"""

EXAMPLES = """Examples:

  python -m tests.fuzz --list
  python -m tests.fuzz 10000
  python -m tests.fuzz 10000 --reader pth --reader torchscript --json fuzz.json
  python -m tests.fuzz 1 --reader pth --seed 4711      # repeat one attempt

Inputs at which an attempt went wrong are saved below --output, each in a
folder that holds them as they were read, and the changes in attempt.txt. The
exit code is 1 if there are any.
"""


WIDTH = 120
"""Columns of what is printed into a file."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    options = _parser().parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    runner = Runner(options.output, Limits(options.seconds, options.mebibytes << 20))
    known = runner.list_readers()
    unknown = sorted(set(options.reader or ()) - set(known))
    if options.list or unknown:
        console.print(_listed(known), *(f"there is no reader {name}" for name in unknown))
        runner.close()
        return int(bool(unknown))
    seeds = range(options.seed, options.seed + options.attempts)
    tallies = []
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        for name in options.reader or known:
            task = progress.add_task(name, total=len(seeds))

            def ended(seed: int, verdict: Verdict, name: str = name, task: object = task) -> None:
                progress.advance(task)  # type: ignore[arg-type]

            tallies.append(runner.run(name, seeds, ended))
            _print_faults(console, tallies[-1])
            if not console.is_terminal:
                console.print(f"{name}: {dict(tallies[-1].counts)}", highlight=False)
            if options.json is not None:
                options.json.write_text(json.dumps([tally.to_json() for tally in tallies], indent=1) + "\n")
    runner.close()
    console.print(_table(tallies))
    return int(any(tally.faults for tally in tallies))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz",
        description=HELP,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("attempts", type=int, nargs="?", default=1000, help="attempts of each reader (1000)")
    parser.add_argument("--reader", action="append", metavar="NAME", help="only this one; may be repeated")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the first attempt; the next have the numbers after it (0)"
    )
    parser.add_argument("--output", type=Path, default=Path("fuzz-faults"), help="folder for inputs (fuzz-faults)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for all numbers and faults")
    parser.add_argument("--seconds", type=float, default=Limits.seconds, help="time for one attempt (10)")
    parser.add_argument(
        "--mebibytes", type=int, default=Limits.bytes >> 20, help="memory that one attempt may take (1024)"
    )
    parser.add_argument("--list", action="store_true", help="list the readers and end")
    return parser


def _listed(known: dict[str, str]) -> Table:
    table = Table("reader", "reads")
    for name, about in known.items():
        table.add_row(name, about)
    return table


def _print_faults(console: Console, tally: Tally) -> None:
    """Print the faults of a reader, those of one place together."""
    alike: dict[tuple[str, str], list[tuple[int, Verdict]]] = defaultdict(list)
    for seed, verdict in tally.faults:
        alike[verdict.kind, verdict.where or verdict.message[:60]].append((seed, verdict))
    for (kind, where), found in alike.items():
        seed, verdict = found[0]
        console.print(
            f"[red]{tally.reader}: {kind}[/red], {len(found)} times, {where}", highlight=False, soft_wrap=True
        )
        console.print(f"  {verdict.message}", highlight=False, markup=False, soft_wrap=True)
        console.print(
            f"  python -m tests.fuzz 1 --reader {tally.reader} --seed {seed}", highlight=False, soft_wrap=True
        )


def _table(tallies: list[Tally]) -> Table:
    table = Table("reader", *ALLOWED, *FAULTS, "slowest", "memory", "a second")
    for column in table.columns[1:]:
        column.justify = "right"
    for tally in tallies:
        counts = [str(tally.counts[kind]) for kind in (*ALLOWED, *FAULTS)]
        rate = sum(tally.counts.values()) / max(tally.seconds, 1e-9)
        table.add_row(tally.reader, *counts, f"{tally.slowest:.2f} s", f"{tally.largest >> 20} MiB", f"{rate:.0f}")
    return table
