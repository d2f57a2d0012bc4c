"""Blocks that read the grid: windows, keys of convolutions, convolutions between tokens. They run on all tokens, their results
are read at the kept positions, and dropped tokens are hidden from their attention."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from grid_models import (
    HEADS,
    WIDTH,
    WINDOW,
    Channels,
    Global,
    GridNet,
    Masked,
    Standing,
    assert_dense_is_original,
    assert_samples_ignore_batch_mates,
    copied,
    pixels,
    rewritten,
    survivors,
)
from model_case import DEPTH, lively
from rewritten_models import eager_arithmetic, gap, gradients
from torch import Tensor, nn

import madtp
from madtp import PrunedModel

FORMS = [
    ("global", "depthwise"),
    ("reduced", "plain"),
    ("reduced", "depthwise"),
    ("windows", "plain"),
    ("masked", "plain"),
    ("convolved", "plain"),
]


def drawn(attention: str, feed_forward: str, depth: int = DEPTH) -> nn.Module:
    torch.manual_seed(0)
    return lively(GridNet(attention, feed_forward, depth))


@cache
def made(attention: str, feed_forward: str) -> tuple[nn.Module, PrunedModel]:
    """A model and what becomes of it; tests that change the latter take a copy."""
    model = drawn(attention, feed_forward)
    return model, rewritten(model)


def test_blocks_that_run_on_all_tokens_throughout_are_refused() -> None:
    with pytest.raises(madtp.MadtpError, match="saves nothing"):
        rewritten(drawn("windows", "depthwise"))


@pytest.mark.parametrize("form", FORMS, ids="-".join)
@torch.no_grad()
def test_temperature_zero_is_the_original(form: tuple[str, str]) -> None:
    model, pruned = made(*form)
    assert [s.name for s in pruned.report.sites] == [f"blocks.{n}" for n in range(DEPTH)]
    assert not pruned.report.refusals
    assert_dense_is_original(model, pruned, (1, 3, 4))
    assert {k for k in pruned.state_dict() if not k.startswith("madtp.")} == model.state_dict().keys()


@pytest.mark.parametrize("form", FORMS, ids="-".join)
@pytest.mark.parametrize("seed", [0, 1, 2])
@torch.no_grad()
def test_dropped_tokens_keep_their_state_and_are_hidden(form: tuple[str, str], seed: int) -> None:
    model, pruned = made(*form)
    pruned = copied(pruned, merge=False)
    given, kept = pixels(3), survivors(3, 36, DEPTH, seed)
    pruned.madtp.control.forced = {f"blocks.{n}": one for n, one in enumerate(kept)}
    with eager_arithmetic():
        found = pruned(pixels=given)
    assert pruned.token_counts()["blocks.1"].tolist() == kept[1].sum(1).tolist()
    for key, value in model(given, kept).items():
        assert gap(value, found[key]) < 1e-5, key


@pytest.mark.parametrize("form", FORMS, ids="-".join)
@torch.no_grad()
def test_a_sample_ignores_its_batch_mates(form: tuple[str, str]) -> None:
    pruned = made(*form)[1]
    assert_samples_ignore_batch_mates(pruned)


@pytest.mark.parametrize("form", FORMS, ids="-".join)
def test_every_parameter_and_the_alignment_tokens_learn(form: tuple[str, str]) -> None:
    pruned = copied(made(*form)[1]).train()
    given = pixels(3)
    found = gradients(pruned, lambda: pruned(pixels=given))
    assert all(bool(g.isfinite().all()) for g in found.values())
    assert found["madtp.alignment.tokens"].abs().sum() > 0
    assert {n for n, _ in pruned.named_parameters() if not n.startswith("madtp.")} <= found.keys()


@torch.no_grad()
def test_what_runs_on_all_tokens_costs_as_much_as_before() -> None:
    """Reported are the attention in windows and what leads to it in full, the feed-forward for survivors only."""
    pruned = copied(made("windows", "plain")[1], merge=False)
    given = pixels(2)
    with pruned.dense():
        pruned(pixels=given)
        dense = pruned.macs_by_module()
    pruned.madtp.control.forced = {f"blocks.{n}": (torch.arange(36) < 9).expand(2, -1) for n in range(DEPTH)}
    pruned(pixels=given)
    active = pruned.macs_by_module()
    for name in ("attention.qkv", "attention", "attention.out"):
        assert active[f"blocks.1.{name}"] == pytest.approx(dense[f"blocks.1.{name}"])
    assert active["blocks.1.mlp.up"] == pytest.approx(dense["blocks.1.mlp.up"] / 4)
    # The norm in front of windows is computed for all tokens, and for nothing else.
    assert active["blocks.1.norm1"] == pytest.approx(dense["blocks.1.norm1"])


class Permuted(Global):
    """Attention in windows that an index picks: it is not followed where tokens go."""

    def forward(self, x: Tensor, height: int, width: int, alive: Tensor | None) -> Tensor:
        order = torch.arange(x.shape[1]).flip(0)
        return self.attend(x[:, order].reshape(-1, 9, WIDTH), None).reshape(x.shape)[:, order]


class Crossed(Masked):
    """Windows and heads stand beside samples as one dimension: the masks do not tell of which window they are."""

    def __init__(self) -> None:
        super().__init__()
        self.masks = nn.Parameter(torch.randn(4 * HEADS, 1, WINDOW**2, WINDOW**2))

    def beside(self, scores: Tensor) -> Tensor:
        return scores.reshape(-1, len(self.masks), 1, *scores.shape[2:])


class Blended(Global):
    """Keys of two tokens each: none of them stands for one."""

    def forward(self, x: Tensor, height: int, width: int, alive: Tensor | None) -> Tensor:
        grid = x.reshape(len(x), height, width, WIDTH)
        x = grid + torch.roll(grid, 1, 1)
        return self.attend(x.reshape(-1, width, WIDTH), None).reshape(len(x), -1, WIDTH)


class Unknown(Global):
    """Weights of tokens in a spelling that is not attention."""

    def forward(self, x: Tensor, height: int, width: int, alive: Tensor | None) -> Tensor:
        grid = x.reshape(len(x), height, width, WIDTH)
        weights = grid.sum(-1, keepdim=True).softmax(2)
        y = torch.einsum("bhwo,bhwc->bhoc", weights, grid)
        return (grid * y).reshape(x.shape) + self.attend(x, None)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Permuted, "not known where index takes tokens"),
        (Crossed, "attention in a spelling that is not known"),
        (Blended, "add of tokens that were moved differently"),
        (Unknown, "attention in a spelling that is not known"),
    ],
)
def test_near_misses_are_refused(kind: Callable[[], nn.Module], words: str) -> None:
    model = drawn("global", "plain", depth=3)
    blocks: nn.ModuleList = model.blocks  # type: ignore[assignment]
    for block in blocks[1:2]:
        block.attention = kind()
    report = rewritten(lively(model)).report
    (reason,) = {r.reason for r in report.refusals if r.block == "blocks.0"}
    assert "flows back into the pruned tokens" in reason
    assert words in reason
    assert [s.name for s in report.sites if s.name == "blocks.2"] == ["blocks.2"]


@torch.no_grad()
def test_attention_along_channels_mixes_all_tokens() -> None:
    """Between two blocks of attention along tokens, which have the sites."""
    torch.manual_seed(0)
    model = GridNet("global", depth=3)
    blocks: nn.ModuleList = model.blocks  # type: ignore[assignment]
    blocks[1].attention = Channels()
    pruned = rewritten(lively(model), merge=False)
    assert [s.name for s in pruned.report.sites] == ["blocks.0", "blocks.2"]
    given, kept = pixels(3), survivors(3, 36, 2, 0)
    pruned.madtp.control.forced = {"blocks.0": kept[0], "blocks.2": kept[1]}
    with eager_arithmetic():
        found = pruned(pixels=given)
    for key, value in model(given, [kept[0], kept[0], kept[1]]).items():
        assert gap(value, found[key]) < 1e-5, key


@pytest.mark.parametrize("attention", ["global", "windows"])
@pytest.mark.parametrize("pooled", [False, True])
@torch.no_grad()
def test_a_stream_that_stands_on_the_grid_is_pruned_as_a_flat_one(attention: str, pooled: bool) -> None:
    flat = drawn(attention, "plain")
    model = Standing(flat, pooled=pooled).eval()  # type: ignore[arg-type]
    pruned = rewritten(model, merge=False)
    names = [s.name for s in pruned.report.sites]
    assert names == [f"blocks.{n}.attention" for n in range(DEPTH)]
    assert not pruned.report.refusals
    given, kept = pixels(3), survivors(3, 36, DEPTH, 0)
    with pruned.dense():
        for key, value in model(given).items():
            assert gap(value, pruned(pixels=given)[key]) < 1e-6, key
    pruned.madtp.control.forced = dict(zip(names, kept, strict=True))
    with eager_arithmetic():
        found = pruned(pixels=given)
    for key, value in flat(given, kept).items():
        if key in found:
            assert gap(value, found[key].reshape(value.shape)) < 1e-5, key
    whole = 36 * 3 * WIDTH * WIDTH
    assert pruned.macs_by_module()["blocks.1.mlp.up"] < 0.5 * whole
