"""Measure what a newcomer waits for: seconds of the first import, the first rewrite, the next one, saving and loading.

    python benchmarks/first_rewrite.py blip_nlvr_mini clip_vit_b16 --rounds 5

Each round is a process of its own, as imports and caches are filled only once. The models are those of the zoo, with random
weights. Seconds are processor time on one thread, so that other work on the machine does not count; medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import track
from rich.table import Table

R = TypeVar("R")

STEPS = (
    "import madtp",
    "import torch",
    "make the model",
    "first rewrite",
    "second rewrite",
    "madtp.save",
    "madtp.load",
    "first call",
)


def timed(step: Callable[[], R]) -> tuple[R, float]:
    """Return what ``step`` returns, and the processor time that it took."""
    started = time.process_time()
    result = step()
    return result, time.process_time() - started


def measure(model: str) -> dict[str, float]:
    """Return the seconds of each step in this process, which must be fresh."""
    import importlib

    seconds = {}
    madtp, seconds["import madtp"] = timed(lambda: importlib.import_module("madtp"))
    torch, seconds["import torch"] = timed(lambda: importlib.import_module("torch"))
    torch.set_num_threads(1)
    zoo = importlib.import_module("zoo")
    made, seconds["make the model"] = timed(lambda: zoo.create(model).eval())
    inputs = zoo.example_inputs(made)
    pruned, seconds["first rewrite"] = timed(lambda: madtp.rewrite(made, inputs))
    _, seconds["second rewrite"] = timed(lambda: madtp.rewrite(made, inputs))
    with tempfile.TemporaryDirectory() as folder:
        _, seconds["madtp.save"] = timed(lambda: madtp.save(pruned, folder))
        loaded, seconds["madtp.load"] = timed(lambda: madtp.load(folder, made))
    with torch.no_grad():
        _, seconds["first call"] = timed(lambda: loaded(**inputs))
    return seconds


def in_fresh_process(model: str) -> dict[str, float]:
    """Measure in a process of its own."""
    command = [sys.executable, str(Path(__file__).resolve()), model, "--one"]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found: dict[str, float] = json.loads(output.splitlines()[-1])
    return found


def table(found: dict[str, list[dict[str, float]]]) -> Table:
    """Return a table of seconds by step and model."""
    result = Table("step", *found, title="seconds of processor time")
    for step in STEPS:
        result.add_row(step, *(f"{statistics.median(one[step] for one in rounds):.2f}" for rounds in found.values()))
    return result


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="names of models of the zoo")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--one", action="store_true", help="measure one model in this process, and print JSON")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.models[0])))
        return
    rounds = range(options.rounds)
    found = {
        model: [in_fresh_process(model) for _ in track(rounds, description=model, transient=True)]
        for model in options.models
    }
    Console().print(table(found))


if __name__ == "__main__":
    main()
