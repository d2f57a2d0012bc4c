"""Draw the graph of blocks and streams that the rewriter detects, with matplotlib or as Graphviz text.

Start at :func:`draw_graph`, which draws any networkx DiGraph. These attributes decide how:

- ``label`` of a node is its text (default: its name and ``kind``), ``modality`` its colour, and ``stream`` its column. Nodes
  of kind ``"stream"`` feed the others.
- ``role`` of an edge is ``"residual"`` along a stream, and ``"queries"`` or ``"keys"`` from the node of a stream to an
  attention that reads it.
"""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path

import networkx as nx

from madtp.atomic_files import replacing_file
from madtp.errors import DataError

SUFFIXES = (".png", ".svg", ".pdf", ".dot")
COLOURS = {"image": "#cfe3fb", "text": "#fde6c4", "joint": "#d9f0d9", "audio": "#ecdcf7"}
OTHER = "#e9ebee"
STREAM = "stream"
_COLUMN, _ROW = 3.3, 0.62  # inches between nodes


def draw_graph(graph: nx.DiGraph, path: Path) -> Path:
    """Write the graph to ``path``, in the format of its suffix, and return the path.

    Raises:
        DataError: if the graph is empty, or the suffix is not one of :data:`SUFFIXES`.
    """
    if path.suffix not in SUFFIXES:
        raise DataError(f"{path} ends in {path.suffix!r}; a graph is written as one of {', '.join(SUFFIXES)}.")
    if not graph:
        raise DataError("the graph holds no blocks, so there is nothing to draw.")
    with replacing_file(path) as draft:
        if path.suffix == ".dot":
            draft.write_text(to_dot(graph), encoding="utf-8")
        else:
            _plot(graph, draft)
    return path


def to_dot(graph: nx.DiGraph) -> str:
    """Return the graph in the language of Graphviz."""
    names = {node: f"n{index}" for index, node in enumerate(graph)}
    lines = ["digraph madtp {", "  rankdir=TB; node [shape=box, style=filled, fontname=Helvetica];"]
    for node, name in names.items():
        lines.append(f'  {name} [label="{_quoted(_label(graph, node))}", fillcolor="{_colour(graph, node)}"];')
    lines += [f"  {names[tail]} -> {names[head]};" for tail, head in drawn_edges(graph).edges]
    return "\n".join([*lines, "}", ""])


def drawn_edges(graph: nx.DiGraph) -> nx.DiGraph:
    """Return all nodes, with only the edges that are drawn.

    A node on a residual path needs no edge from its own stream. Keys from another stream are drawn from the last node of that
    stream, since cross-attention sees a finished encoder. Where streams attend to each other, they are drawn from the first.
    """
    drawn = nx.DiGraph()
    drawn.add_nodes_from(graph)
    roles = graph.edges(data="role")
    drawn.add_edges_from((tail, head) for tail, head, role in roles if role in ("residual", None))
    on_path = {head for _, head in drawn.edges}
    crossing = []
    for tail, head, role in roles:
        if role in ("residual", None):
            continue
        if _lane(graph, tail) != _lane(graph, head):
            crossing.append((tail, head))
        elif head not in on_path:
            drawn.add_edge(tail, head)
    moved = drawn.copy()
    moved.add_edges_from((_last(drawn, tail), head) for tail, head in crossing)
    if nx.is_directed_acyclic_graph(moved):
        return moved
    drawn.add_edges_from(crossing)
    return drawn


def layered_positions(graph: nx.DiGraph) -> dict[Hashable, tuple[float, float]]:
    """Return the column and row of each node: a column for each stream or modality, a row for each step from the inputs.

    Nodes that share a position stand side by side. A graph with cycles is laid out by its condensation.
    """
    condensed = nx.condensation(drawn_edges(graph))
    row = {
        node: depth
        for depth, generation in enumerate(nx.topological_generations(condensed))
        for component in generation
        for node in condensed.nodes[component]["members"]
    }
    lanes: dict[str, dict[int, list[Hashable]]] = {}
    for node in graph:
        lanes.setdefault(_lane(graph, node), {}).setdefault(row[node], []).append(node)
    positions: dict[Hashable, tuple[float, float]] = {}
    left = 0.0
    for rows in lanes.values():
        width = max(len(nodes) for nodes in rows.values())
        for depth, nodes in rows.items():
            for index, node in enumerate(nodes):
                positions[node] = (left + (width - len(nodes)) / 2 + index, float(depth))
        left += width
    return positions


def _plot(graph: nx.DiGraph, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    positions = layered_positions(graph)
    columns = max(x for x, _ in positions.values()) + 1
    rows = max(y for _, y in positions.values()) + 1
    figure = Figure(figsize=(max(4.0, columns * _COLUMN), max(2.0, rows * _ROW)), facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_xlim(-0.5, columns - 0.5)
    axes.set_ylim(rows - 0.4, -0.6)
    axes.axis("off")
    for tail, head in drawn_edges(graph).edges:
        arrow = {"arrowstyle": "-|>", "color": "#9aa1ad", "shrinkA": 9, "shrinkB": 13, "lw": 0.9}
        if positions[tail][0] == positions[head][0] and positions[head][1] - positions[tail][1] > 1:
            arrow["connectionstyle"] = "arc3,rad=0.25"  # around the nodes in between
        axes.annotate("", xy=positions[head], xytext=positions[tail], arrowprops=arrow)
    for node, (x, y) in positions.items():
        box = {"boxstyle": "round,pad=0.35", "facecolor": _colour(graph, node), "edgecolor": "#b6bcc6", "lw": 0.7}
        axes.text(x, y, _label(graph, node), ha="center", va="center", fontsize=7.5, bbox=box, zorder=3)
    figure.savefig(path, dpi=150)


def _last(paths: nx.DiGraph, node: Hashable) -> Hashable:
    """The end of the path that starts at a node."""
    seen = {node}
    while following := [head for head in paths.successors(node) if head not in seen]:
        node = following[0]
        seen.add(node)
    return node


def _label(graph: nx.DiGraph, node: Hashable) -> str:
    data = graph.nodes[node]
    if "label" in data:
        return str(data["label"])
    kind = data.get("kind")
    if kind == STREAM:
        return f"{node}: {data.get('modality', 'tokens')}, width {data.get('width', '?')}"
    return f"{node}\n{kind}-attention" if kind else str(node)


def _lane(graph: nx.DiGraph, node: Hashable) -> str:
    """The stream of a node; the node of a stream shares the lane of the self-attention that it feeds."""
    data = graph.nodes[node]
    if data.get("kind") == STREAM:
        fed = [graph.nodes[head] for head in graph.successors(node)]
        own = [other.get("stream") for other in fed if other.get("kind") == "self"]
        return str(own[0]) if own else str(node)
    return str(data.get("stream", data.get("modality", "")))


def _colour(graph: nx.DiGraph, node: Hashable) -> str:
    """The colour of the modality of a node, or of its stream."""
    modality = graph.nodes[node].get("modality")
    if modality is None:
        tails = graph.predecessors(node)
        owners = (t for t in tails if graph.nodes[t].get("kind") == STREAM and _lane(graph, t) == _lane(graph, node))
        modality = next((graph.nodes[tail].get("modality") for tail in owners), None)
    return COLOURS.get(str(modality), OTHER)


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
