"""Gradient checkpointing of rewritten models: the same gradients for the same tokens, less kept in between."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import tiny_training as tiny
import torch
from model_case import WIDTH, lively
from process_group import environment
from project_paths import SUPPORT
from torch import Tensor, nn
from torch.nn import functional as F

import madtp
from madtp.errors import ConfigError
from madtp.programs.gradient_checkpointing import checkpointed
from madtp.pruned import PrunedModel
from madtp.tokens.attention import attention
from madtp.training import Learner, fit


def inputs(batch: int = 4) -> dict[str, Tensor]:
    made = tiny.samples(0, range(batch))
    return {name: made[name] for name in tiny.INPUTS}


def measured(pruned: PrunedModel, call: dict[str, Tensor], loss: Callable[[Any], Tensor]) -> dict[str, Any]:
    """Gradients and tokens of a step, and how many numbers were kept for the backward."""
    kept: dict[int, int] = {}

    def keep(value: Tensor) -> Tensor:
        kept[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    pruned(**call)  # is captured here, if need be
    pruned.zero_grad()
    torch.manual_seed(5)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        value = loss(pruned(**call))
    for parameter in pruned.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    tokens = pruned.token_counts()
    value.backward()
    gradients = {name: p.grad.clone() for name, p in pruned.named_parameters() if p.grad is not None}
    return {"gradients": gradients, "tokens": tokens, "kept": sum(kept.values())}


def check(pruned: PrunedModel, call: dict[str, Tensor], loss: Callable[[Any], Tensor], share: float) -> None:
    plain = measured(pruned, call, loss)
    pruned.gradient_checkpointing = True
    again = measured(pruned, call, loss)
    assert set(again["gradients"]) == set(plain["gradients"])
    for name, gradient in plain["gradients"].items():
        assert torch.equal(again["gradients"][name], gradient), name
    for site, counts in plain["tokens"].items():
        assert torch.equal(again["tokens"][site], counts)
        assert torch.equal(pruned.token_counts()[site], counts)
    assert again["kept"] < share * plain["kept"]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_are_equal_bit_for_bit_and_less_is_kept(dropout: float) -> None:
    pruned = tiny.rewritten(dropout)
    check(pruned, inputs(), lambda output: output["score"].sum() + pruned.alignment_loss(), 0.6)


def test_blocks_without_sites_are_cut_between_attentions() -> None:
    pruned = tiny.rewrite(tiny.towers(), towers=("image",)).train()
    check(pruned, inputs(), lambda output: output["score"].sum(), 0.6)
    unpruned = tiny.rewritten()
    unpruned.temperature = 0.0
    check(unpruned, inputs(), lambda output: output["score"].sum(), 0.6)


@pytest.mark.slow
def test_autocast_and_the_choice_of_kernels_hold_for_what_is_computed_again() -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    pruned = tiny.rewritten().float()
    call = inputs()
    call["pixels"] = call["pixels"].float()

    def loss(output: Any) -> Tensor:
        return output["score"].float().sum() + pruned.alignment_loss()

    with sdpa_kernel(SDPBackend.MATH), torch.autocast("cpu", torch.bfloat16):
        plain = measured(pruned, call, loss)
    pruned.gradient_checkpointing = True
    pruned.zero_grad()
    with sdpa_kernel(SDPBackend.MATH), torch.autocast("cpu", torch.bfloat16):
        value = loss(pruned(**call))
    value.backward()
    for name, gradient in plain["gradients"].items():
        assert torch.equal(pruned.get_parameter(name).grad, gradient), name  # type: ignore[arg-type]


class Stem(nn.Module):
    """Convolution with batch norm, then blocks; a step that changes a tensor in place, if asked for."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, WIDTH, 8, 8)
        self.norm = nn.BatchNorm2d(WIDTH)
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(WIDTH, 2, 32, 0.0, batch_first=True) for _ in range(3))
        self.activation = nn.ReLU(inplace=in_place)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.convolution(x)).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.activation(x.mean(1)).sum(-1)


def stem(in_place: bool = False) -> tuple[PrunedModel, dict[str, Tensor]]:
    torch.manual_seed(0)
    call = {"x": torch.randn(4, 3, 32, 32)}
    return madtp.rewrite(lively(Stem(in_place)), call, config=madtp.PruningConfig(alignment=False)).train(), call


@pytest.mark.slow
def test_batch_norms_count_a_batch_once() -> None:
    pruned, call = stem()
    pruned.gradient_checkpointing = True
    before = int(pruned.norm.num_batches_tracked)
    running = pruned.norm.running_mean.clone()
    pruned(**call).sum().backward()
    assert int(pruned.norm.num_batches_tracked) == before + 1
    once = pruned.norm.momentum * pruned.convolution(call["x"]).mean((0, 2, 3)) + (1 - pruned.norm.momentum) * running
    torch.testing.assert_close(pruned.norm.running_mean, once)


@pytest.mark.slow
def test_in_place_operations_inside_a_piece_are_harmless() -> None:
    pruned, call = stem(in_place=True)
    check(pruned, call, lambda output: output.square().sum(), 0.8)


def test_in_place_changes_of_what_is_read_again_are_an_error() -> None:
    root = nn.ModuleDict({"first": nn.Linear(2, 2), "second": nn.Linear(2, 2)})
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    first = graph.call_module("first", (x,))
    heads = graph.call_function(attention, (first, first, first))
    graph.call_function(torch.Tensor.mul_, (x, 2.0))
    second = graph.call_module("second", (heads,))
    graph.output((graph.call_function(attention, (second, second, second)),))
    (result,) = checkpointed(graph, root, "test")(root, torch.randn(1, 1, 3, 2))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.sum().backward()


def test_a_forward_without_gradients_runs_whole() -> None:
    pruned = tiny.rewritten()
    pruned.gradient_checkpointing = True
    with torch.no_grad():
        pruned(**inputs())
    assert all(
        entry.program.checkpointed_forward is None for entry in pruned.madtp.forward_of_host.programs.entries.values()
    )


def test_training_switches_it_on_where_something_is_pruned(tmp_path: Any) -> None:
    settings = tiny.config(steps=2, gradient_checkpointing=True)
    made = tiny.learner(steps=2)
    fit(made, settings, tmp_path / "a", progress=tiny.QUIET)
    assert made.module.pruned.gradient_checkpointing
    plain = tiny.learner(steps=2)
    fit(plain, tiny.config(steps=2), tmp_path / "b", progress=tiny.QUIET)
    for name, value in plain.module.state_dict().items():
        assert torch.equal(made.module.state_dict()[name], value)
    dense = Learner(nn.Linear(2, 1), lambda step, rows: {}, lambda m, b, s: (F.relu(m(b)), {}))
    with pytest.raises(ConfigError, match="for pruned models"):
        fit(dense, settings, tmp_path / "c", progress=tiny.QUIET)


@pytest.mark.heavy
@pytest.mark.parametrize("options", [("--checkpointing",), ()])
def test_a_full_size_training_step_fits_in_16_gib(options: tuple[str, ...]) -> None:
    script = SUPPORT / "full_size_step.py"
    command = [sys.executable, str(script), *options]
    child = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=1800, check=False)
    assert child.returncode == 0, child.stderr
    found = json.loads(child.stdout.splitlines()[-1])
    assert found["peak GiB"] < (8 if options else 16)
    assert found["gradients"] > 0.9 * found["parameters"]
