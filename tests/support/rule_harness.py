"""Run one operation as the rewriter would leave it, and compare with experiments that know nothing of rules.

Start at :func:`check``. A :class:``Sample` is one call of an ATen operation on tensors of which some run along tokens. Two
experiments:

* *change one token*: the values of one token of one sample change; the output may change where its labels say that token
  stands, and nowhere else;
* *prune*: tokens are gathered, the call is repaired as the rewriter repairs it, and the output must be what the original call
  gave, gathered along the labels.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from madtp.tokens.state import TokenState
from rewriters.axes.labels import Axis, Factor, Labels, ResultLabels, axes_of, dim_size, has_tokens
from rewriters.axes.outcome import Outcome
from rewriters.axes.readouts import BatchReadout, MaskedMeanReadout, PoolingReadout
from rewriters.axes.sources import Concatenation, Cut, Rest, Source, TokenRange
from rewriters.axes.table import apply
from rewriters.insert.insert import _repair
from rewriters.insert.restoration import Restoration
from rewriters.insert.workspace import Insertion
from rewriters.plan.plan import Plan

BATCH, TOKENS = 3, 6
BATCH_AXIS, TOKEN_AXIS, OTHER_AXIS = Axis("batch", "s"), Axis("tokens", "s"), Axis("tokens", "t")


@dataclass(frozen=True, eq=False)
class Operand:
    """A tensor operand.

    ``dims`` gives its sizes: "B" and "N" stand for batch and tokens, "M" for another stream's tokens, a tuple for a folded
    dimension. ``kind``: "float", "bool", "long" (small numbers), "complex", "arange", "mask" (boolean; shows at least
    the first key), "kept" (positions of tokens that survive).
    """

    dims: tuple[Any, ...]
    kind: str = "float"

    @property
    def labels(self) -> Labels:
        """Labels of the operand."""
        return Labels(tuple(_factor(f) for f in (d if isinstance(d, tuple) else (d,))) for d in self.dims)

    @property
    def tracked(self) -> bool:
        """Whether it runs along tokens."""
        return any(axes_of(d) for d in self.labels)

    def value(self, generator: torch.Generator) -> Tensor:
        """Random values; positive, so that logarithms and roots are numbers."""
        shape = [dim_size(d) for d in self.labels]
        if self.kind == "bool":
            return torch.rand(shape, generator=generator) < 0.5
        if self.kind == "mask":
            return (torch.rand(shape, generator=generator) < 0.5) | (torch.arange(shape[-1]) == 0)
        if self.kind == "kept":
            return torch.randint(0, 2, shape, generator=generator)
        if self.kind == "long":
            return torch.randint(0, 4, shape, generator=generator)
        if self.kind == "arange":
            return torch.arange(shape[0])
        if self.kind == "complex":
            return torch.complex(*(torch.rand(shape, generator=generator) for _ in range(2)))
        return torch.rand(shape, generator=generator) * 0.8 + 0.1


def _factor(size: Any) -> Factor:
    if size == "B":
        return Factor(BATCH_AXIS, BATCH)
    if size in ("N", "M"):
        return Factor(TOKEN_AXIS if size == "N" else OTHER_AXIS, TOKENS)
    return Factor(None, size)


@dataclass(frozen=True)
class Sample:
    """One call. ``args`` may nest operands in lists. ``constant``: the output does not depend on values (ones_like)."""

    target: Any
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...] = ()
    constant: bool = False

    @property
    def name(self) -> str:
        """Name of the operation, as the rule table has it."""
        packet = getattr(self.target, "overloadpacket", None)
        return str(packet.__name__ if packet is not None else self.target.__name__)

    def operands(self) -> list[Operand]:
        """All tensor operands, once each."""
        return list(dict.fromkeys(x for x in pytree.tree_leaves(self.args) if isinstance(x, Operand)))


def sample(target: Any, *args: Any, constant: bool = False, **kwargs: Any) -> Sample:
    """A sample from call arguments."""
    return Sample(target, args, tuple(kwargs.items()), constant)


@dataclass
class Setup:
    """A graph with the one call; ``node`` is the call, ``insertion`` what the rewriter knows of it."""

    graph: fx.Graph
    places: dict[Operand, fx.Node]
    state: fx.Node
    node: fx.Node
    insertion: Insertion


def build(one: Sample) -> Setup:
    """The graph of a sample, with the values of fake tensors on every node."""
    graph = fx.Graph()
    generator = torch.Generator().manual_seed(0)
    insertion = Insertion(graph, Plan((), (), 1, 1, "interleaved"))
    state = graph.placeholder("state")
    insertion.states["s"] = state
    places: dict[Operand, fx.Node] = {}
    with FakeTensorMode() as mode:
        for position, operand in enumerate(one.operands()):
            if operand.kind == "arange":
                node = graph.call_function(torch.ops.aten.arange.default, (BATCH,))
            else:
                node = graph.placeholder(f"x{position}")
            node.meta["val"] = mode.from_tensor(operand.value(generator))
            places[operand] = node
            if operand.tracked:
                insertion.labels[node] = operand.labels
        args = pytree.tree_map(lambda a: places[a] if isinstance(a, Operand) else a, one.args)
        node = graph.call_function(one.target, args, dict(one.kwargs))
        fakes = pytree.tree_map(lambda a: a.meta["val"] if isinstance(a, fx.Node) else a, (args, dict(one.kwargs)))
        node.meta["val"] = one.target(*fakes[0], **fakes[1])
    return Setup(graph, places, state, node, insertion)


def outcome(one: Sample) -> Outcome:
    """What the rule table says about a sample; raises AxisError where it refuses."""
    made = build(one)
    return apply(made.node, made.insertion.labels)


def call(one: Sample, values: dict[Operand, Tensor]) -> list[Tensor]:
    """The results of the call itself."""
    args = pytree.tree_map(lambda a: values[a] if isinstance(a, Operand) else a, one.args)
    result = one.target(*args, **dict(one.kwargs))
    return list(result) if isinstance(result, (list, tuple)) else [result]


def check(one: Sample, seed: int = 0) -> None:
    """Both experiments."""
    generator = torch.Generator().manual_seed(seed)
    values = {o: o.value(generator) for o in one.operands()}
    _change_one_token(one, values, generator)
    _prune(one, values, generator)


def _change_one_token(one: Sample, values: dict[Operand, Tensor], generator: torch.Generator) -> None:
    found = outcome(one)
    if found.labels is None:
        return
    labels = list(found.labels) if isinstance(found.labels, ResultLabels) else [found.labels]
    before = call(one, values)
    for row in range(BATCH):
        for token in range(TOKENS):
            changed = {o: _changed(o, v, row, token) for o, v in values.items()}
            rows = _rows(found, one)
            for part, (old, new, own) in enumerate(zip(before, call(one, changed), labels, strict=True)):
                different = ~torch.isclose(old, new, rtol=0, atol=0, equal_nan=True)
                allowed = _places(own, [r == row for r in rows[part]], token)
                assert not bool((different & ~allowed).any()), f"{one.name}: token {token} of sample {row} leaks"
                if (
                    not one.constant
                    and found.readout is None
                    and old.is_floating_point()
                    and bool(allowed.any())
                    and not bool(allowed.all())
                ):
                    assert bool(different.any()), f"{one.name}: token {token} of sample {row} has no effect"


def _rows(found: Outcome, one: Sample) -> list[list[int]]:
    """Which samples the rows of each result are."""
    everything = list(range(BATCH))
    if not isinstance(found.readout, BatchReadout):
        return [everything] * (len(found.labels) if isinstance(found.labels, ResultLabels) else 1)
    if one.name == "repeat_interleave":
        return [[row for row in everything for _ in range(one.args[1])]]
    if one.name == "slice":
        return [everything[one.args[2] : one.args[3]]]
    sizes = found.readout.sizes
    return [everything[sum(sizes[:part]) : sum(sizes[: part + 1])] for part in range(len(sizes))]


def _changed(operand: Operand, value: Tensor, row: int, token: int) -> Tensor:
    if not any(has_tokens(d) for d in operand.labels):
        return value
    place = _places(operand.labels, [r == row for r in range(BATCH)], token)
    other = ~value if value.dtype == torch.bool else value + 1 if value.dtype == torch.long else value * 0.5 + 0.03
    return torch.where(place, other, value)


def _places(labels: Labels, rows: list[bool], token: int) -> Tensor:
    """Mask of the elements that belong to a token of some rows by the labels."""
    shape = [f.size for dim in labels for f in dim]
    mask = torch.ones(shape, dtype=torch.bool)
    position = 0
    for dim in labels:
        for factor in dim:
            if factor.axis is not None:
                line = derived(factor.axis.source, torch.arange(TOKENS) == token, False)
                line = torch.tensor(rows) if factor.axis.kind == "batch" else line
                mask = mask & line.reshape([-1 if d == position else 1 for d in range(len(shape))])
            position += 1
    return mask.reshape([dim_size(d) for d in labels])


def derived(source: Source, base: Tensor, fill: bool) -> Tensor:
    """What a line over all tokens [N] becomes along a derived axis; ``fill`` at tokens that come from elsewhere."""
    if isinstance(source, Concatenation):
        sizes = [n.meta["val"].shape[source.node.args[1]] for n in source.node.args[0]]
        parts = [
            torch.full((size,), fill) if parent is None else derived(parent, base, fill)
            for parent, size in zip(source.parents, sizes, strict=True)
        ]
        return torch.cat(parts)
    if not isinstance(source, Cut):
        return base
    line = derived(source.parent, base, fill)
    if isinstance(source, Rest):
        return line[source.start :]
    return line[source.start : source.end] if isinstance(source, TokenRange) else line


def _prune(one: Sample, values: dict[Operand, Tensor], generator: torch.Generator) -> None:
    """Tokens 0 and 1 and the last survive everywhere, of the rest one that differs by sample."""
    index = torch.stack([torch.tensor(sorted({0, 1, 2 + row % 2, TOKENS - 1})) for row in range(BATCH)])
    state = TokenState(
        full_length=TOKENS,
        length=index.shape[1],
        batch=BATCH,
        index=index,
        merged=torch.zeros_like(index, dtype=torch.bool),
    )
    made = build(one)
    restoration = Restoration(made.insertion, frozenset())
    result = _repair(made.insertion, made.node, restoration)
    labels: Any = made.insertion.labels.get(result)
    nodes = [result]
    several = isinstance(result.meta["val"], (list, tuple))
    if several:
        with made.graph.inserting_after(result):
            nodes = [made.graph.call_function(operator.getitem, (result, i)) for i in range(len(result.meta["val"]))]
    made.graph.output(tuple(nodes))
    made.graph.lint()
    module = fx.GraphModule(nn.Module(), made.graph)
    inputs = [take(v, o.labels, index) if o.tracked else v for o, v in values.items() if o.kind != "arange"]
    found = module(state, *inputs)
    readout = outcome(one).readout
    pooled = isinstance(readout, (PoolingReadout, MaskedMeanReadout))
    wanted = call(one, _pooled_values(one, values, index) if pooled else values)
    rows = _rows(outcome(one), one)
    for part, (have, want) in enumerate(zip(found, wanted, strict=True)):
        if not isinstance(have, Tensor):
            assert have == want
            continue
        own = labels[part] if several and labels is not None else labels
        if own is not None:
            want = take(want, own, index[rows[part]])
        assert have.shape == want.shape, f"{one.name}: {tuple(have.shape)} instead of {tuple(want.shape)}"
        assert torch.allclose(have, want, atol=1e-6, equal_nan=True), one.name


def _pooled_values(one: Sample, values: dict[Operand, Tensor], index: Tensor) -> dict[Operand, Tensor]:
    """Pooling runs over survivors: weights move with the tokens."""
    found = {}
    for operand, value in values.items():
        labels = operand.labels if operand.tracked else one.operands()[0].labels
        full = value if operand.tracked else value.expand([dim_size(d) for d in labels])
        found[operand] = take(full, labels, index)
    return found


def take(value: Tensor, labels: Labels, index: Tensor) -> Tensor:
    """``value`` with the tokens ``index`` [B, N'] of each sample, by the labels."""
    factors = [f for dim in labels for f in dim]
    axes = {f.axis.kind: p for p, f in enumerate(factors) if f.axis is not None}
    if "tokens" not in axes:
        return value
    flat = value.reshape([f.size for f in factors])
    moved = flat.movedim((axes["batch"], axes["tokens"]), (0, 1))
    source = next(f.axis.source for f in factors if f.axis is not None and f.axis.kind == "tokens")
    kept = torch.zeros(len(index), TOKENS, dtype=torch.bool).scatter(1, index, True)
    own = torch.stack([derived(source, row, True).nonzero().squeeze(1) for row in kept[: moved.shape[0]]])
    picked = moved[torch.arange(moved.shape[0])[:, None], own].movedim((0, 1), (axes["batch"], axes["tokens"]))
    sizes = iter(picked.shape)
    shape = []
    for dim in labels:
        size = 1
        for _ in dim:
            size *= next(sizes)
        shape.append(size)
    return picked.reshape(shape)
