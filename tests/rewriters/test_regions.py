"""Regions: models that do not export whole, or whose own methods drive their submodules."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from model_case import DEPTH, Tensors, text
from region_hosts import Collector, Decoder, Memory, Selector, Vision, captioner, selector
from rewritten_models import eager_arithmetic, gap
from torch import Tensor, nn
from two_towers import Tower

import madtp
from madtp.cost.counting import Counter
from madtp.errors import ExampleInputsError
from rewriters.capture.recording import record
from rewriters.plan.plan import Plan
from rewriters.plan.request import Request
from rewriters.regions.choice import rewrite_regions

CONFIG = madtp.PruningConfig(alignment_tokens=5, temperature=4.0)
Pair = tuple[Any, Tensors, madtp.PrunedModel]


@pytest.fixture(autouse=True)
def plain_attention() -> Iterator[None]:
    with eager_arithmetic():
        yield


def _rewritten(model: nn.Module, inputs: Tensors, config: madtp.PruningConfig = CONFIG) -> Pair:
    with eager_arithmetic():
        return model, inputs, madtp.rewrite(model, inputs, config=config)


@pytest.fixture(scope="module")
def selecting() -> Pair:
    torch.manual_seed(0)
    return _rewritten(*selector())


@pytest.fixture(scope="module")
def captioning() -> Pair:
    torch.manual_seed(0)
    # Asked for by name, causal text is pruned too, where no memory is kept.
    return _rewritten(*captioner(), replace(CONFIG, towers=("image", "text")))


def test_a_model_with_python_on_values_is_rewritten_by_its_towers(selecting: Pair) -> None:
    report = selecting[2].report
    assert report.capture == "regions"
    assert report.regions == ("vision", "text")
    assert [s.name for s in report.sites] == [f"vision.tower.encoder.layers.{i}" for i in range(DEPTH)] + [
        f"text.encoder.layers.{i}" for i in range(DEPTH)
    ]
    assert [s.modality for s in report.sites] == ["image"] * DEPTH + ["text"] * DEPTH
    assert all(s.protected == (0,) for s in report.sites), "the host reads the first token of both"
    assert {b.path for b in report.blocks} == {s.name for s in report.sites}
    assert {b.stream for b in report.blocks} == {0, 1}
    assert "region: vision" in str(report)
    assert "regions capture" in str(report)


@pytest.mark.parametrize(("batch", "length"), [(1, 5), (4, 9)])
@torch.no_grad()
def test_temperature_zero_reproduces_the_original(selecting: Pair, batch: int, length: int) -> None:
    model, _, pruned = selecting
    inputs = {"pixels": torch.randn(batch, 3, 32, 32), **text(batch, length)}
    with pruned.dense():
        wanted, found = model(**inputs), pruned(**inputs)
    assert all(gap(wanted[n], found[n]) < 1e-5 for n in wanted)


@torch.no_grad()
def test_a_sample_ignores_its_batch_mates(selecting: Pair) -> None:
    _, inputs, pruned = selecting
    together, counts = pruned(**inputs), pruned.token_counts()
    assert set(counts) == {s.name for s in pruned.report.sites}
    assert all(int(c.max()) < 17 for c in counts.values())
    for row in range(3):
        alone = pruned(**{n: x[row : row + 1] for n, x in inputs.items()})
        assert all(gap(together[n][row : row + 1], alone[n]) < 1e-4 for n in alone)
        assert all(int(c) == int(counts[n][row]) for n, c in pruned.token_counts().items())


def test_the_host_keeps_its_parts(captioning: Pair) -> None:
    model, _, pruned = captioning
    assert isinstance(pruned.vision, Vision)
    assert isinstance(pruned.decoder, Decoder)
    assert pruned.decoder.blocks[0].layer == 0
    assert pruned.vision is not model.vision
    assert pruned.vision.patches.convolution.weight is model.vision.patches.convolution.weight
    own = [n for n in pruned.state_dict() if not n.startswith("madtp.")]
    assert own == list(model.state_dict())
    assert "forward" not in model.vision.__dict__


@torch.no_grad()
def test_generate_gives_the_originals_tokens_without_pruning(captioning: Pair) -> None:
    model, _, pruned = captioning
    for batch in (1, 4):
        pixels = torch.randn(batch, 3, 32, 32)
        with pruned.dense():
            assert torch.equal(pruned.generate(pixels), model.generate(pixels))


@torch.no_grad()
def test_generate_prunes_what_it_can(captioning: Pair) -> None:
    _, inputs, pruned = captioning
    pruned(**inputs)
    assert any("decoder" in name for name in pruned.token_counts())
    assert pruned.generate(inputs["pixels"]).shape == (3, 6)
    counts = pruned.token_counts()
    assert set(counts) == {f"vision.tower.encoder.layers.{i}" for i in range(DEPTH)}, "the record starts anew"
    assert all(int(c.max()) < 17 for c in counts.values())


class Secretive(Memory):
    """Holds what cannot be taken apart."""

    def __init__(self) -> None:
        super().__init__()
        self.listeners: set[str] = set()


@torch.no_grad()
def test_what_cannot_be_taken_apart_is_left_alone_and_noted(captioning: Pair) -> None:
    model, inputs, pruned = captioning
    image = model.vision(inputs["pixels"])
    for _ in range(2):
        wanted = model.decoder(inputs["input_ids"], image, Secretive())
        assert gap(wanted, pruned.decoder(inputs["input_ids"], image, Secretive())) < 1e-5
    assert sum("decoder" in note and "Secretive (it holds a set)" in note for note in pruned.report.notes) == 1


@torch.no_grad()
def test_a_part_called_by_itself_is_a_forward_too(captioning: Pair) -> None:
    _, inputs, pruned = captioning
    pruned(**inputs)
    pruned.vision(inputs["pixels"])
    assert set(pruned.token_counts()) == {f"vision.tower.encoder.layers.{i}" for i in range(DEPTH)}
    assert pruned.macs() < sum(pruned.macs_by_module("all").values())


@torch.no_grad()
@pytest.mark.parametrize("name", ["selecting", "captioning"])
def test_macs_add_up_to_what_the_original_takes(name: str, request: pytest.FixtureRequest) -> None:
    model, inputs, pruned = request.getfixturevalue(name)
    with Counter(lambda: False) as counter:
        model(**inputs)
    with pruned.dense():
        pruned(**inputs)
        assert pruned.macs() == pytest.approx(counter.total / 3, rel=1e-3)
    pruned(**inputs)
    assert sum(pruned.macs_by_module("all").values()) == pytest.approx(counter.total / 3, rel=1e-3)
    assert pruned.macs() < 0.9 * counter.total / 3
    assert madtp.count_macs(model, inputs) == pytest.approx(counter.total / 3, rel=1e-3)


def test_values_collected_inside_a_region_are_not_missed() -> None:
    torch.manual_seed(0)
    inputs = selector()[1]
    model, _, pruned = _rewritten(Collector().eval(), inputs)
    with torch.no_grad():
        wanted, found = model(**inputs, inner=True), pruned(**inputs, inner=True)
        assert wanted.keys() == found.keys()
        assert all(gap(wanted[n], found[n]) < 1e-5 for n in wanted)
        assert any("run unpruned" in note for note in pruned.report.notes)
        pruned(**inputs)
        assert pruned.token_counts()


def test_regions_train(selecting: Pair) -> None:
    _, inputs, pruned = selecting
    pruned = copy.deepcopy(pruned).train()
    optimizer = torch.optim.Adam(pruned.parameters(), 1e-2)
    losses = []
    for _ in range(6):
        loss = 1 - pruned(**inputs)["score"].mean() + 0.1 * pruned.alignment_loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    missing = [n for n, p in pruned.named_parameters() if p.grad is None and not n.startswith("madtp.")]
    assert not missing
    assert pruned.madtp.alignment.tokens.grad is not None
    assert selecting[2].vision.tower.encoder.layers[0].linear1.weight.grad is None, "a deep copy is independent"


@torch.no_grad()
def test_save_and_load(selecting: Pair, tmp_path: Path) -> None:
    _, inputs, pruned = selecting
    madtp.save(pruned, tmp_path / "saved")
    again = madtp.load(tmp_path / "saved", Selector().eval())
    assert again.report.regions == pruned.report.regions
    wanted, found = pruned(**inputs), again(**inputs)
    assert all(torch.equal(wanted[n], found[n]) for n in wanted)


def test_calibrate_and_freeze(selecting: Pair) -> None:
    _, inputs, pruned = selecting
    pruned = copy.deepcopy(pruned)
    pruned.temperature = 1.0
    result = madtp.calibrate(pruned, [inputs], reduction=0.25, tolerance=0.05)
    assert abs(result.reduction_reached - 0.25) < 0.05
    assert set(madtp.freeze(pruned, [inputs])) == {s.name for s in pruned.report.sites}


def test_a_plan_of_regions_can_be_edited(selecting: Pair) -> None:
    model, inputs, _ = selecting
    plan = Plan.from_dict(rewrite_regions(Request(model, madtp.calls.call.Call((), inputs), CONFIG)).plan.to_dict())
    fewer = plan.without(["text.encoder.layers.0", "vision.tower.encoder.layers.1"], ())
    pruned = madtp.rewrite(model, inputs, config=CONFIG, plan=fewer)
    assert [s.name for s in pruned.report.sites] == [s.name for s in fewer.sites]


class Hopeless(nn.Module):
    """Python on values in its only block."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 8, 8)
        self.attentions = nn.ModuleList(nn.MultiheadAttention(16, 2, batch_first=True) for _ in range(2))

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patch(pixels).flatten(2).transpose(1, 2)
        for attention in self.attentions:
            x = x + attention(x, x, x, need_weights=False)[0] if x.sum().item() > 0 else -x
        return x


