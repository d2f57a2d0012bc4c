"""``madtp survey``: rewrite many architectures and report the outcome of each."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from madtp.survey.record import Record
    from madtp.survey.runner import Limits

HELP = """Rewrite many architectures and report the outcome of each.

NAMES are names or shell-style patterns from `madtp survey --list`, or full
names of other models of an installed library, such as
`timm:vit_small_patch16_384`. Without NAMES, the whole list is surveyed.

Each architecture is a real class of a library with a small random
configuration, built offline. It is rewritten in a process of its own, within
limits on time and memory. Then the survey measures the error with pruning
off, the error of a sample alone against itself in a batch, the compute that
strong pruning saves, and whether the model trains.

[bold]Outcomes[/bold], from best to worst

  rewritten       every stream is pruned, compute is saved, all checks hold
  partly          a stream or training is refused, or no compute is saved
  left alone      nothing is pruned, by policy: predicted text
  refused         nothing can be pruned; JSON and markdown hold the reason
  no transformer  no attention over tokens, so refusing is correct
  unbuildable     the small model or its inputs cannot be built
  error           an exception that is not a refusal, or a limit: a bug
  wrong           a check fails: the worst outcome

[bold]Examples[/bold]

  madtp survey --list '*clip*'
  madtp survey 'hf:CLIP*' hf:ViltModel
  madtp survey --jobs 4 --json survey.json --markdown coverage.md

With --json, an interrupted survey continues where it stopped: names in the
file are not run again, unless --again says so. The exit code is 1 if any
outcome is wrong or error.
"""


def survey_command(
    names: Annotated[list[str] | None, typer.Argument(help="Names or patterns.", show_default=False)] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Number of architectures at a time.")] = 1,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds for one architecture.")] = 300.0,
    memory: Annotated[float, typer.Option(min=1, help="GiB of memory for one architecture.")] = 8.0,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="File of records to read and extend.", show_default=False)
    ] = None,
    markdown_file: Annotated[
        Path | None, typer.Option("--markdown", help="Also write a page with the table.", show_default=False)
    ] = None,
    note: Annotated[str, typer.Option(help="Remark for the head of the page, such as versions and date.")] = "",
    again: Annotated[
        str, typer.Option(help="Outcomes of the file to run again, such as 'error,wrong', or 'all'.")
    ] = "",
    only_list: Annotated[bool, typer.Option("--list", help="Print the names and exit.")] = False,
) -> None:
    """Entry point of the command; see ``HELP``."""
    import zoo.small
    from madtp.cli.console import error_console, output_console
    from madtp.survey.runner import Limits, load
    from madtp.survey.tables import markdown, summary, terminal

    wanted = zoo.small.names(names or ())
    if only_list:
        for name in wanted:
            typer.echo(name)
        return
    records = {record.name: record for record in load(json_file)} if json_file else {}
    repeat = set(again.split(",")) if again else set()
    todo = [n for n in wanted if n not in records or "all" in repeat or records[n].outcome in repeat]
    _run(todo, records, jobs=jobs, limits=Limits(timeout, memory), json_file=json_file)
    shown = [records[name] for name in wanted if name in records]
    output_console.print(terminal(shown))
    output_console.print(summary(shown), soft_wrap=True)
    if markdown_file is not None:
        markdown_file.parent.mkdir(parents=True, exist_ok=True)
        markdown_file.write_text(markdown(list(records.values()), note), encoding="utf-8")
        error_console.print(f"page written to {markdown_file}")
    if any(record.outcome in ("wrong", "error") for record in shown):
        raise typer.Exit(1)


def _run(todo: list[str], records: dict[str, Record], *, jobs: int, limits: Limits, json_file: Path | None) -> None:
    """Run the survey with a progress bar; ``records`` and the file grow as records arrive."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    import zoo.small
    from madtp.cli.console import error_console
    from madtp.survey.runner import run, save

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=error_console) as progress:
        task = progress.add_task("survey", total=len(todo))

        def each(record: Record) -> None:
            records[record.name] = record
            if json_file is not None:
                save(json_file, records.values())
            progress.update(task, advance=1, description=f"{record.name}: {record.outcome}")

        run(todo, zoo.small.__name__, jobs=jobs, limits=limits, preload=zoo.small.PRELOAD, each=each)
