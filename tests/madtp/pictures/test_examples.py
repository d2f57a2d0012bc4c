"""Pictures: what is faded, which layers are shown, and that files hold what they should."""

from __future__ import annotations

import re
from pathlib import Path

import networkx as nx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from madtp.errors import DataError
from madtp.pictures import Example, KeptPatches, Measurement, draw_figure, fade_dropped, write_page
from madtp.pictures.graph import COLOURS, draw_graph, drawn_edges, layered_positions, to_dot
from madtp.pictures.page import format_macs, format_tokens


def _example() -> Example:
    kept = tuple(torch.arange(16).expand(2, 16) < count for count in (12, 5, 2))
    patches = KeptPatches("pruned −80%", ("layer 1", "layer 2", "layer 3"), kept)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    return Example("<b>is</b> it red?", True, images, (("dense", True), ("pruned −80%", False)), (patches,))


MEASUREMENTS = (
    Measurement("dense", 0.95, 200e6, 0.0, (17.0,) * 3, (9.0,), 3.0),
    Measurement("pruned −80%", 0.94, 40e6, 0.8, (12.4, 5.0, 2.0), (6.0,), 2.0),
)


@given(side=st.integers(1, 6), patch=st.integers(1, 5), data=st.data())
def test_kept_patches_are_untouched_and_dropped_ones_paler(side: int, patch: int, data: st.DataObject) -> None:
    kept = torch.tensor(data.draw(st.lists(st.booleans(), min_size=side * side, max_size=side * side)))
    image = torch.randint(0, 200, (3, side * patch, side * patch), dtype=torch.uint8)
    faded = fade_dropped(image, kept).permute(2, 0, 1)
    assert faded.shape == image.shape
    for index, stays in enumerate(kept.tolist()):
        top, left = index // side * patch, index % side * patch
        window = (slice(None), slice(top, top + patch), slice(left, left + patch))
        if stays:
            assert torch.equal(faded[window], image[window])
        else:
            assert (faded[window] > image[window]).all()


@pytest.mark.parametrize(("patches", "size"), [(15, 32), (16, 30), (0, 32)])
def test_masks_that_do_not_tile_the_image_are_refused(patches: int, size: int) -> None:
    with pytest.raises(DataError, match="do not tile"):
        fade_dropped(torch.zeros(3, size, size, dtype=torch.uint8), torch.ones(patches, dtype=torch.bool))


@given(count=st.integers(1, 40), most=st.integers(1, 8))
def test_chosen_layers_are_few_ordered_and_end_with_the_last(count: int, most: int) -> None:
    patches = KeptPatches("m", tuple(map(str, range(count))), (torch.ones(1, 4, dtype=torch.bool),) * count)
    chosen = patches.spread_layers(most)
    assert chosen == sorted(set(chosen))
    assert len(chosen) == min(count, most)
    assert chosen[-1] == count - 1
    assert most == 1 or chosen[0] == 0


def test_labels_and_masks_must_pair_up() -> None:
    with pytest.raises(DataError, match="one for each"):
        KeptPatches("m", ("layer 1",), ())


