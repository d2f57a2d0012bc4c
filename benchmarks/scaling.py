"""Measure what a rewrite costs: seconds of the capture and of each pass, for models of growing depth.

    python benchmarks/scaling.py --layers 6 12 24 48 --picture docs/scaling.png
    python benchmarks/scaling.py --layers 12 --width 768 --image-size 224 --length 32

The model has an image tower and a text tower with the same number of layers; the text attends to the image in every layer. The
last column is the slope on log-log axes: 1 means linear in the depth. Small widths show the cost of the compiler, large ones
the total wait. Seconds are processor time, so that other work on the machine does not count; on one thread this is the time on
an idle machine. They are medians over the rounds, since a garbage collection may fall into any pass.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import ParamSpec, TypeVar
from unittest import mock

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import madtp

P = ParamSpec("P")
R = TypeVar("R")

# The passes of the pipeline, in order, by the name under which it calls them.
PASSES = {
    "capture": "rewriters.pipeline.capture",
    "canonicalise": "rewriters.pipeline.canonicalise",
    "detect": "rewriters.pipeline.detect",
    "plan": "rewriters.pipeline.make_plan",
    "insert": "rewriters.pipeline.insert_what_works",
    "price": "rewriters.pipeline.cost_table",
    "lift": "rewriters.pipeline.lift",
    "compile": "rewriters.pipeline.compile_graph",
    "verify": "rewriters.regions.rewrite.verify",
}
TOTAL = "whole rewrite"


class Block(nn.Module):
    """A pre-norm block with fused queries, keys and values, and with cross-attention if it has a memory."""

    def __init__(self, width: int, memory: bool) -> None:
        super().__init__()
        self.heads = max(2, width // 64)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        if memory:
            self.norm3, self.query = nn.LayerNorm(width), nn.Linear(width, width)
            self.both, self.cross_out = nn.Linear(width, 2 * width), nn.Linear(width, width)

    def split(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        """Split ``[B, N, parts * C]`` into tensors ``[B, H, N, D]``."""
        batch, length, width = x.shape
        return (
            x.reshape(batch, length, parts, self.heads, width // parts // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        )

    def forward(self, x: Tensor, mask: Tensor | None = None, memory: Tensor | None = None) -> Tensor:
        """Map tokens ``[B, N, C]`` to the same shape; they attend to ``memory``, ``[B, K, C]``."""
        query, key, value = self.split(self.qkv(self.norm1(x)), 3)
        x = x + self.out(F.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2).flatten(2))
        if memory is not None:
            (query,), (key, value) = self.split(self.query(self.norm3(x)), 1), self.split(self.both(memory), 2)
            x = x + self.cross_out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))
        hidden: Tensor = self.mlp(self.norm2(x))
        return x + hidden


class TwoTowers(nn.Module):
    """A vision transformer with a class token, and a text encoder that attends to it."""

    def __init__(self, layers: int, width: int, image_size: int, length: int, patch: int = 16) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.image_positions = nn.Parameter(torch.randn(1, (image_size // patch) ** 2 + 1, width) * 0.02)
        self.image = nn.ModuleList(Block(width, False) for _ in range(layers))
        self.words, self.text_positions = nn.Embedding(1000, width), nn.Embedding(length, width)
        self.text = nn.ModuleList(Block(width, True) for _ in range(layers))
        self.image_norm, self.text_norm = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the features ``[B, 2 C]`` of both class tokens."""
        x = self.patches(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], 1) + self.image_positions
        for block in self.image:
            x = block(x)
        y = self.words(input_ids) + self.text_positions(torch.arange(input_ids.shape[1], device=x.device))
        mask = attention_mask[:, None, None, :].bool()
        for block in self.text:
            y = block(y, mask, x)
        return torch.cat([self.image_norm(x)[:, 0], self.text_norm(y)[:, 0]], 1)


@contextmanager
def timed(seconds: dict[str, float]) -> Iterator[None]:
    """Add up the time spent in each pass inside the block."""
    with ExitStack() as stack:
        for name, path in PASSES.items():
            module, _, function = path.rpartition(".")
            original = getattr(__import__(module, fromlist=[function]), function)
            stack.enter_context(mock.patch(path, _adding_time(original, name, seconds)))
        yield


def _adding_time(function: Callable[P, R], name: str, seconds: dict[str, float]) -> Callable[P, R]:
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        started = time.process_time()
        try:
            return function(*args, **kwargs)
        finally:
            seconds[name] = seconds.get(name, 0.0) + time.process_time() - started

    return call


def measure(layers: int, width: int, image_size: int, length: int) -> dict[str, float]:
    """Return the seconds of each pass of one rewrite."""
    torch.manual_seed(0)
    model = TwoTowers(layers, width, image_size, length).eval()
    inputs = {
        "pixels": torch.randn(2, 3, image_size, image_size),
        "input_ids": torch.randint(1000, (2, length)),
        "attention_mask": torch.ones(2, length, dtype=torch.long),
    }
    seconds: dict[str, float] = dict.fromkeys(PASSES, 0.0)
    with timed(seconds):
        started = time.process_time()
        pruned = madtp.rewrite(model, inputs)
        seconds[TOTAL] = time.process_time() - started
    assert len(pruned.madtp.report.sites) == 2 * layers
    return seconds


def median(rounds: list[dict[str, float]]) -> dict[str, float]:
    """Return the median of each pass over several rewrites."""
    return {name: statistics.median(seconds[name] for seconds in rounds) for name in rounds[0]}


def slope(layers: list[int], seconds: list[float]) -> float:
    """Return the exponent p of seconds ~ layers ** p, by least squares."""
    return statistics.linear_regression([math.log(n) for n in layers], [math.log(s) for s in seconds]).slope


def table(layers: list[int], found: list[dict[str, float]]) -> Table:
    """Return a table of seconds by pass and depth."""
    result = Table("layers", *(f"{n}+{n}" for n in layers), "slope", title="seconds of each pass")
    for name in (*PASSES, TOTAL):
        line = [seconds[name] for seconds in found]
        fitted = f"{slope(layers, line):.2f}" if len(layers) > 1 else ""
        result.add_row(name, *(f"{s:.2f}" for s in line), fitted)
    return result


def draw(layers: list[int], found: list[dict[str, float]], path: Path) -> None:
    """Draw the lines of the table on log-log axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name in (*PASSES, TOTAL):
        line = [seconds[name] for seconds in found]
        (drawn,) = axes.plot(layers, line, marker="o", label=f"{name} ({slope(layers, line):.2f})")
        if name == TOTAL:
            drawn.set(color="black", linewidth=2.5)
    axes.set(xscale="log", yscale="log", xlabel="layers of each of two towers", ylabel="seconds")
    axes.set_xticks(layers, [str(n) for n in layers])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(title="pass (slope)", fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=110)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[6, 12, 24, 48])
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--length", type=int, default=8, help="text tokens")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--picture", type=Path, help="file for the picture")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    size = options.width, options.image_size, options.length
    measure(2, *size)  # imports and caches belong to no pass
    found = [median([measure(n, *size) for _ in range(options.rounds)]) for n in track(options.layers, transient=True)]
    Console().print(table(options.layers, found))
    if options.picture is not None:
        draw(options.layers, found, options.picture)


if __name__ == "__main__":
    main()
