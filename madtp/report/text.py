"""A report as text of at most 100 columns: :func:`report_text`."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from madtp.report.outline import Layer, Outline, Tower, outline_of
from madtp.report.records import RewriteReport

WIDTH = 100
_FACTS = 15
_BAR, _SHORTEST_BAR, _LONGEST_NAME = 24, 12, 42
_EIGHTHS = " ▏▎▍▌▋▊▉"


def report_text(report: RewriteReport) -> str:
    """Return the report as text, without a line break at the end."""
    outline = outline_of(report)
    parts = [_wrapped(outline.title), *(_labelled(fact.name, fact.value) for fact in outline.facts)]
    longest = max((len(layer.block) for tower in outline.towers for layer in tower.layers), default=0)
    for tower in outline.towers:
        rows = _table(tower, min(longest, _LONGEST_NAME))
        parts += ["", _wrapped(tower.title), _wrapped(tower.description, "  "), *rows]
    parts += _unpruned(outline)
    if outline.remarks:
        parts.append("")
        parts += [_wrapped(f"{remark.name}: {remark.value}", hanging="  ") for remark in outline.remarks]
    return "\n".join(parts)


def bar(share: float, width: int) -> str:
    """Return a bar of ``width`` columns that is full for a share of 1."""
    eighths = round(8 * width * min(max(share, 0.0), 1.0))
    whole, rest = divmod(eighths, 8)
    return ("█" * whole + (_EIGHTHS[rest] if rest else "")).ljust(width)


def _table(tower: Tower, longest: int) -> list[str]:
    """The rows of a tower. Only columns that hold something are there; names take ``longest`` columns."""
    measured = any(layer.kept is not None for layer in tower.layers)
    timed = any(layer.cost is not None for layer in tower.layers)
    room = WIDTH - len("  layer  ") - longest - 16 - (22 if timed else 0)
    length = max(min(room, _BAR), _SHORTEST_BAR)
    head = f"  layer  {'block':{longest}}"
    if measured:
        head += f"  {'tokens kept':{length + 14}}"
    if timed:
        head += f"  {'costs':>9}  {'saves':>9}"
    rows = [head.rstrip()]
    for layer in tower.layers:
        row = f"  {layer.number:5}  {_shortened(layer.block, longest):{longest}}"
        if measured:
            row += f"  {_kept(layer, length):{length + 14}}"
        if timed:
            row += f"  {_milliseconds(layer.cost)}  {_milliseconds(layer.saving)}"
        rows.append(row.rstrip())
    return rows


def _kept(layer: Layer, length: int) -> str:
    if layer.kept is None or layer.share is None:
        return "did not run"
    return f"{bar(layer.share, length)} {layer.kept:7.1f} {layer.share:5.0%}"


def _milliseconds(value: float | None) -> str:
    return " " * 9 if value is None else f"{value:.2f} ms".rjust(9)


def _shortened(name: str, width: int) -> str:
    return name if len(name) <= width else f"…{name[1 - width :]}"


def _unpruned(outline: Outline) -> Sequence[str]:
    if not outline.unpruned:
        return ()
    lines = ["", "not pruned"]
    for one in outline.unpruned:
        lines.append(_wrapped(", ".join(one.blocks), "  "))
        lines.append(_wrapped(f"why: {one.reason}", "    ", hanging="    "))
        if one.help:
            lines.append(_wrapped(f"what would help: {one.help}", "    ", hanging="    "))
    return lines


def _labelled(name: str, value: str) -> str:
    return _wrapped(f"{name:{_FACTS}}{value}", "  ", hanging=" " * _FACTS)


def _wrapped(words: str, indent: str = "", *, hanging: str = "") -> str:
    """Words in lines of at most :data:`WIDTH` columns; lines after the first are indented by ``hanging`` further."""
    return textwrap.fill(
        words, WIDTH, initial_indent=indent, subsequent_indent=indent + hanging, break_on_hyphens=False
    )
