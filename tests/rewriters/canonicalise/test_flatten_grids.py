"""Streams [B, C, H, W]: maps of channels, normed by a batch norm or by a layer norm over channels, mixed by 1x1 kernels."""

from __future__ import annotations

import copy
from functools import cache
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from grid_models import WIDTH, GridNet, Plain, assert_dense_is_original, copied, pixels, rewritten, survivors
from model_case import DEPTH, lively
from rewritten_models import eager_arithmetic, gap, gradients
from torch import Tensor, nn

import madtp
from madtp.errors import RewriteError

Norm = Literal["layer", "batch"]
FORMS: list[tuple[Norm, str, str]] = [
    ("layer", "global", "plain"),
    ("batch", "global", "plain"),
    ("batch", "windows", "plain"),
    ("layer", "reduced", "plain"),
]


class Statistics(nn.BatchNorm2d):
    """A batch norm of tokens [B, N, C] or of maps [B, C, H, W]."""

    def __init__(self) -> None:
        super().__init__(WIDTH)
        self.running_mean.normal_()
        self.running_var.uniform_(0.5, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.dim() == 4 else super().forward(x.transpose(1, 2)[..., None])[..., 0].mT


class Maps(nn.Module):
    """The blocks of a net on a stream [B, C, H, W].

    scaled: the stream is multiplied by a scale in front of what is added to it. pool: how tokens are read out.
    """

    def __init__(self, net: GridNet, norm: Norm, pool: str = "mean", *, scaled: bool = False) -> None:
        super().__init__()
        self.patches, self.blocks, self.norm, self.layer, self.pool = (
            net.patches,
            net.blocks,
            net.norm,
            norm == "layer",
            pool,
        )
        self.mixers = nn.ModuleList(_convolutions(block.mlp) for block in net.blocks)  # type: ignore[arg-type]
        self.scale = nn.Parameter(torch.rand(WIDTH, 1, 1)) if scaled else None

    def normed(self, norm: nn.Module, x: Tensor) -> Tensor:
        return norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if self.layer else norm(x)

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        x = self.patches(pixels)
        height, width = x.shape[2:]
        for block, mixers in zip(self.blocks, self.mixers, strict=True):
            y = self.normed(block.norm1, x).flatten(2).transpose(1, 2)  # type: ignore[arg-type]
            y = block.attention(y, height, width, None).transpose(1, 2).reshape(x.shape)  # type: ignore[operator]
            x = (x if self.scale is None else x * self.scale) + y
            x = x + mixers(self.normed(block.norm2, x))  # type: ignore[arg-type]
        x = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        mean = {
            "mean": lambda: x.mean((2, 3)),
            "keepdim": lambda: x.mean((-1, -2), keepdim=True).flatten(1),
            "pool": lambda: F.adaptive_avg_pool2d(x, 1).flatten(1),
        }[self.pool]()
        return {"mean": mean, "tokens": x.flatten(2).transpose(1, 2)}


def _convolutions(mlp: Plain) -> nn.Sequential:
    """What a feed-forward does to each token, as 1x1 convolutions of maps."""
    up, down = nn.Conv2d(WIDTH, 3 * WIDTH, 1), nn.Conv2d(3 * WIDTH, WIDTH, 1)
    with torch.no_grad():
        for convolution, linear in ((up, mlp.up), (down, mlp.down)):
            convolution.weight.copy_(linear.weight[:, :, None, None])
            convolution.bias.copy_(linear.bias)  # type: ignore[union-attr]
    mix = getattr(mlp, "mix", None)
    return nn.Sequential(up, *([] if mix is None else [mix]), nn.GELU(), down)


def drawn(norm: Norm, attention: str, feed_forward: str, pool: str = "mean") -> tuple[GridNet, Maps]:
    torch.manual_seed(0)
    flat = lively(GridNet(attention, feed_forward))
    if norm == "batch":
        for block in flat.blocks:  # type: ignore[union-attr]
            block.norm1, block.norm2 = Statistics(), Statistics()
    return flat.eval(), Maps(flat, norm, pool).eval()  # type: ignore[return-value, arg-type]


@cache
def made(norm: Norm, attention: str, feed_forward: str) -> tuple[GridNet, Maps, madtp.PrunedModel]:
    """The flat model, that on maps and what becomes of it; tests that change the latter take a copy."""
    flat, model = drawn(norm, attention, feed_forward)
    return flat, model, rewritten(model)


@pytest.mark.parametrize("form", FORMS, ids="-".join)
@torch.no_grad()
def test_maps_are_pruned_as_a_flat_stream(form: tuple[Norm, str, str]) -> None:
    flat, model, pruned = made(*form)
    names = [s.name for s in pruned.report.sites]
    assert len(names) == DEPTH
    assert not pruned.report.refusals
    assert_dense_is_original(model, pruned, (1, 4))
    pruned = copied(pruned, merge=False)
    given, kept = pixels(3), survivors(3, 36, DEPTH, 0)
    pruned.madtp.control.forced = dict(zip(names, kept, strict=True))
    with eager_arithmetic():
        found = pruned(pixels=given)
    for key, value in flat(given, kept).items():
        assert gap(value, found[key]) < 3e-5, key
    assert {k for k in pruned.state_dict() if not k.startswith("madtp.")} == model.state_dict().keys()


@torch.no_grad()
def test_convolutions_of_one_place_run_on_survivors_as_the_models_own_modules() -> None:
    pruned = copied(made("batch", "global", "plain")[2], merge=False)
    heard: list[int] = []
    pruned.get_submodule("mixers.1.0").register_forward_hook(lambda m, i, o: heard.append(o[0, 0].numel()))
    names = [s.name for s in pruned.report.sites]
    pruned.madtp.control.forced = {name: (torch.arange(36) < 9).expand(3, -1) for name in names}
    pruned(pixels=pixels(3))
    assert heard == [3 * 9]
    assert pruned.macs_by_module()["mixers.1.0"] == pytest.approx(9 * 3 * WIDTH * WIDTH)


@pytest.mark.parametrize("pool", ["mean", "keepdim", "pool"])
@torch.no_grad()
def test_a_mean_over_all_places_is_over_survivors(pool: str) -> None:
    flat, model = drawn("layer", "global", "plain", pool)
    pruned = rewritten(model, merge=False)
    given, kept = pixels(3), survivors(3, 36, DEPTH, 1)
    pruned.madtp.control.forced = dict(zip([s.name for s in pruned.report.sites], kept, strict=True))
    with eager_arithmetic():
        assert gap(flat(given, kept)["mean"], pruned(pixels=given)["mean"]) < 1e-5


@pytest.mark.parametrize("form", FORMS[:3], ids="-".join)
@torch.no_grad()
def test_a_sample_ignores_its_batch_mates(form: tuple[Norm, str, str]) -> None:
    pruned = made(*form)[2]
    given = pixels(4)
    together = pruned(pixels=given)
    last = pruned.report.sites[-1].name
    assert len(set(pruned.token_counts()[last].tolist())) > 1
    for row in range(4):
        for key, value in pruned(pixels=given[row : row + 1]).items():
            assert gap(together[key][row : row + 1], value) < 1e-4


@pytest.mark.parametrize("form", FORMS[:3], ids="-".join)
def test_training_learns_and_without_pruning_is_the_originals(form: tuple[Norm, str, str]) -> None:
    """A batch norm in training mixes samples: it runs on all tokens."""
    _, model, pruned = made(*form)
    model, pruned = copy.deepcopy(model).train(), copied(pruned).train()
    given = pixels(3)
    with pruned.dense():
        for key, value in model(given).items():
            assert gap(value, pruned(pixels=given)[key]) < 5e-6, key
    found = gradients(pruned, lambda: pruned(pixels=given))
    assert all(bool(g.isfinite().all()) for g in found.values())
    assert found["madtp.alignment.tokens"].abs().sum() > 0


@torch.no_grad()
def test_a_stream_that_is_scaled_at_each_sum_is_a_residual_stream() -> None:
    flat, _ = drawn("layer", "global", "plain")
    model = Maps(flat, "layer", scaled=True).eval()
    pruned = rewritten(model)
    assert len(pruned.report.sites) == DEPTH
    given = pixels(3)
    pruned(pixels=given)
    assert int(pruned.token_counts()[pruned.report.sites[-1].name].max()) < 36
    with pruned.dense():
        for key, value in model(given).items():
            assert gap(value, pruned(pixels=given)[key]) < 5e-6, key


class Encoded(GridNet):
    """A convolution tells tokens where they are, in front of each feed-forward; ``maps``: its result is added on the grid."""

    def __init__(self, *, maps: bool) -> None:
        super().__init__("global")
        self.places = nn.ModuleList(nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH) for _ in self.blocks)
        self.maps = maps

    def encoded(self, number: int, x: Tensor, alive: Tensor | None) -> Tensor:
        grid = x.transpose(1, 2).view(len(x), WIDTH, 6, 6)
        if self.maps:
            return (self.places[number](grid) + grid).flatten(2).transpose(1, 2)
        more = self.places[number](grid).flatten(2).transpose(1, 2)
        return x + more if alive is None else torch.where(alive[:, :, None], x + more, x)

    def forward(self, pixels: Tensor, kept: list[Tensor] | None = None) -> dict[str, Tensor]:
        x = self.patches(pixels).flatten(2).transpose(1, 2)
        left = [None] * (len(self.blocks) + 1) if kept is None else [None, *kept]
        for number, block in enumerate(self.blocks):
            before, after = left[number : number + 2]
            mixed = x + block.attention(block.norm1(x), 6, 6, before)  # type: ignore[union-attr, operator]
            x = mixed if before is None else torch.where(before[:, :, None], mixed, x)
            x = self.encoded(number, x, after)
            y = x + block.mlp(block.norm2(x), 6, 6)  # type: ignore[union-attr, operator]
            x = y if after is None else torch.where(after[:, :, None], y, x)
        return {"tokens": self.norm(x)}