def test_what_has_no_region_is_refused_with_reasons() -> None:
    with pytest.raises(madtp.MadtpError, match="data-dependent Python"):
        madtp.rewrite(Hopeless().eval(), (torch.randn(2, 3, 32, 32),))


class Part(nn.Module):
    """Two blocks whose text tower the rewriter cannot follow to the end: positions are turned round before the last one."""

    def __init__(self) -> None:
        super().__init__()
        self.vision, self.words = Vision(), nn.Embedding(99, 16)
        self.last = Tower(batch_first=True, norm_first=True)

    def forward(self, pixels: Tensor, input_ids: Tensor) -> Tensor:
        joint = torch.cat([self.vision(pixels), self.words(input_ids)], 1).flip(1)
        return self.last(joint)


class Holder(nn.Module):
    """Python on values around a part that exports, but of which only the parts can be rewritten in full."""

    def __init__(self) -> None:
        super().__init__()
        self.part = Part()

    def forward(self, pixels: Tensor, input_ids: Tensor) -> Tensor:
        found = self.part(pixels, input_ids)
        return found if pixels.sum().item() > -1e9 else -found


def test_parts_are_preferred_where_they_hold_more_sites() -> None:
    inputs = {"pixels": torch.randn(2, 3, 32, 32), "input_ids": text(2, 6)["input_ids"]}
    rewritten = rewrite_regions(Request(Holder().eval(), madtp.calls.call.Call((), inputs), CONFIG))
    assert [r.region.path for r in rewritten.regions] == ["part.vision", "part.last"]
    assert len(rewritten.plan.sites) == 2 * DEPTH


