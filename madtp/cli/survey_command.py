"""`madtp survey`: rewrite many architectures and print what became of each."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from madtp.survey.record import Record

HELP = """Rewrite many architectures and say what became of each.

NAMES are names or shell-style patterns from `madtp survey --list`, or whole
names of anything else that an installed library has, such as
`timm:vit_small_patch16_384`; the whole list when left out. Each is a real
class of a library with a small random configuration, built offline. It is
rewritten in a process of its own, within limits of time and memory, and then
measured: the error with pruning off, the error of a sample alone against
itself in a batch, the compute that strong pruning saves, whether it trains.

[bold]Outcomes[/bold], from best to worst

  rewritten       every stream is pruned, compute is saved, all checks hold
  partly          a stream or training is refused, or nothing is saved
  left alone      nothing is, by policy: text that a language model predicts
  refused         nothing is; the reason is in the JSON and the markdown
  no transformer  no attention over tokens, so refusing is right
  unbuildable     no small model, or no inputs for it, could be made
  error           an exception that is no refusal, or a limit was hit: a bug
  wrong           a check fails: the worst

[bold]Examples[/bold]

  madtp survey --list '*clip*'
  madtp survey 'hf:CLIP*' hf:ViltModel
  madtp survey --jobs 4 --json survey.json --markdown coverage.md

A survey with --json can be interrupted and goes on where it stopped; names
that are in the file already are not run again, unless --again says so.
Ends with code 1 if anything is wrong or in error.
"""


def survey_command(
    names: Annotated[list[str] | None, typer.Argument(help="Names or patterns.", show_default=False)] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Architectures at a time.")] = 1,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds that one may take.")] = 300.0,
    memory: Annotated[float, typer.Option(min=1, help="GiB of memory that one may take.")] = 8.0,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="File of records, read and extended.", show_default=False)
    ] = None,
    markdown_file: Annotated[
        Path | None, typer.Option("--markdown", help="Also write a page with the table.", show_default=False)
    ] = None,
    note: Annotated[str, typer.Option(help="A remark for the head of the page, such as versions and date.")] = "",
    again: Annotated[
        str, typer.Option(help="Run these outcomes of the file again, as in 'error,wrong'; 'all' for everything.")
    ] = "",
    only_list: Annotated[bool, typer.Option("--list", help="Print the names and leave.")] = False,
) -> None:
    """Entry point of the command; see HELP."""
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
    _run(todo, records, jobs, Limits(timeout, memory), json_file)
    shown = [records[name] for name in wanted if name in records]
    output_console.print(terminal(shown))
    output_console.print(summary(shown), soft_wrap=True)
    if markdown_file is not None:
        markdown_file.parent.mkdir(parents=True, exist_ok=True)
        markdown_file.write_text(markdown(list(records.values()), note), encoding="utf-8")
        error_console.print(f"page written to {markdown_file}")
    if any(record.outcome in ("wrong", "error") for record in shown):
        raise typer.Exit(1)


def _run(todo: list[str], records: dict[str, Record], jobs: int, limits: object, json_file: Path | None) -> None:
    """Run what is to do with a progress bar; `records` and the file grow as answers come."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    import zoo.small
    from madtp.cli.console import error_console
    from madtp.survey.runner import Limits, run, save

    assert isinstance(limits, Limits)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=error_console) as progress:
        task = progress.add_task("survey", total=len(todo))

        def each(record: Record) -> None:
            records[record.name] = record
            if json_file is not None:
                save(json_file, records.values())
            progress.update(task, advance=1, description=f"{record.name}: {record.outcome}")

        run(todo, zoo.small.__name__, jobs=jobs, limits=limits, preload=zoo.small.PRELOAD, each=each)
