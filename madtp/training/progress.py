"""What a run shows while it lasts: a bar on a terminal, a line every so often elsewhere. :class:`Progress`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar


class Progress:
    """Shows numbers of a training run.

    Args:
        console: where to print; None takes the terminal.
        quiet: print nothing.
    """

    def __init__(self, console: Console | None = None, *, quiet: bool = False) -> None:
        self.console = Console(quiet=True) if quiet else console or Console()
        self._bar: Bar | None = None
        self._rate = "", 0, 0, 0.0

    @contextmanager
    def running(self, start: int, steps: int, samples_per_step: int, sample_name: str) -> Iterator[None]:
        """Show the bar while the body runs."""
        bar = Bar(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._rate = sample_name, samples_per_step, start, time.perf_counter()
        with bar:
            self._task = bar.add_task("training", total=steps, completed=start)
            self._bar = bar
            yield
        self._bar = None

    def show(self, done: int, metrics: Mapping[str, float]) -> None:
        """Show the metrics of a step but those with a slash in their name, and how fast samples passed since the last."""
        name, samples, before, since = self._rate
        now = time.perf_counter()
        rate = (done - before) * samples / max(now - since, 1e-9)
        self._rate = name, samples, done, now
        if self._bar:
            self._bar.update(self._task, completed=done)
        shown = {metric: value for metric, value in metrics.items() if "/" not in metric}
        self.console.print(f"step {done:>6}  {_numbers(shown)}  {rate:.0f} {name}/s", highlight=False)

    def show_evaluation(self, done: int, metrics: Mapping[str, float]) -> None:
        """Show a held-out evaluation."""
        self.console.print(f"[bold]step {done:>6}  held out: {_numbers(metrics)}[/bold]", highlight=False)


def _numbers(metrics: Mapping[str, float]) -> str:
    return "  ".join(
        f"{name} {value:.3g}" if abs(value) < 1e-2 else f"{name} {value:.3f}" for name, value in metrics.items()
    )
