"""Images apart: towers that take all images in one row, or padded, are pruned image by image."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from cases import Tensors
from packed import GRIDS, Mingling, PackedHost, Padded, Rows, Strip, packed, padded, reordered, rows, strip
from rewrites import eager_arithmetic, gap
from torch import nn

import madtp
from madtp import region_apart

CONFIG = madtp.PruningConfig(alignment_tokens=5, temperature=4.0)
Made = tuple[PackedHost, Callable[..., Tensors], madtp.PrunedModel]


@pytest.fixture(autouse=True)
def plain_attention() -> Iterator[None]:
    with eager_arithmetic():
        yield


def _made(tower: nn.Module, inputs: Callable[..., Tensors]) -> Made:
    with eager_arithmetic():
        model = packed(tower)
        return model, inputs, madtp.rewrite(model, inputs(), config=CONFIG)


FORMS: dict[str, tuple[type[Rows], Callable[..., Tensors]]] = {
    "rows": (Rows, rows),
    "padded": (Padded, padded),
    "strip": (Strip, strip),
}


@pytest.fixture(scope="module", params=sorted(FORMS))
def made(request: pytest.FixtureRequest) -> Made:
    torch.manual_seed(0)
    tower, inputs = FORMS[request.param]
    return _made(tower(), inputs)


def test_the_tower_is_a_region_with_all_its_sites(made: Made) -> None:
    report = made[2].report
    assert report.regions == ("vision", "text")
    assert report.apart == ("vision",)
    assert "images apart" in str(report)
    assert [s.name for s in report.sites if s.modality == "image"] == [f"vision.blocks.{i}" for i in range(2)]
    assert not report.refusals


@pytest.mark.parametrize("grids", [((2, 2),), ((2, 6), (4, 4), (2, 2), (4, 4))])
@torch.no_grad()
def test_temperature_zero_reproduces_the_original(made: Made, grids: tuple[tuple[int, int], ...]) -> None:
    model, make, pruned = made
    inputs = make(grids)
    with pruned.dense():
        wanted, found = model(**inputs), pruned(**inputs)
    assert all(gap(wanted[n], found[n]) < 1e-5 for n in wanted)
    assert not pruned.report.notes


@torch.no_grad()
def test_each_image_is_pruned_by_itself(made: Made) -> None:
    _, make, pruned = made
    inputs = make()
    together = pruned(**inputs)
    counts = pruned.token_counts()
    assert all(len(count) == len(GRIDS) for count in counts.values())
    last = counts["vision.blocks.1"]
    assert bool((last < torch.tensor([16, 16, 12])).any())
    spent = pruned.macs()
    with pruned.dense():
        pruned(**inputs)
        assert spent < pruned.macs()
    order = [2, 0, 1]
    found = pruned(**reordered(inputs, order))
    assert gap(together["score"][order], found["score"]) < 1e-5
    assert torch.equal(last[order], pruned.token_counts()["vision.blocks.1"])


def test_it_trains(made: Made) -> None:
    _, make, pruned = made
    pruned = copy.deepcopy(pruned).train()
    inputs = make()
    optimiser = torch.optim.Adam(pruned.parameters(), 1e-2)
    losses = []
    for _ in range(6):
        optimiser.zero_grad()
        loss = (1 - pruned(**inputs)["score"]).mean() + pruned.alignment_loss()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert pruned.get_parameter("vision.blocks.0.attention.qkv.weight").grad is not None


def test_it_comes_back_from_disk(made: Made, tmp_path: Path) -> None:
    model, make, pruned = made
    madtp.save(pruned, tmp_path / "saved")
    again = madtp.load(tmp_path / "saved", copy.deepcopy(model))
    inputs = make()
    with torch.no_grad():
        wanted, found = pruned(**inputs), again(**inputs)
    assert all(torch.equal(wanted[n], found[n]) for n in wanted)


def test_images_that_depend_on_each_other_are_left_alone() -> None:
    torch.manual_seed(0)
    pruned = madtp.rewrite(packed(Mingling()), rows(), config=CONFIG)
    assert pruned.report.regions == ("text",)
    (refused,) = [r for r in pruned.report.refusals if r.block == "vision"]
    assert "depend on each other" in refused.reason


@torch.no_grad()
def test_too_many_sizes_run_as_the_original_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, _, pruned = _made(Rows(), rows)
    monkeypatch.setattr(region_apart, "CACHE", 2)
    inputs = rows(((2, 2), (2, 4), (4, 2)))
    assert gap(model(**inputs)["states"], pruned(**inputs)["states"]) < 1e-5
    assert any("sizes" in note for note in pruned.report.notes)


@torch.no_grad()
def test_images_that_mingle_in_other_sizes_only_are_found_when_these_come() -> None:
    torch.manual_seed(0)

    class Late(Rows):
        def forward(self, rows: torch.Tensor, sizes: torch.Tensor) -> object:
            return super().forward(rows - rows.mean(0) if bool((sizes == 8).any()) else rows, sizes)

    model, _, pruned = _made(Late(), rows)
    assert pruned.report.apart == ("vision",)
    inputs = rows(((8, 2), (4, 4)))
    assert gap(model(**inputs)["states"], pruned(**inputs)["states"]) < 1e-5
    assert any("do not come apart" in note for note in pruned.report.notes)
