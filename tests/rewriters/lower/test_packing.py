"""Pruned streams run as packed rows, and compute what they compute on a padded batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from case_models import CASES
from model_case import DEPTH, Case
from rewritten_models import gap, gradients
from torch import Tensor, nn

import madtp
from madtp import PruningConfig
from madtp.calls.call import Call
from madtp.tokens import packing as runtime
from rewriters.capture import export
from rewriters.lower import packing

CONFIG = PruningConfig(alignment_tokens=8)


def both_forms(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[madtp.PrunedModel, madtp.PrunedModel]:
    """The model rewritten twice, into packed programs and into padded ones, from one run of torch.export."""
    plain, known = export.export_freely, dict[str, Any]()

    def once(model: nn.Module, call: Call, *others: Any) -> Any:
        key = str((type(model), [getattr(leaf, "shape", leaf) for leaf in call.flat()[0]], others))
        if key not in known:
            known[key] = plain(model, call, *others)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "export_freely", once)
        packed = madtp.rewrite(model, inputs, config=CONFIG)
        patch.setattr(packing, "follows_tokens", lambda config: False)
        return packed, madtp.rewrite(model, inputs, config=CONFIG)


def leaves(output: object) -> dict[str, Tensor]:
    found = torch.utils._pytree.tree_flatten_with_path(output)[0]
    return {str(path): leaf for path, leaf in found if isinstance(leaf, Tensor) and leaf.is_floating_point()}


def conversions(pruned: madtp.PrunedModel) -> list[str]:
    """The functions that go from one form to the other in the graph of the last call."""
    assert pruned.madtp.forward_of_host.programs is not None
    (entry,) = pruned.madtp.forward_of_host.programs.entries.values()
    both = (runtime.to_rows, runtime.to_slots, runtime.folded_to_rows, runtime.folded_to_slots)
    return [node.target.__name__ for node in entry.program.graph.nodes if node.target in both]


@pytest.mark.parametrize("name", CASES)
def test_packed_rows_equal_a_padded_batch(name: str) -> None:
    case: Case = CASES[name]
    torch.manual_seed(1)
    model, example = case.build(), case.inputs(2, 6)
    both = both_forms(model, example)
    inputs = case.inputs(5, 7)
    for gain in (0.0, 0.9, 1.2):
        for pruned in both:
            pruned.gain = gain
        outputs = []
        with torch.no_grad():
            for pruned in both:
                outputs.append(leaves(pruned(**inputs)))
        assert outputs[0].keys() == outputs[1].keys()
        assert all(gap(outputs[1][n], outputs[0][n]) < 2e-5 for n in outputs[0])
        counts, wanted = (pruned.token_counts() for pruned in both)
        assert all(torch.equal(wanted[n], counts[n]) for n in wanted)
        kept, wanted = (pruned.kept_tokens() for pruned in both)
        assert all(torch.equal(wanted[n], kept[n]) for n in wanted)
    packed, padded = (gradients(pruned, lambda p=pruned: leaves(p(**inputs))) for pruned in both)
    assert packed.keys() == padded.keys()
    assert all(gap(padded[n], packed[n]) < 1e-4 for n in padded)


@pytest.mark.parametrize("name", ["vit", "towers_batch_first_post"])
@torch.no_grad()
def test_packed_rows_score_by_the_same_queries(name: str) -> None:
    """Padded samples have masks, and so ask all queries: one sample at a time has none."""
    case: Case = CASES[name]
    torch.manual_seed(1)
    model, inputs = case.build(), case.inputs(4, 6)
    pruned = madtp.rewrite(model, inputs, config=PruningConfig(alignment_tokens=8, score_queries=4)).eval()
    whole = leaves(pruned(**inputs))
    counts = pruned.token_counts()
    assert any(len(set(count.tolist())) > 1 for count in counts.values())
    for sample in range(4):
        alone = leaves(pruned(**{name: value[sample : sample + 1] for name, value in inputs.items()}))
        assert all(gap(whole[path][sample : sample + 1], alone[path]) < 2e-5 for path in whole)


class Block(nn.Module):
    """A pre-norm block whose attention reads ``change(normed tokens)``."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(16), nn.LayerNorm(16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        y = change(self.first(x))
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.down(F.gelu(self.up(self.second(x))))


@dataclass(frozen=True)
class Given:
    """What a block's input is changed by: per sample ``[B, 16]``, per position ``[N, 16]``, and the index of the block."""

    sample: Tensor
    position: Tensor


Change = Callable[[Tensor, Given], Tensor]


def conditioned(x: Tensor, given: Given) -> Tensor:
    return x * (1 + given.sample[:, None])


def conditioned_from_the_left(x: Tensor, given: Given) -> Tensor:
    return given.sample.unsqueeze(1) + x


def positions_added(x: Tensor, given: Given) -> Tensor:
    return x + given.position


def positions_of_each_sample(x: Tensor, given: Given) -> Tensor:
    return x + given.position * given.sample[:, :1, None]


def reshaped_by_size(x: Tensor, given: Given) -> Tensor:
    return x.view(x.shape[0], x.shape[1], 4, 4).transpose(2, 3).reshape(x.size(0), x.size(1), -1)


def folded(x: Tensor, given: Given) -> Tensor:
    return (x.reshape(-1, 16) * 2).view(x.shape)


