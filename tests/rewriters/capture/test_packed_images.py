"""Images apart: towers that take all images in one row, or padded, are pruned image by image."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from model_case import WIDTH, Tensors, lively
from packed_image_hosts import (
    GRIDS,
    Mingling,
    PackedHost,
    Padded,
    Rows,
    Strip,
    Windows,
    packed,
    padded,
    reordered,
    rows,
    strip,
)
from rewritten_models import eager_arithmetic, gap
from torch import nn
from torch.utils import _pytree as pytree

import madtp
from madtp.errors import MadtpError

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
    "windows": (Windows, rows),
}


@cache
def _fresh(form: str) -> Made:
    """A host with a tower of this form, its inputs, and the rewritten host; no test calls that, but copies of it."""
    torch.manual_seed(0)
    tower, inputs = FORMS[form]
    return _made(tower(), inputs)


@pytest.fixture(scope="module", params=sorted(FORMS))
def made(request: pytest.FixtureRequest) -> Made:
    model, inputs, pruned = _fresh(request.param)
    return model, inputs, copy.deepcopy(pruned)


def test_the_tower_is_a_region_with_all_its_sites(made: Made) -> None:
    report = made[2].report
    assert report.regions == ("vision", "text")
    assert report.per_image_regions == report.apart == ("vision",)  # the second is the older name
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
def test_too_many_sizes_run_as_the_original_and_say_so() -> None:
    model, _, fresh = _fresh("rows")
    pruned = copy.deepcopy(fresh)
    pruned.madtp.config = replace(pruned.madtp.config, max_programs=2)
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
    assert pruned.report.per_image_regions == ("vision",)
    inputs = rows(((8, 2), (4, 4)))
    assert gap(model(**inputs)["states"], pruned(**inputs)["states"]) < 1e-5
    assert any("do not come apart" in note for note in pruned.report.notes)


def _alone(inputs: Tensors) -> Tensors:
    return {name: inputs[name] for name in ("rows", "sizes")}


def _leaves(result: object) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]


@pytest.fixture(scope="module", params=["rows", "padded", "windows"])
def tower(request: pytest.FixtureRequest) -> tuple[nn.Module, Callable[..., Tensors], madtp.PrunedModel]:
    torch.manual_seed(0)
    made, inputs = FORMS[request.param]
    model = lively(made())
    with eager_arithmetic():
        return model, inputs, madtp.rewrite(model, _alone(inputs()), config=CONFIG)


Alone = tuple[nn.Module, Callable[..., Tensors], madtp.PrunedModel]


def test_a_tower_can_be_the_whole_model(tower: Alone) -> None:
    report = tower[2].report
    assert report.per_image_regions == ("",)
    assert [s.name for s in report.sites] == ["blocks.0", "blocks.1"]
    assert not report.refusals
    assert f"images apart: {report.model}" in str(report)


@pytest.mark.parametrize("grids", [((2, 2),), ((2, 6), (4, 4), (2, 2), (4, 4))])
@torch.no_grad()
def test_a_whole_tower_reproduces_the_original_at_temperature_zero(
    tower: Alone, grids: tuple[tuple[int, int], ...]
) -> None:
    model, make, pruned = tower
    inputs = _alone(make(grids))
    with pruned.dense():
        wanted, found = model(**inputs), pruned(**inputs)
    assert pytree.tree_structure(wanted) == pytree.tree_structure(found)
    assert all(gap(*both) < 1e-5 for both in zip(_leaves(wanted), _leaves(found), strict=True))
    with pruned.dense():
        assert pruned.macs() == pytest.approx(madtp.count_macs(model, inputs), rel=0.02)
    assert not pruned.report.notes


@torch.no_grad()
def test_images_of_a_whole_tower_do_not_see_each_other(tower: Alone) -> None:
    _, make, pruned = tower
    inputs = make()
    together = _leaves(pruned(**_alone(inputs)))[0].reshape(-1, WIDTH)
    counts = pruned.token_counts()["blocks.1"]
    assert bool((counts < torch.tensor([16, 16, 12])).any())
    mixed = _leaves(pruned(**_alone(reordered(inputs, [2, 0, 1]))))[0].reshape(-1, WIDTH)
    assert gap(torch.cat([together[32:], together[:32]]), mixed) < 1e-5
    assert torch.equal(counts[[2, 0, 1]], pruned.token_counts()["blocks.1"])
    if len(inputs["rows"]) == 44:
        first = pruned(rows=inputs["rows"][:16], sizes=inputs["sizes"][:1])
        assert gap(together[:16], _leaves(first)[0]) < 1e-5


def test_a_whole_tower_has_gradients(tower: Alone) -> None:
    _, make, pruned = tower
    own, inputs = copy.deepcopy(pruned).train(), _alone(make())
    _leaves(own(**inputs))[0].square().mean().backward()
    for name, parameter in own.named_parameters():
        if name.startswith(("blocks.0.attention", "madtp.sites")):
            assert parameter.grad is not None, name
            assert bool(parameter.grad.isfinite().all()), name


def test_a_whole_tower_comes_back_from_disk(tower: Alone, tmp_path: Path) -> None:
    model, make, pruned = tower
    inputs = _alone(make())
    madtp.save(pruned, tmp_path / "saved")
    again = madtp.load(tmp_path / "saved", copy.deepcopy(model))
    with torch.no_grad():
        wanted, found = _leaves(pruned(**inputs)), _leaves(again(**inputs))
    assert all(torch.equal(*both) for both in zip(wanted, found, strict=True))


def test_a_whole_tower_whose_images_depend_on_each_other_is_refused() -> None:
    torch.manual_seed(0)
    with pytest.raises(MadtpError, match="depend on each other"):
        madtp.rewrite(lively(Mingling()), _alone(rows()), config=CONFIG)


@torch.no_grad()
def test_checking_images_of_new_sizes_is_no_part_of_the_macs(made: Made) -> None:
    _, make, pruned = made
    inputs = make(((6, 2), (6, 2)))
    pruned(**inputs)
    spent = pruned.macs()
    pruned(**inputs)
    assert pruned.macs() == pytest.approx(spent)
