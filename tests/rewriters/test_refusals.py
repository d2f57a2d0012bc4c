"""What cannot be rewritten is refused with place, reason and help; wrong inputs get errors that say what to do."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import networkx
import pytest
import torch
import torch.nn.functional as F
from case_models import CASES, vit
from model_case import DEPTH
from rewritten_models import gap
from rewritten_models import subject as rewritten
from torch import Tensor, nn

import madtp
from madtp import PruningConfig
from madtp.errors import ExampleInputsError, NoSiteError, NothingToPruneError, PlanError
from madtp.programs.program import Program
from rewriters.pipeline import rewrite_region
from rewriters.plan.plan import Plan
from rewriters.plan.request import Request


def pixels(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 32, 32)


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).mean((2, 3))


def test_a_model_without_attention_has_no_site() -> None:
    with pytest.raises(NoSiteError, match=r"Convolutions.*no attention"):
        madtp.rewrite(Convolutions(), (pixels(),))


def test_one_sample_is_too_few() -> None:
    with pytest.raises(ExampleInputsError, match="at least 2"):
        madtp.rewrite(vit(), (pixels(1),))


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"pixels": pixels()}, "pixels"),
        ((pixels(), pixels(), pixels(), pixels()), "too many"),
        ((), "missing"),
        ([pixels()], "list"),
        ((torch.randn(2, 3, 20, 20),), "fails on the example inputs"),
        ((torch.randn(2, 1, 32, 32),), "fails on the example inputs"),
    ],
)
def test_inputs_that_do_not_fit_are_named(inputs: Any, words: str) -> None:
    with pytest.raises(ExampleInputsError, match=words):
        madtp.rewrite(vit(), inputs)


def test_inputs_must_agree_on_the_batch() -> None:
    inputs = CASES["blip_nlvr"].inputs(3, 6)
    inputs["input_ids"] = inputs["input_ids"][:2]
    with pytest.raises(ExampleInputsError, match="batch"):
        madtp.rewrite(CASES["blip_nlvr"].build(), inputs)


def test_a_model_that_the_zoo_does_not_know_needs_inputs() -> None:
    with pytest.raises(ExampleInputsError, match="example_inputs"):
        madtp.rewrite(Convolutions())


class Sorted(nn.Module):
    """Between its two blocks stands an operation without a rule."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.first = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.second = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).sort(dim=1).values)[:, 0]


def test_an_operation_without_a_rule_refuses_the_sites_before_it() -> None:
    torch.manual_seed(0)
    model = Sorted().eval()
    x = torch.randn(3, 7, 8)
    pruned = madtp.rewrite(model, (x,))
    assert [s.name for s in pruned.report.sites] == ["second.layers.0", "second.layers.1"]
    refused = {r.block: r for r in pruned.report.refusals}
    assert refused.keys() == {"first.layers.0", "first.layers.1"}
    for refusal in refused.values():
        assert "sort" in refusal.reason
        assert refusal.node.startswith("sort")
        assert "rule" in refusal.help
    text = str(pruned.report)
    assert "sort" in text
    assert "first.layers.0" in text
    with torch.no_grad(), pruned.dense():
        assert gap(model(x), pruned(x)) < 1e-5