class Packed(nn.Module):
    """Takes the patches of all images in one row."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.tower = nn.Linear(12, 16), Tower(batch_first=True, norm_first=True)

    def forward(self, patches: Tensor, sizes: Tensor) -> Tensor:
        return self.tower(self.embed(torch.stack(patches.split(sizes.tolist()))))[:, 0]


@torch.no_grad()
def test_rows_of_several_samples_may_come_packed() -> None:
    inputs = {"patches": torch.randn(18, 12), "sizes": torch.full((2,), 9)}
    model, _, pruned = _rewritten(Packed().eval(), inputs)
    assert pruned.report.regions == ("tower",)
    with pruned.dense():
        assert gap(model(**inputs), pruned(**inputs)) < 1e-5
    with pytest.raises(ExampleInputsError, match="disagree"):
        madtp.rewrite(model, {**inputs, "sizes": torch.full((3,), 7)})


class Mixture(nn.Module):
    """Towers that read what other parts looked up, sliced, masked and joined."""

    def __init__(self) -> None:
        super().__init__()
        self.vision, self.words, self.kinds = Vision(), nn.Embedding(99, 16), nn.Embedding(2, 16)
        self.first, self.second, self.third = (nn.Sequential(nn.Linear(16, 16)) for _ in range(3))

    def forward(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor, kinds: Tensor) -> Tensor:
        image = self.vision(pixels) + self.kinds(torch.ones_like(kinds[:, :1]))
        words = (self.words(input_ids.clamp(min=1)) + self.kinds(kinds)) * attention_mask[:, :, None]
        joint = words.clone()
        joint[:, :2] = image[:, :2]
        words = words + self.second(words)[:, -1:].mean() + (2 * self.second(words))[:, -2].mean()
        return self.first(image[:, 1:]).mean() + self.second(words).mean() + self.third(joint).mean()


def test_modalities_are_followed_through_a_run() -> None:
    inputs = {"pixels": torch.randn(2, 3, 32, 32), **text(2, 6), "kinds": torch.zeros(2, 6, dtype=torch.long)}
    calls = record(Mixture().eval(), madtp.calls.call.Call((), inputs)).calls
    carried = {name: set(*calls[name].modalities.values()) for name in ("vision", "first", "second", "third")}
    assert carried == {
        "vision": {"image"},
        "first": {"image"},
        "second": {"text"},
        "third": {"image", "text"},
    }
    assert calls["vision"].attentions == DEPTH
    assert calls["first"].attentions == 0
    assert calls["second"].read_positions == {-2}
    assert calls["vision"].read_positions == set()
