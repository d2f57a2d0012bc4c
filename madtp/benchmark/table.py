"""The tables of a benchmark: :func:`comparison_tables`, and :func:`token_table` with what pruning kept of each sample."""

from __future__ import annotations

from rich.table import Table

from madtp.benchmark.result import BenchmarkResult, Clock, Comparison, compare, time_shares


def comparison_tables(result: BenchmarkResult, title: str, clock: Clock = "wall") -> list[Table]:
    """Return a table for each mode and batch size, with a row for each measurement.

    Args:
        result: what was measured.
        title: names the model.
        clock: which times to show.
    """
    groups: dict[tuple[str, int], list[Comparison]] = {}
    for row in compare(result, clock):
        groups.setdefault((row.mode, row.batch), []).append(row)
    return [_table(rows, f"{title}: {mode}, batch of {batch}, {clock} time") for (mode, batch), rows in groups.items()]


def _table(rows: list[Comparison], title: str) -> Table:
    table = Table(title=title, title_justify="left", header_style="bold")
    with_memory = any(row.peak_bytes is not None for row in rows)
    table.add_column("variant", no_wrap=True)
    for column in ("ms", "spread", "speed-up", "MACs\n÷", "effi-\nciency", "share of\nfloor"):
        table.add_column(column, justify="right", no_wrap=True)
    if with_memory:
        table.add_column("peak\nMiB", justify="right", no_wrap=True)
    for row in rows:
        time = row.milliseconds
        cells = (
            f"{row.variant} {row.target}".strip(),
            f"{time.median:.1f}",
            f"±{(time.high - time.low) / 2 / time.median:.0%}",
            *map(_ratio, (row.speed_up, row.mac_ratio, row.efficiency, row.floor_share)),
        )
        memory = "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.1f}"
        table.add_row(*cells, *((memory,) if with_memory else ()))
    return table


def token_table(result: BenchmarkResult) -> Table:
    """Return a table of how many tokens a sample keeps at the first and at the last site of each tower.

    Cells are means, and in brackets the smallest and the largest number over the samples of all batches.
    """
    table = Table(title="tokens of a sample", title_justify="left", header_style="bold")
    table.add_column("batch", justify="right")
    for column in ("variant", "tower", "first site", "last site"):
        table.add_column(column)
    for one in result.measurements:
        if one.mode != "inference" or not one.tokens:
            continue
        towers: dict[str, list[str]] = {}
        for site in one.tokens[0]:
            towers.setdefault(site.partition(".")[0], []).append(site)
        for tower, sites in towers.items():
            ends = [[count for batch in one.tokens for count in batch[site]] for site in (sites[0], sites[-1])]
            table.add_row(str(one.batch), one.name, tower, *map(_range, ends))
    return table


def share_table(result: BenchmarkResult, clock: Clock = "wall") -> Table | None:
    """Return a table of where the time of pruned models goes; None if that was not measured."""
    table = Table(title=f"where the time goes, {clock} time", title_justify="left", header_style="bold")
    table.add_column("batch", justify="right")
    table.add_column("variant", no_wrap=True)
    for column in ("ms", "dense\nlayers", "observing\nattention", "scoring,\nmerging"):
        table.add_column(column, justify="right", no_wrap=True)
    for one in time_shares(result, clock):
        parts = (f"{part / one.total:.0%}" for part in (one.layers, one.observing, one.deciding))
        table.add_row(str(one.batch), one.name, f"{one.total:.1f}", *parts)
    return table if table.row_count else None


def _range(counts: list[int]) -> str:
    return f"{sum(counts) / len(counts):.1f} ({min(counts)}–{max(counts)})"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def conditions(result: BenchmarkResult) -> str:
    """Return how and on what machine it was measured, for people."""
    machine, settings = result.environment, result.settings
    rounds = max((len(m.wall_ms) for m in result.measurements), default=0)
    versions = ", ".join(f"{name} {number}" for name, number in machine.versions.items())
    load = "" if machine.load is None else f" (load at the start: {machine.load})"
    threads = f"{machine.threads} thread{'s' * (machine.threads > 1)}"
    text = (
        f"Medians of {rounds} rounds after {settings.get('warm_up', 0)} to warm up; variants take turns. "
        f"{machine.cpu}, {machine.capability}, {threads} of {machine.cores}{load}, {settings.get('dtype', '')}, "
        f"seed {settings.get('seed', 0)}. {versions}. Spread: half of the distance between the quartiles. "
        "MACs ÷: MACs of dense by those of the variant. Efficiency: speed-up by "
        "that ratio. Share of floor: the floor's time by that of the variant."
    )
    return text if result.complete else f"{text} Interrupted."
