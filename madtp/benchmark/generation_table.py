"""The tables of a benchmark of generation: :func:`generation_tables`, and :func:`generation_conditions` below them."""

from __future__ import annotations

from rich.table import Table

from madtp.benchmark.generation import GenerationComparison, GenerationResult, compare_generation
from madtp.benchmark.result import Clock

COLUMNS = ("MACs", "prefill\nms", "a step\nms", "new tokens\na second", "cache\nKiB")


def generation_tables(result: GenerationResult, title: str, clock: Clock = "wall") -> list[Table]:
    """Return a table for each batch size. Its rows are the dense model and the pruned ones, for each size of prompt.

    Args:
        result: what was measured.
        title: names the model.
        clock: which times to show.
    """
    batches: dict[int, list[GenerationComparison]] = {}
    for row in compare_generation(result, clock):
        batches.setdefault(row.batch, []).append(row)
    return [_table(rows, f"{title}: generation, batch of {batch}, {clock} time") for batch, rows in batches.items()]


def _table(rows: list[GenerationComparison], title: str) -> Table:
    table = Table(title=title, title_justify="left", header_style="bold", box=None, pad_edge=False)
    table.add_column("image +\ntext", no_wrap=True)
    table.add_column("variant", no_wrap=True)
    for column in COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    last = ""
    for row in rows:
        prompt = f"{row.image_tokens} + {row.text_tokens}"
        table.add_row(
            "" if prompt == last else prompt,
            row.name,
            "" if row.macs_share is None else f"×{row.macs_share:.2f}",
            _cell(row.prefill_ms.median, row.prefill_share),
            _cell(row.step_ms.median, row.step_share),
            _cell(row.tokens_per_second, row.speed_share),
            _cell(row.cache_bytes / 2**10, row.cache_share),
        )
        last = prompt
    return table


def _cell(value: float, share: float | None) -> str:
    """A number of three digits or more, and what it is of the dense model's."""
    digits = f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"
    return digits if share is None else f"{digits} ×{share:.2f}"


def generation_conditions(result: GenerationResult, clock: Clock = "wall") -> str:
    """Return how and on what machine it was measured, for people.

    Args:
        result: what was measured.
        clock: which times are shown.
    """
    machine, settings = result.environment, result.settings
    rows = compare_generation(result, clock)
    spreads = [time for row in rows for time in (row.prefill_ms, row.step_ms)]
    widest = max(((time.high - time.low) / 2 / time.median for time in spreads), default=0.0)
    versions = ", ".join(f"{name} {number}" for name, number in machine.versions.items())
    load = "" if machine.load is None else f" (load at the start: {machine.load})"
    new = settings["new_tokens"]
    rounds = max((time.count for time in spreads), default=0)
    threads = f"{machine.threads} thread{'s' * (machine.threads > 1)} of {machine.cores}{load}"
    text = (
        f"Medians of {rounds} rounds after {settings['warm_up']} to warm up; dense and pruned take turns. "
        f"{machine.cpu}, {machine.capability}, {threads}, {settings['dtype']}, seed {settings['seed']}. {versions}. "
        f"Half of the distance between the quartiles: {widest:.0%} or less. {new} new tokens: the prefill yields the first, a "
        f"step each of the other {new - 1}; new tokens a second are of all samples, with the prefill. "
        "MACs: of the prefill. Cache: keys and values of a batch after it. ×: what it is of dense."
    )
    return text if result.complete else f"{text} Interrupted."
