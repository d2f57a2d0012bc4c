"""Shapes that are found at once while a model is traced are those that torch derives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._decomp import decomposition_table
from torch._subclasses.fake_impls import op_implementations_dict
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, export
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from rewriters.capture import quick_shapes as module
from rewriters.capture.quick_shapes import quick_shapes

aten = torch.ops.aten


def facts(results: Any) -> list[tuple[Any, ...]]:
    """What is known of the results of an operation, sizes as expressions."""
    results = results if isinstance(results, tuple) else (results,)
    return [(str(x.shape), str(x.stride()), str(x.storage_offset()), x.dtype, x.device) for x in results]


def both_ways(op: Callable[..., Any], free: tuple[int, ...], x: Tensor, *args: Any) -> list[Any]:
    """The facts that torch derives and those found at once, or the kinds of errors; dimensions ``free`` of x have symbols."""
    found: list[Any] = []
    for quick in (False, True):
        mode = FakeTensorMode(shape_env=ShapeEnv())
        dims = [DimDynamic.DYNAMIC if d in free else DimDynamic.STATIC for d in range(x.dim())]
        fake = mode.from_tensor(x, symbolic_context=StatelessSymbolicContext(dynamic_sizes=dims))
        others = [mode.from_tensor(a, static_shapes=True) if isinstance(a, Tensor) else a for a in args]
        others = [a(fake) if callable(a) else a for a in others]
        with mode:
            try:
                if quick:
                    with quick_shapes():
                        found.append(facts(op(fake, *others)))
                else:
                    found.append(facts(op(fake, *others)))
            except Exception as error:
                found.append(type(error))
    return found


lengths = st.integers(2, 5)
types = st.sampled_from([torch.float32, torch.float64, torch.bfloat16])
options = st.sampled_from([None, torch.float32, torch.float64])


# An example takes a quarter of a second.
@settings(max_examples=6)
@given(lengths, lengths, st.integers(1, 4), types, options, st.booleans(), st.booleans())
def test_norms(b: int, n: int, c: int, kind: torch.dtype, own: torch.dtype | None, turned: bool, wrong: bool) -> None:
    x = torch.randn(n, b, c, dtype=kind).transpose(0, 1) if turned else torch.randn(b, n, c, dtype=kind)
    weight = None if own is None else torch.randn(c, dtype=own)
    usual, quick = both_ways(aten.native_layer_norm.default, (0, 1), x, [c + wrong], weight, weight, 1e-5)
    assert quick == usual


@given(lengths, lengths, lengths, types, st.booleans(), st.booleans())
def test_linear_layers(n: int, c: int, out: int, kind: torch.dtype, rows: bool, wrong: bool) -> None:
    bias = torch.randn((n, out) if rows else out, dtype=kind)

    def op(x: Tensor, bias: Tensor, weight: Tensor) -> Tensor:
        return aten.addmm.default(bias, x, weight.t())

    usual, quick = both_ways(op, (0,), torch.randn(n, c), bias, torch.randn(out, c + wrong))
    assert quick == usual


@pytest.mark.parametrize("op", [aten.view.default, aten._unsafe_view.default])
@pytest.mark.parametrize(
    "sizes",
    [
        lambda x: [x.shape[0] * x.shape[1], 6],
        lambda x: [x.shape[0], x.shape[1], 3, 2],
        lambda x: [x.shape[0], -1, 3],
        lambda x: [-1, 6],
        lambda x: [x.shape[0], 1, x.shape[1], 6],
        lambda x: [x.numel()],
        lambda x: [x.shape[0], 7],
        lambda x: [x.shape[0], 2 * x.shape[1], 6],
        lambda x: [6, x.shape[0], x.shape[1]],
        lambda x: list(x.shape),
    ],
)
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("offset", [0, 1])
def test_views(op: Callable[..., Any], sizes: Callable[[Tensor], list[Any]], turned: bool, offset: int) -> None:
    x = torch.randn(5, 4, 6).transpose(0, 1) if turned else torch.randn(4 + offset, 5, 6)[offset:]
    usual, quick = both_ways(op, (0, 1), x, sizes)
    assert quick == usual


def test_torch_has_its_own_ways_back_afterwards() -> None:
    before = dict(decomposition_table), dict(op_implementations_dict), torch._dynamo.config.fake_tensor_cache_enabled
    with quick_shapes():
        pass
    assert before == (
        dict(decomposition_table),
        dict(op_implementations_dict),
        torch._dynamo.config.fake_tensor_cache_enabled,
    )


def test_common_operations_are_not_taken_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else this would be no quicker, and nothing would tell."""

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError(args)

    for op in module.RESULTS:
        monkeypatch.setitem(decomposition_table, op, never)
    for op in module.VIEWS:
        monkeypatch.setitem(op_implementations_dict, op, never)
    layers = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 6))
    sizes = {0: Dim.AUTO, 1: Dim.AUTO}
    with quick_shapes():
        export(layers, (torch.randn(2, 5, 8),), dynamic_shapes=(sizes,))