def tokens_first(x: Tensor, given: Given) -> Tensor:
    return (x.transpose(0, 1).reshape(-1, 16) * 2).reshape(x.size(1), x.size(0), 16).transpose(0, 1)


def joined_with_a_constant(x: Tensor, given: Given) -> Tensor:
    return torch.cat((x[..., :8], given.sample[:, None, 8:].expand(-1, x.size(1), -1)), -1)


def matrix_of_each_sample(x: Tensor, given: Given) -> Tensor:
    return x @ (given.sample[:, :, None] * given.sample[:, None, :])


class Conditioned(nn.Module):
    def __init__(self, change: Change) -> None:
        super().__init__()
        self.change = change
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)

    def forward(self, x: Tensor, sample: Tensor, position: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, lambda y: self.change(y, Given(sample, position)))
        return x[:, 0]


def call_of(batch: int) -> dict[str, Tensor]:
    scale = torch.logspace(-1, 0.5, batch)[:, None, None]
    return {
        "x": torch.randn(batch, 11, 16) * scale,
        "sample": torch.randn(batch, 16),
        "position": torch.randn(11, 16),
    }


PACKED = [
    conditioned,
    conditioned_from_the_left,
    positions_added,
    positions_of_each_sample,
    reshaped_by_size,
    folded,
    tokens_first,
    joined_with_a_constant,
]


def check(pruned: madtp.PrunedModel, model: nn.Module) -> None:
    pruned.gain = 1.1
    call = call_of(6)
    with torch.no_grad():
        together = pruned(**call)
        counts = pruned.token_counts()["blocks.1"]
        assert len(set(counts.tolist())) > 1
        for one in range(6):
            alone = {**call, "x": call["x"][one : one + 1], "sample": call["sample"][one : one + 1]}
            assert gap(pruned(**alone), together[one : one + 1]) < 1e-5
        with pruned.dense():
            assert gap(model(**call), pruned(**call)) < 1e-6


@pytest.mark.parametrize("change", PACKED, ids=lambda change: change.__name__)
def test_what_belongs_to_a_sample_or_a_position_is_read_row_by_row(change: Change) -> None:
    torch.manual_seed(3)
    model = Conditioned(change).eval()
    pruned = madtp.rewrite(model, call_of(2), config=CONFIG)
    assert len(pruned.report.sites) == DEPTH
    assert not conversions(pruned)
    assert not any("padded" in note for note in pruned.report.notes)
    check(pruned, model)


def test_an_operation_without_a_packed_form_runs_padded_and_is_told() -> None:
    torch.manual_seed(3)
    model = Conditioned(matrix_of_each_sample).eval()
    pruned = madtp.rewrite(model, call_of(2), config=CONFIG)
    assert len(pruned.report.sites) == DEPTH
    assert conversions(pruned)
    (note,) = [note for note in pruned.report.notes if "padded" in note]
    assert "multiplies each sample by a matrix of its own (1 times)" in note
    check(pruned, model)


def test_options_that_read_by_slots_keep_the_padded_form() -> None:
    torch.manual_seed(3)
    model = Conditioned(conditioned).eval()
    config = PruningConfig(alignment_tokens=8, readout="original")
    pruned = madtp.rewrite(model, call_of(2), config=config)
    assert any("padded" in note and "authors' code" in note for note in pruned.report.notes)


class Halved(Conditioned):
    """Two images of each sample, stacked, whose tokens meet behind the last block."""

    def __init__(self, cut: Callable[[Tensor], Sequence[Tensor]]) -> None:
        super().__init__(conditioned)
        self.cut = cut

    def forward(self, x: Tensor, sample: Tensor, position: Tensor) -> Tensor:
        x = self.blocks[0](x, lambda y: y + position)
        first, second = self.cut(x)
        first, second = (self.blocks[1](half * 2, lambda y: y + sample[:, None]) for half in (first, second))
        return first[:, 0] - second[:, 0]


def chunked(x: Tensor) -> Sequence[Tensor]:
    return x.chunk(2)


def split(x: Tensor) -> Sequence[Tensor]:
    return x.split(x.shape[0] // 2)


def sliced(x: Tensor) -> Sequence[Tensor]:
    return x[: x.shape[0] // 2], x[x.shape[0] // 2 :]


@pytest.mark.parametrize("cut", [chunked, split, sliced], ids=lambda cut: cut.__name__)
def test_halves_of_a_batch_are_stretches_of_rows(cut: Callable[[Tensor], Sequence[Tensor]]) -> None:
    torch.manual_seed(3)
    model = Halved(cut).eval()
    calls = [{**call_of(batch), "sample": torch.randn(batch // 2, 16)} for batch in (4, 8)]
    pruned = madtp.rewrite(model, calls[0], config=CONFIG)
    assert len(pruned.report.sites) == 3
    assert not conversions(pruned)
    pruned.gain = 1.1
    with torch.no_grad():
        together = pruned(**calls[1])
        assert len(set(pruned.token_counts()["blocks.0"].tolist())) > 1
        for one in range(4):
            alone = {"x": calls[1]["x"][one::4], "sample": calls[1]["sample"][one : one + 1]}
            assert gap(pruned(**alone, position=calls[1]["position"]), together[one : one + 1]) < 1e-5
