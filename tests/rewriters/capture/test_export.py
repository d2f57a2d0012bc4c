"""Capture: what cannot be traced is refused in words, without noise; forms that a rule does not know are refused too."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from small_vit import images, vit
from torch import Tensor, fx, nn

import madtp
from madtp.calls.call import Call
from madtp.errors import CaptureError, ExampleInputsError, RewriteError
from rewriters.axes.labels import LabelMap
from rewriters.axes.table import apply
from rewriters.canonicalise.passes import canonicalise, reshape_views
from rewriters.capture.export import capture
from rewriters.graph.nodes import AxisError, op_name
from rewriters.pipeline import rewrite_region
from rewriters.plan.request import Request


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
        apply(node, LabelMap())


def test_views_become_reshapes() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    view = graph.call_function(torch.ops.aten.view.default, (x, [4, 2]))
    graph.output(view)
    reshape_views(graph)
    result = fx.GraphModule(nn.Module(), graph)(torch.arange(8.0).reshape(2, 4).t())
    assert result.shape == (4, 2)


class ParallelAttention(nn.Module):
    """Two attentions side by side on one residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 4, 4)
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(2))
        self.attentions = nn.ModuleList(nn.MultiheadAttention(16, 2, batch_first=True) for _ in range(2))
        self.head = nn.Linear(16, 3)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch(images).flatten(2).transpose(1, 2)
        normed = [norm(x) for norm in self.norms]
        parts = [a(n, n, n, need_weights=False)[0] for a, n in zip(self.attentions, normed, strict=True)]
        x = x + parts[0] + parts[1]
        return self.head(x.mean(1))


def test_parallel_attentions_share_one_site() -> None:
    torch.manual_seed(0)
    model, images = ParallelAttention().eval(), torch.randn(3, 3, 16, 16)
    pruned = madtp.rewrite(model, (images,), config=madtp.PruningConfig(temperature=4.0, alignment_tokens=4))
    assert len(pruned.report.sites) == 1
    assert not pruned.report.refusals
    with torch.no_grad(), pruned.dense():
        torch.testing.assert_close(pruned(images), model(images), rtol=1e-5, atol=1e-6)


class Contexts(nn.Module):
    """Positions are made without gradients and in full precision; one value is frozen by ``no_grad``."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(8, 8))
        self.frozen = nn.Linear(8, 8)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            shift = self.frozen(x)
            with torch.autocast("cpu", enabled=False):
                steps = torch.arange(x.shape[1])[:, None].float() / x.shape[1]
                waves = (steps @ torch.ones(1, 8)).sin()
        return self.encoder(x @ self.table + shift + waves)[:, 0]


def test_values_without_gradients_and_autocast_stay_so() -> None:
    model = Contexts().eval()
    x = torch.randn(2, 6, 8)
    pruned = madtp.rewrite(model, (x,))
    assert len(pruned.report.sites) == 1
    pruned.temperature = 0.0
    torch.testing.assert_close(pruned(x), model(x))
    pruned(x).sum().backward()
    assert model.table.grad is not None
    assert model.frozen.weight.grad is None
    assert "without_autocast" not in pruned.code()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(pruned(x), model(x))
    assert "without_autocast" in pruned.code()


class Precise(nn.Module):
    """A block whose attention, all of it or its softmax, is computed without autocast."""

    def __init__(self, everywhere: bool) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.everywhere = everywhere

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False) if self.everywhere else nullcontext():
            q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
            with torch.autocast("cpu", enabled=False):
                scores = (q.float() @ k.float().transpose(-2, -1) / 8**0.5).softmax(-1)
                mixed = scores @ v.float()
            return x + self.out(mixed.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("everywhere", [False, True])
@torch.no_grad()
def test_attention_that_switches_autocast_off_is_pruned(everywhere: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(2), Precise(everywhere), Precise(everywhere), nn.Linear(16, 4)).eval()
    x = torch.randn(2, 12, 4, 4)
    model.append(_Mean())
    pruned = madtp.rewrite(model, (x,), config=madtp.PruningConfig(alignment_tokens=4))
    assert len(pruned.report.sites) == 2
    for context in (nullcontext(), torch.autocast("cpu", torch.bfloat16)):
        with context:
            with pruned.dense():
                torch.testing.assert_close(
                    pruned(x), model(x), atol=2e-2 if pruned(x).dtype != x.dtype else 1e-6, rtol=1e-2
                )
            assert pruned(x).dtype == model(x).dtype
    assert all((kept < 12).any() for kept in pruned.token_counts().values())


class _Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


class _WithNothing(nn.Module):
    """Returns nothing in the place of one output, as heads do whose labels are missing."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = vit(depth=2)

    def forward(self, x: Tensor) -> tuple[Tensor, None, Tensor]:
        features = self.tower(x)
        return features, None, features.sum(-1)


