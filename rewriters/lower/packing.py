"""Packing: pruned streams as packed rows, with no padding slot anywhere.

Start at :func:`pack`. Insertion leaves a graph in the padded form ``[B, N, C]``, in which only sites give packed rows. This
pass walks it once in order and lets every operation that has a rule (``packed_rules.py``) run on rows ``[1, T, C]``. Where an
operation has none, its operands are brought to the padded form, and its result is packed again as soon as a packed value
meets it. So the pass cannot fail, and what it could not pack it lists.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import fx
from torch.fx.node import Argument

from madtp.config import PruningConfig, follows_tokens
from madtp.tokens import packing as runtime
from madtp.tokens import state as padded_runtime
from madtp.tokens.attention import attention
from madtp.tokens.packed_attention import packed_attention
from rewriters.axes.labels import Labels, ResultLabels
from rewriters.axes.sources import BatchPart, Source
from rewriters.graph.functional import has_effect
from rewriters.graph.nodes import AxisError, call_argument, op_name, operand
from rewriters.graph.walk import ancestors
from rewriters.insert.scoring import SITES
from rewriters.insert.workspace import Insertion
from rewriters.lower.packed_rules import ALIGNING, RULES, Layout, NotPacked, PackedNode, layout_of

OPTIONS = "an option of the authors' code reads masks or tokens by their slots"


def pack(insertion: Insertion, config: PruningConfig) -> tuple[str, ...]:
    """Pack the streams of a graph behind their first sites, in place.

    Args:
        insertion: The graph, priced already: labels are those of the padded form.
        config: Options of the authors' code that go by slots keep the padded form.

    Returns:
        Why values are brought to the padded form within a stream, and how often. Readouts do not count.
    """
    packer = _Packer(insertion, follows_tokens(config))
    for node in list(insertion.graph.nodes):
        packer.visit(node)
    insertion.graph.eliminate_dead_code(
        is_impure_node=lambda n: n.op in ("placeholder", "output", "call_module") or has_effect(n)
    )
    insertion.graph.lint()
    if not packer.enabled:
        return (OPTIONS,) if insertion.sites else ()
    return tuple(f"{reason} ({count} times)" for reason, count in packer.padded.items())


class _Conversion(NamedTuple):
    """Functions from one form to the other, for values with samples and tokens in dimensions of their own, and folded."""

    unfolded: Callable[..., object]
    folded: Callable[..., object]


_TO_ROWS = _Conversion(runtime.to_rows, runtime.folded_to_rows)
_TO_SLOTS = _Conversion(runtime.to_slots, runtime.folded_to_slots)


class _Packer:
    """Packs one graph.

    Attributes:
        packed: Values in the packed form, with their layouts; one layout for each result of an operation with several.
        slots: The padded form of packed values, as far as it was needed.
        rows: The packed form of padded values, as far as it was needed.
    """

    def __init__(self, insertion: Insertion, enabled: bool) -> None:
        self.insertion, self.graph, self.enabled = insertion, insertion.graph, enabled
        self.padded: Counter[str] = Counter()
        self.packed: dict[fx.Node, Layout | tuple[Layout | None, ...]] = {}
        self.slots: dict[fx.Node, fx.Node] = {}
        self.rows: dict[fx.Node, fx.Node] = {}
        self.site_outputs: set[fx.Node] = set()

    def visit(self, node: fx.Node) -> None:
        """Pack ``node``, or bring its operands to the padded form."""
        if node.op == "call_module" and str(node.target).startswith(f"{SITES}."):
            self._visit_site(node)
            return
        if node.target is operator.getitem and node.args[0] in self.site_outputs:
            self._visit_site_result(node)
            return
        operands = [n for n in node.all_input_nodes if n in self.packed]
        if not operands:
            return
        if op_name(node) == "sym_size":
            self._visit_size(node)
            return
        try:
            self._run_on_rows(node)
        except (NotPacked, AxisError) as error:
            self._run_on_slots(node, str(error))

    def _visit_site(self, node: fx.Node) -> None:
        _, _, child = str(node.target).removeprefix(f"{SITES}.").partition(".")
        if child == "attention":
            self._visit_site_attention(node)
        elif child == "start":
            self.site_outputs.add(node)
        elif child:
            self._run_on_slots(node, "attention in windows, or in a spelling of its own")
        else:
            for position in (0, 1):
                value = operand(node, position)
                layout = self._layout(value)
                if layout is not None and value not in self.packed:
                    node.update_arg(position, self._to_rows(value, layout, node))
            self._run_on_slots(node, "", but=node.args[:2])
            self.site_outputs.add(node)

    def _visit_site_result(self, node: fx.Node) -> None:
        """The result of a site's module, or that of its packed attention, is a packed value."""
        layout = self._layout(node)
        if layout is not None:
            self.packed[node] = layout

    def _visit_site_attention(self, node: fx.Node) -> None:
        """The self-attention in front of a site; that of the first site of a stream runs on all tokens."""
        state = node.kwargs.get("state")
        if state is None:
            return
        reason = self._why_not_attention(node, node.args[:3])
        if reason:
            self._run_on_slots(node, reason)
            return
        self._pack_operands(node, node.args[:3])
        node.target = f"{node.target}"[: -len("attention")] + "packed_attention"
        node.kwargs = {name: value for name, value in node.kwargs.items() if name != "present_mask"}
        self.site_outputs.add(node)

    def _why_not_attention(self, node: fx.Node, along: Sequence[Argument]) -> str:
        """Why an attention cannot run on packed rows; empty if it can. ``along`` are its operands along tokens."""
        if not self.enabled:
            return OPTIONS
        if node.kwargs.get("present_mask") is not None or (
            len(node.args) > 3 and self._layout(node.args[3]) is not None
        ):
            return "an attention bias that is computed from the tokens"
        for value in along:
            layout = self._layout(value)
            if layout is None or not layout.stands_at(2, 0):
                return "attention whose heads are folded into the batch"
        return ""

    def _visit_size(self, node: fx.Node) -> None:
        value, dim = operand(node), call_argument(node, 1, "dim", 0)
        layout = self.packed[value]
        if not isinstance(layout, Layout) or not isinstance(dim, int):
            return
        if dim != layout.batch_dim:
            return
        if layout.folded:
            self._run_on_slots(node, "the size of a folded batch")
            return
        with self.graph.inserting_before(node):
            size = self.graph.call_function(runtime.batch_size, (self._state(layout.source, node),))
            if layout.heads > 1:
                size = self.graph.call_function(operator.mul, (size, layout.heads))
        node.replace_all_uses_with(size)

    def _run_on_rows(self, node: fx.Node) -> None:
        """Let ``node`` run on packed rows; raises :class:`NotPacked` if it cannot."""
        if not self.enabled:
            raise NotPacked(OPTIONS)
        if node.target is attention:
            self._pack_attention(node)
        elif node.target in _REPLACEMENTS:
            self._pack_readout(node)
        elif node.target is padded_runtime.restore:
            self._pack_restoration(node)
        elif node.target is operator.getitem:
            self._pack_item(node)
        elif self._cuts_batch(node):
            self._cut_batch(node)
        else:
            self._pack_by_rule(node)

    def _pack_by_rule(self, node: fx.Node) -> None:
        rule = RULES.get(op_name(node))
        layouts = self._layouts(node)
        if rule is None or layouts is None:
            raise NotPacked(f"no packed form of {op_name(node)}")
        sources = {layout.source for layout in _present(layouts)}
        along = [n for n in node.all_input_nodes if self.insertion.labels.get(n) is not None]
        for value in along:
            own = self._layouts(value)
            if own is None or {layout.source for layout in _present(own)} != sources or len(sources) != 1:
                raise NotPacked(f"{op_name(node)} joins tokens of different states")
        gathered = (padded_runtime.align, padded_runtime.realign)
        if rule not in ALIGNING and any(n.target in gathered for n in node.all_input_nodes):
            raise NotPacked(f"{op_name(node)} takes a side input that is gathered along the tokens")
        before = node.target, node.args, node.kwargs
        self._pack_operands(node, along)
        try:
            # Operands along tokens may have been replaced: the rule finds the labels of their packed forms.
            rule(PackedNode(self.graph, node, self.insertion.labels, lambda source: self._state(source, node)))
        except (NotPacked, AxisError):
            node.target, node.args, node.kwargs = before
            raise
        self.packed[node] = layouts

    def _pack_attention(self, node: fx.Node) -> None:
        """Attention with queries, keys or both on packed rows."""
        states = {name: node.kwargs.get(name) for name in ("query_state", "key_state")}
        along: list[Argument] = []
        if states["query_state"] is not None:
            along.append(node.args[0])
        if states["key_state"] is not None:
            along.extend(node.args[1:3])
        reason = self._why_not_attention(node, along)
        if reason:
            raise NotPacked(reason)
        self._pack_operands(node, along)
        node.target = packed_attention
        node.kwargs = {name: value for name, value in node.kwargs.items() if name != "present_mask"}
        layout = self._layout(node)
        if states["query_state"] is not None and layout is not None:
            self.packed[node] = layout

    def _pack_readout(self, node: fx.Node) -> None:
        """One token of each sample."""
        _, _, dim, batch_dim, *_ = node.args
        layout = self.packed[operand(node)]
        if not isinstance(layout, Layout) or not layout.stands_at(dim, batch_dim):
            raise NotPacked("a readout where the batch is folded")
        node.target = _REPLACEMENTS[node.target]

    def _pack_restoration(self, node: fx.Node) -> None:
        """All tokens at their original positions."""
        values, _, dim, batch_dim, earlier = node.args
        pairs = (
            [pair for pair in earlier if isinstance(pair, (list, tuple))] if isinstance(earlier, (list, tuple)) else []
        )
        along = [values, *(value for value, state in pairs if state is not None)]
        for value in along:
            layout = self._layout(value)
            if layout is None or not layout.stands_at(dim, batch_dim):
                raise NotPacked("tokens that are restored along another dimension")
        if any(state is None and value in self.packed for value, state in pairs):
            raise NotPacked("tokens that are restored from those of another stream")
        self._pack_operands(node, along)
        node.target = runtime.restore_rows

    def _pack_item(self, node: fx.Node) -> None:
        layouts = self.packed[operand(node)]
        assert isinstance(layouts, tuple)
        assert isinstance(node.args[1], int)
        layout = layouts[node.args[1]]
        if layout is not None:
            self.packed[node] = layout

    def _cuts_batch(self, node: fx.Node) -> bool:
        """Whether ``node`` gives parts of the batch of its operand."""
        if op_name(node) not in _BATCH_CUTS:
            return False
        layout, layouts = self.packed.get(operand(node)), self._layouts(node)
        if layouts is None or not isinstance(layout, Layout):
            return False
        return any(isinstance(p.source, BatchPart) and p.source.parent == layout.source for p in _present(layouts))

    def _cut_batch(self, node: fx.Node) -> None:
        values, name = operand(node), op_name(node)
        layout, layouts = self.packed[values], self._layouts(node)
        if not isinstance(layout, Layout) or layout.heads != 1 or layout.folded or layouts is None:
            raise NotPacked("parts of a batch that is folded")
        sizes = node.args[1:2]
        if name == "slice":
            if call_argument(node, 4, "step", 1) != 1:
                raise NotPacked("every other sample")
            sizes = (call_argument(node, 2, "start", None), call_argument(node, 3, "end", None))
        for part in _present(layouts):  # while the node still says how it cuts
            self.insertion.state(part.source, node)
        node.args = (values, self._state(layout.source, node), *sizes, layout.token_dim, layout.batch_dim)
        node.kwargs = {}
        node.target = _BATCH_CUTS[name]
        self.packed[node] = layouts

    def _pack_operands(self, node: fx.Node, along: Sequence[Argument]) -> None:
        for value in along:
            assert isinstance(value, fx.Node)
            layout = self._layout(value)
            if value not in self.packed and layout is not None:
                node.replace_input_with(value, self._to_rows(value, layout, node))

    def _run_on_slots(self, node: fx.Node, reason: str, but: tuple[Argument, ...] = ()) -> None:
        """Bring the operands of ``node`` to the padded form, all ``but`` some."""
        for value in list(node.all_input_nodes):
            if value not in self.packed or value in but:
                continue
            if reason and self.insertion.labels.get(node) is not None:
                self.padded[reason] += 1
            node.replace_input_with(value, self._to_slots(value, node))

    def _to_slots(self, value: fx.Node, before: fx.Node) -> fx.Node:
        layout = self.packed[value]
        if value not in self.slots:
            if not isinstance(layout, Layout):
                raise AxisError(f"several values in the packed form at {value.name}")
            with self.graph.inserting_before(before):
                self.slots[value] = self._convert(_TO_SLOTS, value, layout, before)
        return self.slots[value]

    def _to_rows(self, value: fx.Node, layout: Layout, before: fx.Node) -> fx.Node:
        if value not in self.rows:
            with self.graph.inserting_before(before):
                new = self._convert(_TO_ROWS, value, layout, before)
            self.rows[value] = new
            known = self.insertion.labels.get(value)
            assert known is not None
            self.insertion.labels[new], self.packed[new] = known, layout
        return self.rows[value]

    def _state(self, source: Source, before: fx.Node) -> fx.Node:
        """The node of a token state, which is moved in front of ``before`` if it stands behind."""
        state = self.insertion.state(source, before)
        late = ancestors(state, among=lambda node: node.op != "placeholder" and not node < before)
        for node in sorted(late):
            if not node < before:
                before.prepend(node)
        return state

    def _convert(self, how: _Conversion, value: fx.Node, layout: Layout, before: fx.Node) -> fx.Node:
        state = self._state(layout.source, before)
        if layout.folded:
            new = self.graph.call_function(how.folded, (value, state, layout.token_dim, layout.tokens_first))
        else:
            new = self.graph.call_function(
                how.unfolded, (value, state, layout.token_dim, layout.batch_dim, layout.heads)
            )
        if "val" in value.meta:
            new.meta["val"] = value.meta["val"]
        return new

    def _layout(self, value: object) -> Layout | None:
        layouts = self._layouts(value)
        return layouts if isinstance(layouts, Layout) else None

    def _layouts(self, value: object) -> Layout | tuple[Layout | None, ...] | None:
        """The layout of a value along pruned tokens, or of each of its results; None if it has no packed form."""
        known = self.insertion.labels.get(value) if isinstance(value, fx.Node) else None
        if isinstance(known, ResultLabels):
            several = tuple(self._layout_with_state(labels) for labels in known)
            wanted = [labels.any_tokens() for labels in known]
            fit = all(layout is not None or not any_tokens for layout, any_tokens in zip(several, wanted, strict=True))
            return several if fit and any(wanted) else None
        return None if known is None else self._layout_with_state(known)

    def _layout_with_state(self, labels: Labels) -> Layout | None:
        layout = layout_of(labels)
        return layout if layout is not None and self._has_rows(layout.source) else None

    def _has_rows(self, source: Source) -> bool:
        """Whether rows of a state are those of a site, in some samples: what was cut or joined along tokens has none."""
        while isinstance(source, BatchPart):
            source = source.parent
        return isinstance(source, str) and source in self.insertion.states


def _present(layouts: Layout | tuple[Layout | None, ...]) -> list[Layout]:
    return [layouts] if isinstance(layouts, Layout) else [layout for layout in layouts if layout is not None]


_REPLACEMENTS: dict[object, Callable[..., object]] = {
    padded_runtime.read_position: runtime.read_position_of_rows,
    padded_runtime.read_each: runtime.read_each_of_rows,
}
_BATCH_CUTS: dict[str, Callable[..., object]] = {
    "chunk": runtime.chunk_rows,
    "split": runtime.split_rows,
    "split_with_sizes": runtime.split_rows,
    "slice": runtime.slice_rows,
}
