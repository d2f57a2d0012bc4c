"""Insert the start of a stream, where image tokens that their vision tower has dropped are left out: :func:`insert_start`.

It stands at the input of the first block that is pruned of a stream whose image tokens were written among its words: a language
model that is a region of its own. Where a whole model is one graph, what the tower has dropped never gets there.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from torch import Tensor, fx

from madtp.sites.stream_start import SUFFIX
from rewriters.axes.labels import seed
from rewriters.graph.nodes import example_size, op_name
from rewriters.graph.walk import ancestors
from rewriters.insert.scoring import SITES
from rewriters.insert.workspace import InsertedSite, Insertion, site_key
from rewriters.plan.plan import SitePlan

TEMPLATES = frozenset("zeros_like ones_like empty_like full_like new_zeros new_ones new_empty new_full".split())
"""Operations that take the form of a tensor alone."""


@dataclass(frozen=True)
class StreamStartPlace:
    """Where a stream starts.

    Attributes:
        site: Its first site.
        value: The residual value at the input of that site's block.
        attention: The attention of the block.
        behind: The residual value behind it.
    """

    site: SitePlan
    value: fx.Node
    attention: fx.Node
    behind: fx.Node

    @property
    def name(self) -> str:
        """The name of the state of the tokens that enter."""
        return self.site.name + SUFFIX


def starts_of(graph: fx.Graph, sites: Iterable[SitePlan], whole: Collection[int]) -> list[StreamStartPlace]:
    """Return the starts of streams with image tokens among words.

    Args:
        graph: The captured graph.
        sites: All sites, in the order of the graph.
        whole: Streams that begin with all of their tokens.
    """
    nodes = {n.name: n for n in graph.nodes}
    first: dict[int, SitePlan] = {}
    for site in sites:
        first.setdefault(site.stream, site)
    return [
        StreamStartPlace(site, nodes[site.block_input], nodes[site.attention], nodes[site.value])
        for stream, site in first.items()
        if stream not in whole and site.mask is not None and (site.batch_dim, site.token_dim) == (0, 1)
    ]


def insert_start(insertion: Insertion, place: StreamStartPlace) -> None:
    """Let the block at ``place`` read the tokens that enter; what else reads its input reads all of them."""
    graph, value = insertion.graph, place.value
    readers = _readers(place)
    if not readers:
        return
    with graph.inserting_before(min(readers)):
        call = graph.call_module(f"{SITES}.{site_key(place.site.name)}.start", (value,))
        entering = graph.call_function(operator.getitem, (call, 0))
        state = graph.call_function(operator.getitem, (call, 1))
    call.meta["nn_module_stack"] = place.behind.meta.get("nn_module_stack", {})
    entering.meta = {"val": value.meta["val"], "nn_module_stack": call.meta["nn_module_stack"]}
    for reader in readers:
        reader.replace_input_with(value, entering)
    shape = [example_size(size) for size in value.meta["val"].shape]
    insertion.labels[entering] = seed(shape, 0, 1, place.name)
    insertion.states[place.name] = state
    insertion.replaced[value] = entering
    insertion.sites[place.name] = InsertedSite(value, None, value)
    insertion.site_values.add(value)


def _readers(place: StreamStartPlace) -> list[fx.Node]:
    """What of the block reads tokens: not what takes their number, or makes a mask of their form."""
    within = set(ancestors(place.attention, place.behind, through=lambda node: node is not place.value))
    shape = place.value.meta["val"].shape

    def along(node: fx.Node) -> bool:
        made = node.meta.get("val")
        same = isinstance(made, Tensor) and made.dtype.is_floating_point and made.shape[:2] == shape[:2]
        return same and op_name(node) not in TEMPLATES

    return [node for node in place.value.users if node in within and along(node)]


def is_start(source: object) -> bool:
    """Whether a source of tokens is the start of a stream."""
    return isinstance(source, str) and source.endswith(SUFFIX)
