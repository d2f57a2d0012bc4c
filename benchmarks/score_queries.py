"""What scores cost when tokens are scored by fewer queries (``PruningConfig(score_queries=n)``), at equal MACs.

    python benchmarks/score_queries.py run --output score_queries.json    # resumes; all minis, 3 editions of the test scenes
    python benchmarks/score_queries.py show --output score_queries.json

Each shipped pruned mini is given n, calibrated anew to the MACs that it has with all queries, and tested on scenes that it was
not trained on. Weights are those that were trained with all queries.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path

import torch
from controls import TASKS, main_metric
from pareto import DATA
from rich.console import Console
from rich.progress import track
from rich.table import Table

import madtp
import zoo
from madtp.atomic_files import write_text
from madtp.pruned import PrunedModel
from zoo.benchmark.bench import kept_of
from zoo.recipes.model_card import held_out_calls, test_task

CHECKPOINTS = ("pruned-50", "pruned-80")
QUERIES = (None, 64, 32, 16, 8)
SEEDS = (0, 1, 2)


def with_queries(name: str, checkpoint: str, data: str, queries: int | None) -> PrunedModel:
    """A shipped pruned model that scores tokens by some queries, with the MACs that it has with all."""
    model = zoo.create(name, checkpoint)
    assert isinstance(model, PrunedModel)
    model.eval()
    if queries is None:
        return model
    calls = held_out_calls(name, data, split="val", items=256, seed=0)
    wanted = reduction(model, calls)
    model.madtp.config = replace(model.madtp.config, score_queries=queries)
    madtp.calibrate(model, calls, reduction=wanted, tolerance=0.0005)
    return model


def reduction(model: PrunedModel, calls: list[dict[str, torch.Tensor]]) -> float:
    """The fraction of the dense MACs that a model saves."""
    kept = kept_of(model, calls)
    return 1 - sum(one.macs for one in kept) / sum(one.dense_macs for one in kept)


def run(output: Path, items: int) -> None:
    """Measure what is not in the file yet."""
    results = json.loads(output.read_text()) if output.exists() else {}
    # Retrieval takes longest, so it comes last.
    tasks = sorted(TASKS, key=lambda task: task == "retrieval")
    jobs = [(task, ck, n) for task in tasks for n in QUERIES for ck in CHECKPOINTS]
    for task, checkpoint, queries in track(jobs, "models"):
        key = f"{task} {checkpoint} {queries}"
        if key in results:
            continue
        name, data = TASKS[task], DATA[task]
        model = with_queries(name, checkpoint, data, queries)
        results[key] = [main_metric(test_task(model, name, data, items=items, seed=seed))[1] for seed in SEEDS]
        write_text(output, json.dumps(results, indent=1) + "\n")


def show(output: Path) -> None:
    """Print means and spreads over the editions."""
    results = json.loads(output.read_text())
    table = Table("model", *("all" if n is None else str(n) for n in QUERIES), box=None, header_style="bold")
    for task in TASKS:
        for checkpoint in CHECKPOINTS:
            cells = []
            for queries in QUERIES:
                scores = results.get(f"{task} {checkpoint} {queries}")
                cells.append(f"{statistics.fmean(scores):.4f} ± {statistics.stdev(scores):.4f}" if scores else "")
            table.add_row(f"{task} {checkpoint}", *cells)
    Console().print(table)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "show"))
    parser.add_argument("--output", type=Path, default=Path("score_queries.json"), help="JSON file of the results")
    parser.add_argument("--items", type=int, default=512, help="test samples of each edition")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.command == "run":
        run(given.output, given.items)
    show(given.output)


if __name__ == "__main__":
    main()
