"""Plot accuracy against MACs and against milliseconds, for the compressed minis and their controls.

    python benchmarks/pareto.py collect --runs runs/controls    # cards of finished runs, into benchmarks/results.json
    python benchmarks/pareto.py time --runs runs/controls       # milliseconds of their models, into the same file
    python benchmarks/pareto.py draw                            # docs/pareto.png, and the table for docs/results.md

``benchmarks/controls.py run`` writes ``runs/controls``. Results stay in the file when the runs are deleted, so that seeds can
be run one after the other. A run with the same task, control, target, steps and seed replaces the earlier one. Milliseconds
are those of a sample in a batch. All models of a task take turns in one process; the result is the median after the first
round.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import torch
from controls import CONTROLS, FREE, STATIC, TASKS, finished_runs, main_metric
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from rich.console import Console
from torch import nn

import zoo
from madtp.benchmark import median_seconds
from zoo.recipes.controls import reopen
from zoo.recipes.model_card import held_out_calls, test_task

HERE = Path(__file__).parent
RESULTS, PICTURE = HERE / "results.json", HERE.parent / "docs" / "pareto.png"
DENSE = "dense"
DATA = {
    "reasoning": "scenes",
    "questions": "scenes_questions",
    "captions": "scenes_captions",
    "retrieval": "scenes_captions",
    "retrieval-clip": "scenes_captions",
}
"""The data set of each task."""

METRIC_NAMES = {
    "accuracy": "accuracy",
    "vqa_accuracy": "VQA accuracy",
    "cider": "CIDEr",
    "recall@1": "recall@1",
}
# Okabe and Ito's colours, which colour-blind people can distinguish; related controls share a colour and differ in markers.
STYLES: dict[str, tuple[str, str]] = {
    DENSE: ("#000000", "s"),
    "madtp": ("#0072B2", "o"),
    "static-counts": ("#0072B2", "P"),
    "untaught": ("#56B4E9", "v"),
    "no-alignment": ("#56B4E9", "^"),
    "class-attention": ("#009E73", "D"),
    "merging": ("#E69F00", "p"),
    "smaller-input": ("#CC79A7", "h"),
    "random": ("#D55E00", "X"),
}


@dataclass(frozen=True)
class Result:
    """One model on held-out scenes.

    Attributes:
        task: one of ``controls.TASKS``.
        control: one of ``controls.CONTROLS``, or ``"dense"`` for the dense model.
        target: fraction of the MACs that was to be saved.
        seed: seed of the training.
        saved: fraction of the MACs that is saved.
        metric: most important metric of the test.
        score: its value.
        items: number of samples of the test.
        steps: training steps after those of the dense model.
        ms: milliseconds per sample; ``None`` if it was not measured.
        dense_ms: milliseconds per sample of the dense model in the same process.
        timed: batch, threads and rounds of the measurement.
    """

    task: str
    control: str
    target: float
    seed: int
    saved: float
    metric: str
    score: float
    items: int
    steps: int
    ms: float | None = None
    dense_ms: float | None = None
    timed: str = ""

    @property
    def key(self) -> tuple[str, float, str, int, int]:
        """What identifies a result."""
        return self.task, self.target, self.control, self.steps, self.seed

    @property
    def time_left(self) -> float | None:
        """Time per sample as a fraction of the dense model's; ``None`` if it was not measured."""
        return self.ms / self.dense_ms if self.ms and self.dense_ms else None


def read(path: Path) -> list[Result]:
    """Read the results of a file; a file that does not exist holds none."""
    return [Result(**values) for values in json.loads(path.read_text())] if path.is_file() else []


def write(path: Path, results: Iterable[Result]) -> None:
    """Write results in a fixed order; of two with the same key, the later one."""
    kept = {result.key: result for result in results}
    ordered = sorted(
        kept.values(), key=lambda r: (list(TASKS).index(r.task), r.target, _rank(r.control), r.steps, r.seed)
    )
    path.write_text("[\n" + ",\n".join(json.dumps(asdict(result)) for result in ordered) + "\n]\n")


def _rank(control: str) -> int:
    return -1 if control == DENSE else CONTROLS.index(control)


def collect(runs: Path, known: Sequence[Result]) -> list[Result]:
    """Add the results of the cards below ``runs``, and test the dense model of each task that lacks one."""
    found = list(known)
    for run in finished_runs(runs):
        metric, score = main_metric(run.card["test"])
        found.append(
            Result(
                task=run.task,
                control=run.control,
                target=run.target,
                seed=run.seed,
                saved=run.card["calibration"]["reduction"],
                metric=metric,
                score=score,
                items=run.card["test"]["items"],
                steps=run.card["training"]["steps"],
            )
        )
    for task in sorted({r.task for r in found} - {r.task for r in found if r.control == DENSE}):
        items = next(r.items for r in found if r.task == task)
        metric, score = main_metric(
            test_task(zoo.create(TASKS[task], DENSE), TASKS[task], DATA[task], items=items, seed=0)
        )
        found.append(
            Result(
                task=task,
                control=DENSE,
                target=0.0,
                seed=0,
                saved=0.0,
                metric=metric,
                score=score,
                items=items,
                steps=0,
            )
        )
    return found


