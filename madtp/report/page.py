"""A report as HTML for notebooks, which loads nothing and runs nothing: :func:`report_html`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from madtp.report.outline import Layer, Outline, Tower, outline_of
from madtp.report.records import RewriteReport

_CELL = "padding:1px 10px 1px 0;text-align:left;vertical-align:top"
_NUMBER = "padding:1px 10px 1px 0;text-align:right;white-space:nowrap"
_TRACK = "display:inline-block;width:140px;height:9px;background:rgba(128,128,128,.2)"
_FILL = "display:block;height:9px;background:#3b7dd8;width:"


def report_html(report: RewriteReport) -> str:
    """Return the report as an HTML element. Whatever comes from the model is escaped."""
    outline = outline_of(report)
    parts = [f"<p><b>{escape(outline.title)}</b></p>"]
    parts.append(_rows(((fact.name, fact.value) for fact in outline.facts), ()))
    parts += [_tower(tower) for tower in outline.towers]
    parts += _unpruned(outline)
    if outline.remarks:
        parts.append(_rows(((remark.name, remark.value) for remark in outline.remarks), ()))
    return f"<div style='max-width:70em'>{''.join(parts)}</div>"


def _tower(tower: Tower) -> str:
    measured = any(layer.kept is not None for layer in tower.layers)
    timed = any(layer.cost is not None for layer in tower.layers)
    heads = ["layer", "block", *(["tokens kept", "", ""] if measured else []), *(["costs", "saves"] if timed else [])]
    rows = "".join(_layer(layer, measured=measured, timed=timed) for layer in tower.layers)
    return (
        f"<p><b>{escape(tower.title)}</b><br>{escape(tower.description)}</p><table><thead><tr>"
        + "".join(f"<th style='{_CELL}'>{head}</th>" for head in heads)
        + f"</tr></thead><tbody>{rows}</tbody></table>"
    )


def _layer(layer: Layer, *, measured: bool, timed: bool) -> str:
    cells = [f"<td style='{_NUMBER}'>{layer.number}</td>", f"<td style='{_CELL}'>{escape(layer.block)}</td>"]
    if measured:
        drawn, kept, share = "did not run", "", ""
        if layer.kept is not None and layer.share is not None:
            filled = 100 * min(max(layer.share, 0.0), 1.0)
            drawn = f"<span style='{_TRACK}'><span style='{_FILL}{filled:.1f}%'></span></span>"
            kept, share = f"{layer.kept:.1f}", f"{layer.share:.0%}"
        cells.append(f"<td style='{_CELL}'>{drawn}</td>")
        cells += [f"<td style='{_NUMBER}'>{text}</td>" for text in (kept, share)]
    if timed:
        times = ("" if value is None else f"{value:.2f} ms" for value in (layer.cost, layer.saving))
        cells += [f"<td style='{_NUMBER}'>{text}</td>" for text in times]
    return f"<tr>{''.join(cells)}</tr>"


def _unpruned(outline: Outline) -> Sequence[str]:
    if not outline.unpruned:
        return ()
    rows = ((", ".join(one.blocks), one.reason, one.help) for one in outline.unpruned)
    return ("<p><b>not pruned</b></p>", _rows(rows, ("blocks", "why", "what would help")))


def _rows(rows: Iterable[Sequence[str]], heads: Sequence[str]) -> str:
    head = "".join(f"<th style='{_CELL}'>{escape(one)}</th>" for one in heads)
    body = "".join(
        "<tr>" + "".join(f"<td style='{_CELL}'>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
