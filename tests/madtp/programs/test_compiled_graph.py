"""Graphs as functions: the quick form computes what the graph says, on the modules that are there when it is called."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from madtp.programs.compiled_graph import FUNCTIONS, CompiledGraph, compile_graph

aten = torch.ops.aten
X = torch.arange(24.0).reshape(2, 3, 4)
# Arguments of each overload that has a function of its own.
GIVEN: dict[object, tuple[object, ...]] = {
    aten.add.Tensor: (X, 2),
    aten.sub.Tensor: (X, X[0]),
    aten.mul.Tensor: (X, 0.5),
    aten.div.Tensor: (X, 4),
    aten.matmul.default: (X, X.transpose(1, 2)),
    aten.layer_norm.default: (X, [4], torch.ones(4), None, 1e-6),
    aten.cat.default: ([X, X], -1),
    aten.transpose.int: (X, 0, -1),
    aten.permute.default: (X, [2, 0, 1]),
    aten.reshape.default: (X, [2, -1]),
    aten.flatten.using_ints: (X, 1),
    aten.unflatten.int: (X, -1, [2, 2]),
    aten.unsqueeze.default: (X, -2),
    aten.squeeze.dim: (X[:1], 0),
    aten.select.int: (X, 1, -1),
    aten.unbind.int: (X, 1),
}


@pytest.mark.parametrize("overload", FUNCTIONS, ids=str)
def test_functions_are_their_overloads(overload: object) -> None:
    wanted, found = overload(*GIVEN[overload]), FUNCTIONS[overload](*GIVEN[overload])  # type: ignore[operator]
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def layers() -> tuple[nn.Module, CompiledGraph]:
    torch.manual_seed(0)
    root = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 2))
    graph = fx.Graph()
    inner = graph.call_module("0.1", (graph.call_module("0.0", (graph.placeholder("x"),)),))
    total = graph.call_function(aten.add.Tensor, (inner, inner), {"alpha": 2})
    graph.output((graph.call_module("1", (total,)),))
    compiled = compile_graph(graph, "test")
    assert isinstance(compiled, CompiledGraph)
    return root, compiled


def expected(root: nn.Module, x: Tensor) -> Tensor:
    inner = root.get_submodule("0.1")(root.get_submodule("0.0")(x))
    found: Tensor = root.get_submodule("1")(3 * inner)
    return found


def test_the_function_computes_what_the_graph_says() -> None:
    root, compiled = layers()
    x = torch.randn(3, 4)
    (found,) = compiled(root, x)
    torch.testing.assert_close(found, expected(root, x))


def test_modules_are_those_of_the_call_and_their_hooks_run() -> None:
    root, compiled = layers()
    x, seen = torch.randn(3, 4), []
    root.get_submodule("0")[0] = nn.Linear(4, 4)  # type: ignore[index]
    root.get_submodule("1").register_forward_hook(lambda *given: seen.append(1))
    (found,) = compiled(root, x)
    assert seen == [1]
    torch.testing.assert_close(found, expected(root, x))


class Wrapper(nn.Module):
    """Passes attributes of what it wraps on, as wrappers for several devices and for compiling do."""

    def __init__(self, wrapped: nn.Module) -> None:
        super().__init__()
        self.wrapped = wrapped

    def __getattr__(self, name: str) -> object:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.wrapped, name)


def test_a_wrapped_module_is_looked_into() -> None:
    root, compiled = layers()
    x = torch.randn(3, 4)
    wanted = expected(root, x)
    root[0] = Wrapper(root.get_submodule("0"))  # type: ignore[index]
    (found,) = compiled(root, x)
    torch.testing.assert_close(found, wanted)
