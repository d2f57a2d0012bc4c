"""What a run prints: a progress bar on a terminal, and lines of numbers. Start at :class:`Progress`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar


@dataclass(frozen=True)
class _Throughput:
    """Counts samples a second since the last report.

    Attributes:
        sample_name: plural noun for the samples.
        samples_per_step: size of the batch of a step.
        done: steps done at the last report.
        since: time of the last report.
    """

    sample_name: str = ""
    samples_per_step: int = 0
    done: int = 0
    since: float = 0.0

    def report(self, done: int) -> tuple[str, _Throughput]:
        """Return the throughput since the last report as text, and the state for the next one."""
        now = time.perf_counter()
        rate = (done - self.done) * self.samples_per_step / max(now - self.since, 1e-9)
        return f"{rate:.0f} {self.sample_name}/s", replace(self, done=done, since=now)


class Progress:
    """Shows the numbers of a training run.

    Args:
        console: where to print; ``None`` takes the terminal.
        quiet: print nothing.
    """

    def __init__(self, console: Console | None = None, *, quiet: bool = False) -> None:
        self.console = Console(quiet=True) if quiet else console or Console()
        self._bar: Bar | None = None
        self._throughput = _Throughput()

    @contextmanager
    def running(self, start: int, steps: int, samples_per_step: int, sample_name: str) -> Iterator[None]:
        """Show a progress bar inside the block.

        Args:
            start: number of steps done before.
            steps: steps of the whole run.
            samples_per_step: size of the batch of a step.
            sample_name: plural noun for the samples.
        """
        bar = Bar(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._throughput = _Throughput(sample_name, samples_per_step, start, time.perf_counter())
        with bar:
            self._task = bar.add_task("training", total=steps, completed=start)
            self._bar = bar
            yield
        self._bar = None

    def show(self, done: int, metrics: Mapping[str, float]) -> None:
        """Print the metrics of a step and the throughput; metrics with a slash in their name are left out."""
        throughput, self._throughput = self._throughput.report(done)
        if self._bar:
            self._bar.update(self._task, completed=done)
        shown = {metric: value for metric, value in metrics.items() if "/" not in metric}
        self.console.print(f"step {done:>6}  {_numbers(shown)}  {throughput}", highlight=False)

    def show_evaluation(self, done: int, metrics: Mapping[str, float]) -> None:
        """Print the metrics of a held-out evaluation."""
        self.console.print(f"[bold]step {done:>6}  held out: {_numbers(metrics)}[/bold]", highlight=False)


def _numbers(metrics: Mapping[str, float]) -> str:
    return "  ".join(
        f"{name} {value:.3g}" if abs(value) < 1e-2 else f"{name} {value:.3f}" for name, value in metrics.items()
    )
