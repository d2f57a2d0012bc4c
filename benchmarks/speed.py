"""Measure the wall-clock speed of pruned models, as a ratio to the dense model in the same process.

    python benchmarks/speed.py blip_nlvr --reductions 0.5 0.8 --batch 1

Dense and pruned runs alternate. The table gives medians over the rounds after a discarded warm-up round. *Efficiency* is the
speed-up divided by the MAC ratio: 1 means that every saved MAC saves its share of the time.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import madtp
from zoo.examples import find_model


def median_times(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the median seconds of each run; the runs alternate, and the first round is discarded."""
    seen: dict[str, list[float]] = {name: [] for name in runs}
    for turn in track(range(rounds + 1), description="timing", transient=True):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if turn:
                seen[name].append(time.perf_counter() - started)
    return {name: statistics.median(times) for name, times in seen.items()}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="zoo model, timm model, or path of a transformers config")
    parser.add_argument("--reductions", type=float, nargs="+", default=[0.5, 0.8])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bfloat16", action="store_true", help="run under bfloat16 autocast")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    found = find_model(options.model)
    model, example = found.model, found.example_inputs
    batch = {name: value[:1].repeat(options.batch, *[1] * (value.dim() - 1)) for name, value in example.items()}

    def run(module: torch.nn.Module) -> Callable[[], object]:
        def call() -> object:
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=options.bfloat16):
                return module(**batch)

        return call

    table = Table(title=f"{options.model}, batch {options.batch}, {options.threads} CPU threads, seed {options.seed}")
    for column in ("reduction", "G MACs per sample", "ms per sample", "speed-up", "efficiency"):
        table.add_column(column, justify="right")
    runs: dict[str, Callable[[], object]] = {"dense": run(model)}
    macs: dict[str, float] = {}
    for reduction in options.reductions:
        pruned = madtp.rewrite(model, example)
        madtp.calibrate(pruned, [batch], reduction=reduction, tolerance=0.02)
        name = f"{reduction:.0%}"
        runs[name] = run(pruned)
        macs[name] = madtp.count_macs(pruned, batch)
        macs["dense"] = madtp.count_macs(model, batch)
    times = median_times(runs, options.rounds)
    for name, seconds in times.items():
        ratio, speed = macs["dense"] / macs[name], times["dense"] / seconds
        values = (macs[name] / 1e9, seconds * 1e3 / options.batch)
        table.add_row(name, f"{values[0]:.2f}", f"{values[1]:.1f}", f"{speed:.2f}x", f"{speed / ratio:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
