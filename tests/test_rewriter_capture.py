"""Capture: what cannot be traced is refused in words, without noise; forms that a rule does not know are refused too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

import madtp
from madtp.errors import CaptureError, ExampleInputsError
from rewriters.axes import AxisError
from rewriters.canonicalise import reshape_views
from rewriters.rules import apply


class DataDependent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder(x)
        return x if x.sum().item() > 0 else -x


def test_untraceable_models_are_refused_quietly(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CaptureError, match="data-dependent Python"):
        madtp.rewrite(DataDependent().eval(), (torch.randn(2, 5, 8),))
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err == ""


def test_wrong_inputs_are_told_from_untraceable_models() -> None:
    with pytest.raises(ExampleInputsError, match="itself fails on the example inputs"):
        madtp.rewrite(DataDependent().eval(), (torch.randn(2, 5, 7),))


def test_a_form_that_a_rule_does_not_know_is_refused() -> None:
    graph = fx.Graph()
    node = graph.call_function(torch.ops.aten.permute.default, ())
    with pytest.raises(AxisError, match="does not cover this form"):
        apply(node, {})


def test_views_become_reshapes() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    view = graph.call_function(torch.ops.aten.view.default, (x, [4, 2]))
    graph.output(view)
    reshape_views(graph)
    result = fx.GraphModule(nn.Module(), graph)(torch.arange(8.0).reshape(2, 4).t())
    assert result.shape == (4, 2)