class Grid(nn.Module):
    """A head on a grid of all patches."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = vit(class_token=False, global_pool="")
        self.trunk.head = nn.Identity()
        self.head = nn.Conv2d(16, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.trunk(x)
        return self.head(tokens.transpose(1, 2).reshape(tokens.shape[0], 16, 4, 4))


def test_a_head_on_the_grid_reads_all_patches() -> None:
    torch.manual_seed(0)
    model = Grid().eval()
    pruned = madtp.rewrite(model, (pixels(),), config=PruningConfig(gain=2.0))
    assert len(pruned.report.sites) == DEPTH
    with torch.no_grad():
        assert pruned(pixels()).shape == (2, 2, 4, 4)
        assert int(pruned.token_counts()["trunk.blocks.1"].max()) < 16
        with pruned.dense():
            x = pixels(3)
            assert gap(model(x), pruned(x)) < 1e-5


def test_towers_left_out_are_refused_by_configuration() -> None:
    case = CASES["towers_batch_first_pre"]
    pruned = madtp.rewrite(case.build(), case.inputs(2, 6), config=PruningConfig(towers=("image",)))
    assert {s.modality for s in pruned.report.sites} == {"image"}
    assert {r.block.split(".")[0] for r in pruned.report.refusals} == {"text"}
    assert all("towers" in r.reason for r in pruned.report.refusals)


def test_attention_pooling_is_reported_and_not_pruned() -> None:
    report = rewritten("vit_attention_pool").pruned.report
    assert report.pooling == ("attn_pool",)
    assert "attention pooling: attn_pool" in str(report)
    assert not report.refusals


class Resampled(nn.Module):
    """Image tokens, read by two layers of cross-attention: from latents, or (near miss) from other features."""

    def __init__(self, latents: bool) -> None:
        super().__init__()
        self.trunk = vit(class_token=False, global_pool="")
        self.trunk.head = nn.Identity()
        self.latents = nn.Parameter(torch.randn(1, 3, 16)) if latents else None
        self.embed = nn.Linear(48, 16)
        self.readers = nn.ModuleList(nn.MultiheadAttention(16, 2, batch_first=True) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.trunk(x)
        found = self.embed(x.reshape(len(x), -1, 48)) if self.latents is None else self.latents.expand(len(x), -1, -1)
        for reader in self.readers:
            found = found + reader(found, tokens, tokens)[0]
        return found


@pytest.mark.parametrize("latents", [True, False])
def test_latents_need_no_site_and_other_queries_do(latents: bool) -> None:
    report = madtp.rewrite(Resampled(latents).eval(), (pixels(),)).report
    assert len(report.sites) == DEPTH
    assert report.pooling == (("readers.0", "readers.1") if latents else ())
    assert [r.block for r in report.refusals] == ([] if latents else ["readers.0", "readers.1"])


def by_convolution(tokens: Tensor, layer: nn.Module, features: Tensor) -> Tensor:
    weights = F.conv1d(tokens.transpose(1, 2), layer.weight[:, :, None], layer.bias)
    return weights.softmax(-1) @ features


def by_projection(tokens: Tensor, layer: nn.Module, features: Tensor) -> Tensor:
    weights = (layer(tokens) / 2).permute(0, 2, 1).softmax(-1)
    return torch.einsum("bqn,bnc->bqc", weights, features)


def over_rows(tokens: Tensor, layer: nn.Module, features: Tensor) -> Tensor:
    return layer(tokens).softmax(-1) @ features[:, :3]


def by_all_tokens(tokens: Tensor, layer: nn.Module, features: Tensor) -> Tensor:
    weights = layer(tokens).transpose(1, 2) @ (tokens @ tokens.transpose(1, 2)).tanh()
    return weights.softmax(-1) @ features


class Condensed(nn.Module):
    """Image tokens, of which a learned layer says how much each of three results takes of each."""

    def __init__(self, spelling: Callable[..., Tensor]) -> None:
        super().__init__()
        self.trunk = vit(class_token=False, global_pool="")
        self.trunk.head = nn.Identity()
        self.spelling = spelling
        self.layer, self.feature = nn.Linear(16, 3), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.trunk(x)
        return self.spelling(tokens, self.layer, self.feature(tokens))


@pytest.mark.parametrize(
    "spelling", [by_convolution, by_projection, over_rows, by_all_tokens], ids=lambda f: f.__name__
)
@torch.no_grad()
def test_what_a_learned_layer_weighs_is_pooled(spelling: Callable[..., Tensor]) -> None:
    model = Condensed(spelling).eval()
    pruned = madtp.rewrite(model, (pixels(),))
    pools = spelling in (by_convolution, by_projection)
    assert len(pruned.report.sites) == DEPTH
    assert len(pruned.report.pooling) == int(pools)
    assert not (pools and pruned.report.refusals)
    with pruned.dense():
        x = pixels(3)
        assert gap(model(x), pruned(x)) < 1e-5


def test_a_model_that_only_pools_has_nothing_to_prune() -> None:
    model = Resampled(True)
    model.trunk = nn.Sequential(nn.Conv2d(3, 16, 8, 8), nn.Flatten(2), Swap())
    with pytest.raises(NothingToPruneError, match="condenses tokens"):
        madtp.rewrite(model.eval(), (pixels(),))


class Swap(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


class SideBySide(nn.Module):
    """Two attention sublayers added to one residual value."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = vit()
        self.second = copy.deepcopy(self.trunk.blocks)
        self.norm = nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.trunk._pos_embed(self.trunk.patch_embed(x))
        for one, other in zip(self.trunk.blocks, self.second, strict=True):
            x = x + one.attn(one.norm1(x)) + other.attn(other.norm1(x))
            x = x + one.mlp(one.norm2(x))
        return self.norm(x)[:, 0]