def time_models(runs: Path, results: Sequence[Result], *, batch: int, rounds: int, threads: int) -> list[Result]:
    """Return the results, with milliseconds of those whose models are stored below ``runs``."""
    torch.set_num_threads(threads)
    timed = {result.key: result for result in results}
    for task in TASKS:
        stored = {r: folder for r in results if r.task == task and (folder := _folder(runs, r))}
        if not stored:
            continue
        dense = next(r for r in results if r.task == task and r.control == DENSE)
        models = {result: reopen(folder) for result, folder in stored.items()} | {dense: zoo.create(TASKS[task], DENSE)}
        (given,) = held_out_calls(TASKS[task], DATA[task], split="test", items=batch, seed=0, batch_size=batch)
        runs_of = {str(result.key): partial(_run, model, given) for result, model in models.items()}
        ms = {key: round(seconds / batch * 1e3, 3) for key, seconds in median_seconds(runs_of, rounds).items()}
        about = f"batch {batch}, {threads} CPU thread{'s' * (threads > 1)}, {rounds} rounds"
        for result in models:
            own, reference = ms[str(result.key)], ms[str(dense.key)]
            timed[result.key] = replace(result, ms=own, dense_ms=reference, timed=about)
    return list(timed.values())


def _run(model: nn.Module, given: Mapping[str, object]) -> None:
    with torch.inference_mode():
        model(**given)


def _folder(runs: Path, result: Result) -> Path | None:
    """The folder of the model of a result.

    ``None`` for the dense model and for fixed counts, and where the model is not stored or was trained for other steps.
    """
    if result.control in (DENSE, STATIC):
        return None
    folder = runs / result.task / f"{100 * result.target:.0f}" / f"{result.control}-{result.seed}" / "pruned"
    card = folder / "card.json"
    stored = card.is_file() and json.loads(card.read_text())["training"]["steps"] == result.steps
    return folder if stored else None


def table(results: Sequence[Result]) -> str:
    """Return a markdown table: a row for each task, target and control, with mean and standard deviation over seeds."""
    rows = [
        "| task | control | MACs saved | metric | | seeds | steps | ms, ratio to dense |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for group in _groups(results):
        first, count = group[0], len(group)
        ratios = [r.time_left for r in group if r.time_left is not None]
        cells = (
            first.task,
            first.control + (f" at −{first.target:.0%}" if first.target else ""),
            f"{statistics.mean(r.saved for r in group):.1%}" if first.target else "",
            METRIC_NAMES[first.metric],
            _score(first.metric, [r.score for r in group]),
            "" if first.control == DENSE else str(count),
            "" if first.control == DENSE else str(first.steps),
            f"{statistics.mean(ratios):.2f}" if ratios else "",
        )
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _groups(results: Sequence[Result]) -> list[list[Result]]:
    """Groups of results that differ only in their seeds, in the order of the file."""
    groups: dict[tuple[str, float, str, int], list[Result]] = {}
    for result in results:
        groups.setdefault((result.task, result.target, result.control, result.steps), []).append(result)
    return list(groups.values())


def _score(metric: str, scores: Sequence[float]) -> str:
    mean, spread = statistics.mean(scores), statistics.stdev(scores) if len(scores) > 1 else None
    if metric == "cider":
        return f"{mean:.2f}" + (f" ± {spread:.2f}" if spread is not None else "")
    return f"{mean:.2%}" + (f" ± {100 * spread:.2f}" if spread is not None else "")


def draw(results: Sequence[Result], path: Path) -> None:
    """Draw a column for each task: scores of trained models over MACs and, below, over time.

    MACs and time are fractions of the dense model's. Training-free models are left out: their scores are so low that the others
    would lie on one line.
    """
    results = [result for result in results if result.control != FREE]
    tasks = [task for task in TASKS if any(r.task == task for r in results)]
    figure, axes = plt.subplots(2, len(tasks), figsize=(3.3 * len(tasks), 6.4), squeeze=False, layout="constrained")
    for column, task in enumerate(tasks):
        groups = [group for group in _groups(results) if group[0].task == task]
        _panel(axes[0, column], groups, lambda r: 1 - r.saved)
        _panel(axes[1, column], groups, lambda r: r.time_left)
        axes[0, column].set_title(task)
        axes[0, column].set_xlabel("MACs, part of dense")
        axes[1, column].set_xlabel("milliseconds, part of dense")
        for row in (0, 1):
            axes[row, column].set_ylabel(METRIC_NAMES[groups[0][0].metric])
    used = {r.control for r in results}
    handles = [
        Line2D([], [], color=colour, marker=marker, linestyle="-" if name == "madtp" else "", label=name)
        for name, (colour, marker) in STYLES.items()
        if name in used
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 5), frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _panel(axes: Axes, groups: Sequence[Sequence[Result]], place: Callable[[Result], float | None]) -> None:
    """Draw the results of one task.

    Whiskers are standard deviations over seeds; a line joins the dense model and MADTP's.
    """
    path: dict[float, tuple[float, float]] = {}
    for group in groups:
        control = group[0].control
        places = [found for result in group if (found := place(result)) is not None]
        if not places:
            continue
        x, scores = statistics.mean(places), [result.score for result in group]
        y, spread = statistics.mean(scores), statistics.stdev(scores) if len(scores) > 1 else 0.0
        colour, marker = STYLES[control]
        axes.errorbar(x, y, yerr=spread or None, color=colour, marker=marker, markersize=7, capsize=2)
        if control in (DENSE, "madtp"):
            path[group[0].target] = x, y  # later results were trained for longer
    if path:
        axes.plot(*zip(*sorted(path.values()), strict=True), color=STYLES["madtp"][0], linewidth=1.2, zorder=0)
    axes.set_xlim(left=0)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("collect", "time", "draw"))
    parser.add_argument("--runs", type=Path, default=Path("runs/controls"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--picture", type=Path, default=PICTURE)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    results = read(options.results)
    if options.command == "collect":
        write(options.results, collect(options.runs, results))
    elif options.command == "time":
        write(
            options.results,
            time_models(options.runs, results, batch=options.batch, rounds=options.rounds, threads=options.threads),
        )
    else:
        draw(results, options.picture)
    Console(width=200).print(table(read(options.results)), markup=False)


if __name__ == "__main__":
    main()
