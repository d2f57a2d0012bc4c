"""Class tokens and many registers: queries and keys of the tokens behind them are turned, those of special tokens are not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from rewritten_models import eager_arithmetic, gap
from torch import Tensor, nn

import madtp
from madtp.calls.call import normalise_call
from rewriters.canonicalise.passes import canonicalise
from rewriters.capture.export import capture
from rewriters.graph.nodes import op_name

WIDTH, PATCHES = 16, 48

Cut = Callable[[Tensor, int], tuple[Tensor, Tensor]]
CUTS: dict[str, Cut] = {
    "split": lambda x, count: x.split((count, x.shape[2] - count), dim=2),  # type: ignore[dict-item, return-value]
    "slices": lambda x, count: (x[:, :, :count], x[:, :, count:]),
    "narrow": lambda x, count: (x.narrow(2, 0, count), x.narrow(2, count, x.shape[2] - count)),
}


class Registers(nn.Module):
    """A tower of three blocks with ``count`` learned tokens in front of the patches; the first is read.

    hidden: by block, tokens ``[B, N]`` that its attention must not see.
    """

    def __init__(self, count: int, cut: Cut) -> None:
        super().__init__()
        self.count, self.cut = count, cut
        self.learned = nn.Parameter(torch.randn(1, count, WIDTH))
        self.angles = nn.Parameter(torch.rand(PATCHES, WIDTH // 2), requires_grad=False)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))
        self.projections = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(3))
        self.outs = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.hidden: list[Tensor] = []

    def turned(self, x: Tensor) -> Tensor:
        first, others = self.cut(x, self.count)
        cosine, sine = self.angles.cos(), self.angles.sin()
        swapped = torch.cat([-others[..., 4:], others[..., :4]], -1)
        return torch.cat([first, others * cosine + swapped * sine], dim=2)

    def forward(self, patches: Tensor) -> Tensor:
        x = torch.cat([self.learned.expand(patches.shape[0], -1, -1), patches], 1)
        hidden = iter(self.hidden)
        for norm, projection, out in zip(self.norms, self.projections, self.outs, strict=True):
            q, k, v = projection(norm(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
            mask = next(hidden, None)
            visible = None if mask is None else ~mask[:, None, None]
            attended = F.scaled_dot_product_attention(self.turned(q), self.turned(k), v, visible)
            x = x + out(attended.transpose(1, 2).flatten(2))
        return x[:, 0]


def made(count: int, cut: str, patches: int = PATCHES) -> tuple[Registers, Tensor]:
    torch.manual_seed(0)
    return Registers(count, CUTS[cut]).eval(), torch.randn(2, patches, WIDTH)


@pytest.mark.parametrize("cut", sorted(CUTS))
@torch.no_grad()
def test_more_registers_than_a_short_prefix_are_special_tokens_of_one_stream(cut: str) -> None:
    model, patches = made(11, cut)
    pruned = madtp.rewrite(model, {"patches": patches}, config=madtp.PruningConfig(alignment_tokens=8, merge=False))
    assert [len(stream.special) for stream in pruned.report.streams] == [11]
    names = [site.name for site in pruned.report.sites]
    assert len(names) == 3
    assert not pruned.report.refusals
    with pruned.dense():
        assert gap(model(patches), pruned(patches=patches)) < 1e-5
    kept = [torch.ones(2, 11 + PATCHES, dtype=torch.bool) for _ in names]
    generator = torch.Generator().manual_seed(1)
    for earlier, later in zip([None, *kept], kept, strict=False):
        later[:, 11:] = torch.rand(2, PATCHES, generator=generator) < 0.6
        if earlier is not None:
            later &= earlier
    pruned.madtp.control.forced = dict(zip(names, kept, strict=True))
    with eager_arithmetic():
        found = pruned(patches=patches)
        model.hidden = [torch.zeros_like(kept[0]), *(~k for k in kept[:-1])]
        assert gap(model(patches), found) < 1e-5


@torch.no_grad()
def test_special_tokens_survive_in_any_case() -> None:
    model, patches = made(11, "split")
    pruned = madtp.rewrite(model, {"patches": patches}, config=madtp.PruningConfig(alignment_tokens=8, gain=50.0))
    pruned(patches=patches)
    assert all(int(counts.min()) >= 11 for counts in pruned.token_counts().values())


@torch.no_grad()
def test_as_many_learned_tokens_as_others_are_all_kept() -> None:
    torch.manual_seed(0)
    model = Registers(PATCHES, CUTS["slices"]).eval()
    patches = torch.randn(2, PATCHES, WIDTH)
    pruned = madtp.rewrite(model, {"patches": patches})
    pruned.gain = 3.0
    found = pruned(patches=patches)
    assert all(bool(kept[:, :PATCHES].all()) for kept in pruned.kept_tokens().values())
    assert all(bool((counts < 2 * PATCHES).all()) for counts in pruned.token_counts().values())
    torch.testing.assert_close(pruned(patches=patches[:1]), found[:1])
    with pruned.dense():
        torch.testing.assert_close(pruned(patches=patches), model(patches=patches))


class Narrowed(nn.Module):
    def __init__(self, start: int, length: int | None) -> None:
        super().__init__()
        self.start, self.length = start, length

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        length = x.shape[1] - self.start if self.length is None else self.length
        return x.narrow(1, self.start, length) * 2 + y.sum()


@pytest.mark.parametrize(("start", "length"), [(0, 2), (1, None), (1, 2), (0, None), (-2, 2), (-2, 1)])
def test_a_narrowing_is_a_slice(start: int, length: int | None) -> None:
    model, x = Narrowed(start, length), torch.randn(2, 5, 3)
    captured = capture(model, normalise_call(model, (x, torch.ones(2)), {}))
    canonicalise(captured.graph)
    assert "narrow" not in [op_name(n) for n in captured.graph.nodes if n.op == "call_function"]
    assert torch.equal(torch.fx.GraphModule(model, captured.graph)(x, torch.ones(2))[0], model(x, torch.ones(2)))