def test_one_site_prunes_for_attention_side_by_side() -> None:
    report = madtp.rewrite(SideBySide().eval(), (pixels(),)).report
    assert len(report.sites) == DEPTH
    assert not report.refusals


def test_report_reads_as_a_table_and_draws_as_a_graph() -> None:
    subject = rewritten("blip_nlvr")
    report = subject.pruned.report
    assert report.capture == "whole"
    for site in report.sites:
        assert site.name in str(report)
    network = report.network
    assert isinstance(network, networkx.DiGraph)
    kinds = networkx.get_node_attributes(network, "kind")
    assert sorted(set(kinds.values())) == ["cross", "self", "stream"]
    crossing = [n for n, kind in kinds.items() if kind == "cross"]
    assert len(crossing) == 2 * DEPTH
    images = next(n for n, m in networkx.get_node_attributes(network, "modality").items() if m == "image")
    assert all(network.has_edge(images, n) for n in crossing)


def planned(name: str) -> tuple[nn.Module, Any, Plan]:
    """A model, its example call and its plan."""
    case = CASES[name]
    model = case.build()
    call = madtp.api.example_call(model, case.inputs(2, 6))  # type: ignore[attr-defined]
    return model, call, rewrite_region(Request(model, call, PruningConfig())).plan


def test_plan_survives_json_and_can_be_edited() -> None:
    model, call, plan = planned("blip_nlvr")
    again = Plan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again == plan
    fewer = plan.without([s.name for s in plan.sites if s.layer == 0], ())
    pruned = madtp.rewrite(model, call.kwargs, plan=fewer)
    assert {s.layer for s in pruned.report.sites} == {1}


def test_a_report_has_the_plan_that_was_followed() -> None:
    _, _, plan = planned("vit")
    pruned = madtp.rewrite(vit(), (pixels(),))
    assert Plan.from_dict(json.loads(json.dumps(pruned.report.plan))) == plan
    dropped = plan.sites[1].name
    fewer = madtp.rewrite(vit(), (pixels(),), plan=madtp.Plan.from_dict(pruned.report.plan).without([dropped]))
    assert [s.name for s in fewer.report.sites] == [s.name for s in pruned.report.sites if s.name != dropped]


def test_a_malformed_plan_is_refused() -> None:
    _, _, plan = planned("vit")
    values = plan.to_dict()
    with pytest.raises(PlanError, match="version"):
        Plan.from_dict({**values, "version": 99})
    with pytest.raises(PlanError, match="malformed"):
        Plan.from_dict({n: v for n, v in values.items() if n != "sites"})


def test_a_plan_for_another_model_is_refused() -> None:
    _, _, plan = planned("blip_nlvr")
    with pytest.raises(madtp.MadtpError):
        madtp.rewrite(vit(), (pixels(),), plan=plan)


def test_a_child_called_madtp_is_refused() -> None:
    model = vit()
    model.madtp = nn.Linear(2, 2)
    with pytest.raises(madtp.MadtpError, match="madtp"):
        madtp.rewrite(model, (pixels(),))


def test_rewritten_code_can_be_read() -> None:
    subject = rewritten("vit")
    with torch.no_grad():
        subject.pruned(pixels())
    source = subject.pruned.code()
    assert "self.madtp.sites.blocks_0" in source
    assert "mlp.fc1" in source
    assert isinstance(subject.pruned.madtp.control.record.runs[0].program, Program)


def test_asking_before_the_first_forward_is_an_error() -> None:
    pruned = madtp.rewrite(vit(), (pixels(),))
    for ask in (pruned.token_counts, pruned.macs, pruned.kept_tokens, pruned.alignment_loss):
        with pytest.raises(madtp.MadtpError, match="forward"):
            ask()
