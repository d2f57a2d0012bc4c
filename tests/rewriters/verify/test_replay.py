"""A rewrite that is wrong with pruning on is refused, whatever hides in the model: the rewriter checks its own result."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from rewritten_models import eager_arithmetic
from torch import Tensor, nn

import madtp
from madtp.errors import RewriteError
from madtp.tokens import state
from rewriters.axes import slice_rules as part_rules
from rewriters.axes import table as rules
from rewriters.axes.labels import LabelMap
from rewriters.axes.outcome import Outcome
from rewriters.insert import repairs


class Block(nn.Module):
    def __init__(self, width: int, mixer: nn.Module | None) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.feed_forward = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.mixer = mixer

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        y = self.norm2(x)
        return x + self.feed_forward(y if self.mixer is None else self.mixer(y))


class Tower(nn.Module):
    def __init__(self, mixer: nn.Module | None = None) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.class_token = nn.Parameter(torch.randn(1, 1, 16))
        self.blocks = nn.ModuleList([Block(16, mixer) for _ in range(3)])

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patches(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        return x[:, 0]


class Cumulative(nn.Module):
    """Mixes tokens: each becomes the sum of those before it."""

    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(1)


class BatchMean(nn.Module):
    """Mixes samples."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0, keepdim=True)


@pytest.fixture(autouse=True)
def plain_attention() -> Iterator[None]:
    with eager_arithmetic():
        yield


def inputs() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {"pixels": torch.randn(3, 3, 24, 24)}


def _untouched(node: torch.fx.Node, labels: LabelMap) -> Outcome:
    return Outcome(labels=labels.of(node.args[0]))


def test_a_sound_rewrite_passes() -> None:
    assert len(madtp.rewrite(Tower().eval(), inputs()).report.sites) == 3


def test_a_rule_that_misses_a_mix_of_tokens_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(rules.RULES, "cumsum", _untouched)
    with pytest.raises(RewriteError, match="mixes tokens in a way that the rewriter did not see"):
        madtp.rewrite(Tower(Cumulative()).eval(), inputs())


def test_with_the_right_rule_the_mix_of_tokens_runs_on_all_of_them() -> None:
    assert len(madtp.rewrite(Tower(Cumulative()).eval(), inputs()).report.sites) == 3


def test_a_rule_that_misses_a_mix_of_samples_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def mean(node: torch.fx.Node, labels: LabelMap) -> Outcome:
        own = labels.of(node.args[0])
        return Outcome(labels=own) if node.args[1] == [0] else part_rules.reduce(node, labels)

    monkeypatch.setitem(rules.RULES, "mean", mean)
    with pytest.raises(RewriteError, match=r"output|decisions hold"):
        madtp.rewrite(Tower(BatchMean()).eval(), inputs())


class Contrast(Tower):
    """Compares samples, as scores between the texts and the images of a batch that are shares do."""

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        features = super().forward(pixels)
        return (features @ features.mT).softmax(0), features


def test_outputs_that_compare_samples_in_the_original_may_depend_on_them() -> None:
    assert len(madtp.rewrite(Contrast().eval(), inputs()).report.sites) == 3


def test_outputs_beside_those_that_compare_samples_are_still_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    def shares(values: Tensor, tokens: state.TokenState, *places: int) -> Tensor:
        read = read_position(values, tokens, *places)
        return read if tokens.index is None else read * read.mean(1, keepdim=True).softmax(0)

    read_position = state.read_position
    monkeypatch.setattr(repairs.runtime, "read_position", shares)
    report = madtp.rewrite(Contrast().eval(), inputs()).report
    assert report.regions == ("blocks.0 to blocks.2",)
    assert "output 1 of the first sample" in report.refusals[0].reason


class BlockTracedOtherwise(Block):
    """Computes something else while it is traced, as a model does that leaves a mask out by its values."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * 2 if torch.compiler.is_exporting() else x)


class TracedOtherwise(Tower):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([BlockTracedOtherwise(16, None) for _ in range(3)])


class Coupled(Tower):
    """Computes something else for a single sample than for it in a batch."""

    def forward(self, pixels: Tensor) -> Tensor:
        return super().forward(pixels * 2 if pixels.shape[0] == 1 and not torch.compiler.is_exporting() else pixels)


@torch.no_grad()
def test_a_model_that_treats_a_sample_alone_otherwise_is_no_region_for_that_reason() -> None:
    model = Coupled().eval()
    pruned = madtp.rewrite(model, inputs())
    assert pruned.report.regions == ("blocks.0 to blocks.2",)
    assert "from what the model itself computes for it in its batch" in pruned.report.refusals[0].reason
    for batch in (inputs()["pixels"], inputs()["pixels"][:1]):
        with pruned.dense():
            assert torch.equal(model(batch), pruned(batch))


class TwoTowers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sound, self.odd = Tower(), TracedOtherwise()

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        return self.sound(pixels), self.odd(pixels)


@pytest.mark.slow
@torch.no_grad()
def test_what_is_sound_in_a_model_that_is_wrong_as_a_whole_is_rewritten() -> None:
    model = TwoTowers().eval()
    report = (pruned := madtp.rewrite(model, inputs())).report
    assert report.regions == ("sound",)
    assert {refusal.block for refusal in report.refusals} == {"TwoTowers", "odd"}
    assert all("differs from the original" in refusal.reason for refusal in report.refusals)
    with pruned.dense():
        assert all(torch.equal(a, b) for a, b in zip(model(**inputs()), pruned(**inputs()), strict=True))


def test_a_model_that_is_wrong_with_all_its_parts_is_refused() -> None:
    with pytest.raises(RewriteError, match="differs from the original"):
        madtp.rewrite(TracedOtherwise().eval(), inputs())
