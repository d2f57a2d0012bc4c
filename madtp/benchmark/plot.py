"""The plots of a benchmark: speed-up against MAC ratio (:func:`draw_speed_ups`), and where the time goes
(:func:`draw_time_shares`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from madtp.atomic_files import replacing_file
from madtp.benchmark.result import DENSE, BenchmarkResult, Clock, Comparison, compare, time_shares
from madtp.errors import DataError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# A ground and inks of its own make the picture legible on light and on dark pages.
GROUND, INK, RULE = "#f4f5f7", "#1d2129", "#c9cdd4"
# Okabe and Ito's colours, which colour-blind people can distinguish.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8a6d3b")
MARKERS = "osD^vPX*"
PARTS = {"layers": "dense layers", "observing": "observing attention", "deciding": "scoring and merging"}


def draw_speed_ups(result: BenchmarkResult, path: Path, title: str, clock: Clock = "wall") -> Path:
    """Draw a panel for each mode. Colours tell variants, markers tell batch sizes; whiskers are quartiles.

    Args:
        result: what was measured.
        path: file to write: PNG, SVG or any other format that matplotlib knows by its suffix.
        title: names the model.
        clock: which times to draw.

    Returns:
        The path.

    Raises:
        DataError: nothing is there to be compared with a dense model.
    """
    rows = [row for row in compare(result, clock) if row.speed_up is not None and row.variant != DENSE]
    if not rows:
        raise DataError("the result has no variant beside the dense model, so there is no speed-up to draw.")
    modes = list(dict.fromkeys(row.mode for row in rows))
    variants = list(dict.fromkeys(row.variant for row in rows))
    batches = list(dict.fromkeys(row.batch for row in rows))
    figure = _figure(5.2 * len(modes), 4.9)
    panels = figure.subplots(1, len(modes), squeeze=False)[0]
    for axes, mode in zip(panels, modes, strict=True):
        _panel(axes, [row for row in rows if row.mode == mode], variants, batches)
        axes.set_title(mode, color=INK, fontsize=10)
    threads = result.environment.threads
    figure.suptitle(f"{title}, {threads} thread{'s' * (threads > 1)}, {clock} time", color=INK, fontsize=11)
    figure.legend(
        handles=_handles(variants, batches), loc="outside lower center", ncols=4, frameon=False, labelcolor=INK
    )
    return _written(figure, path)


def draw_time_shares(result: BenchmarkResult, path: Path, title: str, clock: Clock = "wall") -> Path:
    """Draw a bar for each pruned variant: its layers, observed attention, and sites, as shares of the dense model's time.

    Args:
        result: what was measured, with the times of sites.
        path: file to write, as in :func:`draw_speed_ups`.
        title: names the model.
        clock: which times to draw.

    Returns:
        The path.

    Raises:
        DataError: the sites of no variant were timed, or there is no dense model.
    """
    rows = [row for row in time_shares(result, clock) if row.dense]
    if not rows:
        raise DataError("the result has no times of sites beside a dense model; add --where to the command.")
    figure = _figure(7.2, 1.6 + 0.42 * len(rows))
    axes = figure.subplots()
    names = [f"batch {row.batch}, {row.name}" for row in rows]
    before = [0.0] * len(rows)
    for part, colour in (("layers", COLOURS[0]), ("observing", COLOURS[4]), ("deciding", COLOURS[1])):
        widths = [100 * getattr(row, part) / (row.dense or 1) for row in rows]
        axes.barh(names, widths, left=before, color=colour, label=PARTS[part])
        before = [start + width for start, width in zip(before, widths, strict=True)]
    axes.axvline(100, color=INK, linewidth=1, linestyle="--", label="the dense model")
    axes.invert_yaxis()
    axes.set(xlabel="% of the dense model's time", xlim=(0, max(105, *before) * 1.02))
    _dress(axes)
    axes.grid(visible=False, axis="y")
    figure.suptitle(f"{title}, {clock} time", color=INK, fontsize=11)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, labelcolor=INK)
    return _written(figure, path)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), facecolor=GROUND, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _written(figure: Figure, path: Path) -> Path:
    with replacing_file(path) as draft:
        figure.savefig(draft, dpi=140, facecolor=GROUND)
    return path


def _panel(axes: Axes, rows: Sequence[Comparison], variants: Sequence[str], batches: Sequence[int]) -> None:
    furthest = max(1.5, *(max(row.mac_ratio or 1, row.speed_up or 1) for row in rows)) * 1.06
    axes.plot([0, furthest], [0, furthest], color=INK, linewidth=1, linestyle="--", zorder=1)
    axes.axhline(1, color=INK, linewidth=0.8, linestyle=":", zorder=1)
    for row in rows:
        assert row.speed_up is not None
        time = row.milliseconds
        middle = row.speed_up
        spread = [[middle - middle * time.median / time.high], [middle * time.median / time.low - middle]]
        axes.errorbar(
            row.mac_ratio or 1,
            middle,
            yerr=spread,
            color=COLOURS[variants.index(row.variant) % len(COLOURS)],
            marker=MARKERS[batches.index(row.batch) % len(MARKERS)],
            capsize=2,
            linestyle="",
            alpha=0.9,
        )
    axes.set(xlim=(0, furthest), ylim=(0, furthest), xlabel="MACs of dense / MACs", ylabel="time of dense / time")
    _dress(axes)


def _dress(axes: Axes) -> None:
    axes.set_facecolor(GROUND)
    axes.set_axisbelow(True)
    axes.grid(color=RULE, linewidth=0.6)
    axes.tick_params(colors=INK)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)


def _handles(variants: Sequence[str], batches: Sequence[int]) -> list[object]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    colours = [Patch(color=COLOURS[i % len(COLOURS)], label=name) for i, name in enumerate(variants)]
    markers = [
        Line2D([], [], color=INK, marker=MARKERS[i % len(MARKERS)], linestyle="", label=f"batch {size}")
        for i, size in enumerate(batches)
    ]
    return [*colours, *markers, Line2D([], [], color=INK, linestyle="--", label="ideal")]
