"""``madtp survey``: rewrite many architectures and report the outcome of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Protocol, TypeVar

import typer

from madtp.cli.plugins import PluginOption, load_plugins

if TYPE_CHECKING:
    from rich.table import Table

    from madtp.survey.generation import GenerationRecord
    from madtp.survey.record import Record
    from madtp.survey.runner import Limits
    from madtp.survey.surveys import AnyRecord, Survey

ToShow = TypeVar("ToShow", "Record", "GenerationRecord", contravariant=True)

HELP = """Rewrite many architectures and report the outcome of each.

NAMES are names or shell-style patterns from `madtp survey --list`, or full
names of other models of an installed library, such as
`timm:vit_small_patch16_384`. `module:function` is a model of your own: the
function takes no arguments and returns the model, or the model and its
example inputs. `zoo:NAME` is a model of the zoo. Without NAMES, the whole
list is surveyed.

Each listed architecture is a real class of a library with a small random
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
  madtp survey my.module:build
  madtp survey --jobs 4 --json survey.json --markdown coverage.md
  madtp survey --generate hf:LlavaForConditionalGeneration

With --generate, the survey is about models that write text. Each writes
behind its prompts as the dense model does, or as it does itself another way:
with other caches, a sample alone, in several turns. `--generate --markdown`
explains the checks. Outcomes are then `as it should`, `left alone`, `refused`,
`cannot generate`, `error` and `wrong`.

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
    generate: Annotated[
        bool, typer.Option("--generate", help="Compare what models write; see above.", show_default=False)
    ] = False,
    new_tokens: Annotated[int, typer.Option(min=9, help="With --generate, tokens behind each prompt.")] = 64,
    only_list: Annotated[bool, typer.Option("--list", help="Print the names and exit.")] = False,
    plugin: PluginOption = None,
) -> None:
    """Entry point of the command; see ``HELP``."""
    import zoo.small

    load_plugins(plugin)
    wanted = zoo.small.names(names or ())
    wanted = zoo.small.generating(wanted) if generate else wanted
    if only_list:
        for name in wanted:
            typer.echo(name)
        return
    from madtp.survey import generation_table, tables
    from madtp.survey.runner import Limits
    from madtp.survey.surveys import REWRITES, generation_survey

    order = Order(wanted, jobs, Limits(timeout, memory), json_file, markdown_file, note, again, tuple(plugin or ()))
    if generate:
        _run(order, generation_survey(new_tokens), generation_table)
    else:
        _run(order, REWRITES, tables)


@dataclass(frozen=True)
class Order:
    """What was asked for.

    Attributes:
        names: of the architectures.
        jobs: number of them at a time.
        limits: of one.
        json_file: file of records.
        markdown_file: file of the page.
        note: remark for the head of the page.
        again: outcomes to run again.
        plugins: modules of the user's to import in every process.
    """

    names: Sequence[str]
    jobs: int
    limits: Limits
    json_file: Path | None
    markdown_file: Path | None
    note: str
    again: str
    plugins: tuple[str, ...]


class Tables(Protocol[ToShow]):
    """What shows the records of a survey."""

    def terminal(self, records: Sequence[ToShow], /) -> Table:
        """A table for the terminal."""
        ...

    def summary(self, records: Sequence[ToShow], /) -> str:
        """A sentence."""
        ...

    def markdown(self, records: Sequence[ToShow], note: str = "", /) -> str:
        """A page."""
        ...


def _run(order: Order, survey: Survey[AnyRecord], tables: Tables[AnyRecord]) -> None:
    """Run a survey, and show and write its records."""
    from madtp.atomic_files import check_writable, write_text
    from madtp.cli.console import error_console, output_console
    from madtp.survey.runner import load

    for path in (order.json_file, order.markdown_file):
        if path is not None:
            check_writable(path)

    records = {record.name: record for record in load(order.json_file, survey)} if order.json_file else {}
    repeat = set(order.again.split(",")) if order.again else set()
    todo = [n for n in order.names if n not in records or "all" in repeat or records[n].outcome in repeat]
    _examine(todo, records, order, survey)
    shown = [records[name] for name in order.names if name in records]
    output_console.print(tables.terminal(shown))
    output_console.print(tables.summary(shown), soft_wrap=True)
    if order.markdown_file is not None:
        write_text(order.markdown_file, tables.markdown(list(records.values()), order.note))
        error_console.print(f"page written to {order.markdown_file}")
    if any(record.outcome in ("wrong", "error") for record in shown):
        raise typer.Exit(1)


def _examine(todo: Sequence[str], records: dict[str, AnyRecord], order: Order, survey: Survey[AnyRecord]) -> None:
    """Run the survey with a progress bar; ``records`` and the file grow as records arrive."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    import zoo.small
    from madtp.cli.console import error_console
    from madtp.survey.runner import run, save

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=error_console) as progress:
        task = progress.add_task("survey", total=len(todo))

        def each(record: AnyRecord) -> None:
            records[record.name] = record
            if order.json_file is not None:
                save(order.json_file, records.values(), survey)
            progress.update(task, advance=1, description=f"{record.name}: {record.outcome}")

        source, preload = zoo.small.__name__, (*zoo.small.PRELOAD, *order.plugins)
        run(todo, source, survey, jobs=order.jobs, limits=order.limits, preload=preload, each=each)