def test_the_figure_is_a_picture(tmp_path: Path) -> None:
    path = draw_figure([_example(), _example()], tmp_path / "new" / "figure.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_nothing_to_draw_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="at least one"):
        draw_figure([], tmp_path / "figure.png")
    with pytest.raises(DataError, match="at least one"):
        write_page([], MEASUREMENTS, tmp_path / "page.html", title="t", note="n")


def test_the_page_needs_nothing_from_outside_and_escapes_text(tmp_path: Path) -> None:
    page = write_page([_example()], MEASUREMENTS, tmp_path / "page.html", title="t & u", note="n").read_text("utf-8")
    assert "<script" not in page
    assert not re.search(r"(src|href)\s*=\s*['\"](?!data:)", page)
    assert "&lt;b&gt;is&lt;/b&gt;" in page
    assert "t &amp; u" in page
    assert page.count("data:image/png;base64,") == 2 * (1 + 3)
    assert "40.0 M" in page
    assert "−80.0%" in page


def test_numbers_are_printed_with_their_units() -> None:
    assert format_macs(132.54e9) == "132.54 G"
    assert format_macs(212.34e6) == "212.3 M"
    assert format_tokens((17.0, 17.0)) == "17 in each layer"
    assert format_tokens((12.4, 5.0)) == "12 5"


def _blocks() -> nx.DiGraph:
    graph = nx.DiGraph()
    for modality in ("image", "text"):
        for layer in range(3):
            graph.add_node(f"{modality}.{layer}", modality=modality, label=f'{modality} "{layer}"')
    graph.add_edges_from([("image.0", "image.1"), ("image.1", "image.2"), ("text.0", "text.1"), ("text.1", "text.2")])
    graph.add_edges_from(("image.2", f"text.{layer}") for layer in range(3))
    return graph


def test_a_graph_is_laid_out_from_inputs_down_without_collisions() -> None:
    graph = _blocks()
    places = layered_positions(graph)
    assert len(set(places.values())) == len(graph)
    assert all(places[tail][1] < places[head][1] for tail, head in graph.edges)


def test_a_graph_is_written_in_the_format_of_its_suffix(tmp_path: Path) -> None:
    assert draw_graph(_blocks(), tmp_path / "g.png").read_bytes().startswith(b"\x89PNG")
    dot = draw_graph(_blocks(), tmp_path / "g.dot").read_text()
    assert dot == to_dot(_blocks())
    assert dot.count("->") == 7
    assert r"image \"0\"" in dot


def test_a_graph_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"\.png"):
        draw_graph(_blocks(), tmp_path / "g.docx")
    with pytest.raises(DataError, match="no blocks"):
        draw_graph(nx.DiGraph(), tmp_path / "g.png")


def _network(*, mutual: bool) -> nx.DiGraph:
    """Streams and attentions as the rewriter's detection describes them."""
    graph = nx.DiGraph()
    for stream, modality in enumerate(("image", "text")):
        graph.add_node(f"stream {stream}", kind="stream", modality=modality, width=8)
    for stream, name in enumerate(("v", "t")):
        for layer in range(2):
            graph.add_node(f"{name}.{layer}", kind="self", stream=stream)
            graph.add_edge(f"stream {stream}", f"{name}.{layer}", role="keys")
    for name, stream, other in (("t.cross", 1, 0), ("v.cross", 0, 1))[: 2 if mutual else 1]:
        graph.add_node(name, kind="cross", stream=stream)
        graph.add_edge(f"stream {stream}", name, role="queries")
        graph.add_edge(f"stream {other}", name, role="keys")
    nx.add_path(graph, ["t.0", "t.1", "t.cross"], role="residual")
    nx.add_path(graph, ["v.0", "v.1", *(["v.cross"] if mutual else [])], role="residual")
    return graph


def test_keys_from_a_finished_stream_come_from_its_end() -> None:
    drawn = drawn_edges(_network(mutual=False))
    assert set(drawn.predecessors("t.cross")) == {"t.1", "v.1"}
    assert set(drawn.predecessors("v.1")) == {"v.0"}
    assert set(drawn.predecessors("v.0")) == {"stream 0"}


def test_streams_that_attend_to_each_other_are_drawn_without_a_cycle() -> None:
    drawn = drawn_edges(_network(mutual=True))
    assert nx.is_directed_acyclic_graph(drawn)
    assert "stream 0" in drawn.predecessors("t.cross")


@pytest.mark.parametrize("mutual", [False, True])
def test_a_stream_stands_in_one_column_in_the_colour_of_its_modality(mutual: bool) -> None:
    graph = _network(mutual=mutual)
    columns = {node: column for node, (column, _) in layered_positions(graph).items()}
    assert columns["stream 0"] == columns["v.0"] == columns["v.1"]
    assert columns["stream 1"] == columns["t.0"] == columns["t.cross"] != columns["v.0"]
    dot = to_dot(graph)
    assert dot.count(COLOURS["image"]) == 3 + mutual
    assert dot.count(COLOURS["text"]) == 4
