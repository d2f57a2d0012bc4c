"""The table of the demonstration."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from madtp.pictures.page import Measurement, measurement_cells


def measurement_table(measurements: Sequence[Measurement], note: str) -> Table:
    """Return a table with a row for each model; ``note`` says how it was measured."""
    table = Table(caption=note, caption_justify="left", caption_style="dim", header_style="bold")
    table.add_column("model")
    table.add_column("accuracy", justify="right")
    table.add_column("MACs per sample", justify="right")
    table.add_column("saved", justify="right")
    table.add_column("image tokens\nafter each layer")
    table.add_column("text tokens\nafter each layer")
    table.add_column("ms per sample", justify="right")
    for m in measurements:
        table.add_row(m.model, *measurement_cells(m))
    return table