@torch.no_grad()
def test_what_is_added_on_the_grid_is_added_to_survivors() -> None:
    torch.manual_seed(0)
    flat = lively(Encoded(maps=False))
    model = Encoded(maps=True).eval()
    model.load_state_dict(flat.state_dict())
    pruned = rewritten(model, merge=False)
    names = [s.name for s in pruned.report.sites]
    assert len(names) == DEPTH
    assert not pruned.report.refusals
    given, kept = pixels(3), survivors(3, 36, DEPTH, 0)
    with pruned.dense():
        assert gap(model(given)["tokens"], pruned(pixels=given)["tokens"]) < 5e-6
    pruned.madtp.control.forced = dict(zip(names, kept, strict=True))
    with eager_arithmetic():
        assert gap(flat(given, kept)["tokens"], pruned(pixels=given)["tokens"]) < 1e-5
    assert pruned.macs_by_module()["blocks.1.mlp.up"] < 0.5 * 36 * 3 * WIDTH * WIDTH


class Gated(Maps):
    """What is added to is a product with something that depends on the input: no scale."""

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        x = self.patches(pixels).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = x * pixels.mean((1, 2, 3))[:, None, None] + block.attention(block.norm1(x), 6, 6, None)  # type: ignore[union-attr, operator]
        return {"mean": x.mean(1)}