def test_an_output_may_be_none() -> None:
    model, x = _WithNothing().eval(), images(2, 0)
    pruned = madtp.rewrite(model, (x,))
    assert pruned(x)[1] is None
    with pruned.dense(), torch.no_grad():
        assert torch.equal(pruned(x)[2], model(x)[2])


def _converted(model: nn.Module, *inputs: Tensor) -> list[str]:
    graph = capture(model, Call(inputs, {})).graph
    canonicalise(graph)
    return [op_name(n) for n in graph.nodes if n.op == "call_function"]


class Converts(nn.Module):
    """Converts its input in one of several ways."""

    def __init__(self, how: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        return self.how(x) + 1


@pytest.mark.parametrize(
    "how", [lambda x: x.to(x.device), lambda x: x.float(), lambda x: x.to(torch.float32, copy=True)]
)
def test_conversions_to_what_a_tensor_is_are_dropped(how: Callable[[Tensor], Tensor]) -> None:
    assert _converted(Converts(how), torch.randn(2, 3)) == ["add"]


def test_conversions_to_another_type_stay() -> None:
    assert len(_converted(Converts(lambda x: x.double()), torch.randn(2, 3))) == 2


class TakesNotes(nn.Module):
    """Notes down what it computes, in a dictionary, a list and an attribute, and listens to a part by a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = vit()
        self.scale = nn.Parameter(torch.ones(1))
        self.cache: dict[str, Tensor] = {}
        self.calls: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        if "double" not in self.cache:
            self.cache["double"] = self.scale * 2
            self.trunk.register_forward_hook(lambda module, args, output: None)
        self.calls.append(x)
        self.last = x
        return self.trunk(x) * self.cache["double"]


def test_a_model_keeps_no_notes_of_being_traced() -> None:
    model = TakesNotes().eval()
    capture(model, Call((images(2, 0),), {}))
    assert model.cache == {}
    assert model.calls == []
    assert not model.trunk._forward_hooks
    assert not hasattr(model, "last")
    assert set(model.state_dict()) == set(TakesNotes().state_dict())


class Routed(nn.Module):
    """Bright samples alone pass an expert, so how many rows there are depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = vit(depth=2)
        self.expert = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.vit.forward_features(x)[:, 0]  # type: ignore[operator]
        rows = (x.mean((1, 2, 3)) > 0).nonzero()[:, 0]
        return pooled.index_put((rows,), self.expert(pooled[rows]))


def test_sizes_that_depend_on_values_are_refused_in_words() -> None:
    with pytest.raises(RewriteError, match="selected by their values"):
        rewrite_region(Request(Routed().eval(), Call((images(2, 0),), {}), madtp.PruningConfig()))


class Counting(nn.Module):
    """Counts its calls in a buffer, and decides by a value."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * 2 if float(x.sum()) > 0 else x


def test_a_capture_that_fails_leaves_no_hook_behind() -> None:
    with pytest.raises(madtp.MadtpError):
        madtp.rewrite(Counting(), (torch.rand(2, 3),))
    module = nn.Module()
    module.register_buffer("count", torch.zeros(()))
    module.count = torch.ones(())
    assert float(module.count) == 1