class Untold(Maps):
    """Nothing tells which dimension holds the channels."""

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        x = self.patches(pixels)
        batch, channels, height, width = x.shape
        for block in self.blocks:
            y = block.attention(x.view(batch, channels, -1).mT, height, width, None)  # type: ignore[union-attr, operator]
            x = x + y.mT.reshape(x.shape)
        return {"mean": x.mean((2, 3))}


@pytest.mark.parametrize(("kind", "words"), [(Gated, "no residual add follows it"), (Untold, "4 dimensions")])
def test_near_misses_are_refused(kind: type[Maps], words: str) -> None:
    with pytest.raises(madtp.MadtpError, match=words):
        rewritten(kind(drawn("layer", "global", "plain")[0], "layer").eval())


class Rounding(Maps):
    """Maps whose results depend upon their last digits: single precision is farther from the exact ones than any tolerance.

    While it is captured it rounds otherwise, and is wrong by the relative ``error``.
    """

    def __init__(self, error: float = 0.0) -> None:
        super().__init__(drawn("batch", "global", "plain")[0], "batch")
        self.error = error

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        found = super().forward(pixels)["tokens"]
        if torch.compiler.is_exporting():
            found = found * 3 / 3 * (1 + self.error)
        return {"tokens": torch.sin(3e3 * found)}


def test_a_model_that_rounds_more_than_the_tolerance_is_judged_in_double_precision() -> None:
    model = Rounding().eval()
    pruned = rewritten(model)
    assert (pruned.report.capture, len(pruned.report.sites)) == ("whole", DEPTH)
    given = pixels(3)
    with torch.no_grad(), pruned.dense():
        assert gap(model(given)["tokens"], pruned(pixels=given)["tokens"]) > 1e-4
    exact, own = copy.deepcopy(model).double(), copy.deepcopy(pruned).double()
    with torch.no_grad(), own.dense():
        assert gap(exact(given.double())["tokens"], own(pixels=given.double())["tokens"]) < 1e-9


def test_an_error_that_hides_in_rounding_is_found() -> None:
    with pytest.raises(RewriteError, match="differs from the original"):
        rewritten(Rounding(error=1e-6).eval())
