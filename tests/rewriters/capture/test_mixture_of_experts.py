"""Sparse experts stay as they are, one operation a layer, if rows do not depend on each other; if they do they cost sites."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import pytest
import torch
from attention_spellings import LENGTH, WIDTH
from masked_oracle import expected, survivors
from mixture_of_experts import MISSES, SPELLINGS, AllExperts, Apart, RowsOfHit, SilentContext, SortedRows, experts_case
from model_case import Case
from rewritten_models import eager_arithmetic, gap, gradients
from torch import nn

import madtp
from madtp import PruningConfig
from madtp.calls.call import normalise_call
from rewriters.capture.mixture_of_experts import find_rowwise

CONFIG = PruningConfig(merge=False, alignment_tokens=4)


@pytest.fixture(autouse=True)
def plain_attention() -> Iterator[None]:
    with eager_arithmetic():
        yield


@cache
def rewritten(kind: type[nn.Module]) -> tuple[Case, nn.Module, madtp.PrunedModel]:
    """A case, its model and what becomes of it."""
    torch.manual_seed(0)
    case = experts_case(kind)
    model = case.build()
    return case, model, madtp.rewrite(model, case.inputs(3, 0), config=CONFIG)


@pytest.mark.parametrize("kind", SPELLINGS, ids=lambda k: k.__name__)
def test_experts_are_pruned_around(kind: type[nn.Module]) -> None:
    case, model, pruned = rewritten(kind)
    assert [s.name for s in pruned.report.sites] == ["blocks.0", "blocks.1"]
    assert pruned.report.capture == "whole"
    assert not pruned.report.refusals
    for batch in (1, 2, 5):
        call = case.inputs(batch, 0)
        with torch.no_grad(), pruned.dense():
            assert gap(model(**call), pruned(**call)) < 1e-5
        forced = {"image": [(torch.rand(batch, LENGTH) < 0.6) & call["mask"] for _ in range(2)]}
        pruned.madtp.control.forced = dict(zip(("blocks.0", "blocks.1"), forced["image"], strict=True))
        with torch.no_grad():
            found = pruned(**call)
            wanted = expected(case, model, call, survivors(case, forced, call))[""]
            alone = torch.cat([_alone(pruned, call, forced["image"], row) for row in range(batch)])
        pruned.madtp.control.forced = None
        assert gap(wanted, found) < 1e-5
        assert gap(found, alone) < 1e-5


def _alone(
    pruned: madtp.PrunedModel, call: dict[str, torch.Tensor], forced: list[torch.Tensor], row: int
) -> torch.Tensor:
    one = [f[row : row + 1] for f in forced]
    pruned.madtp.control.forced = dict(zip(("blocks.0", "blocks.1"), one, strict=True))
    return pruned(**{name: x[row : row + 1] for name, x in call.items()})


@pytest.mark.parametrize("kind", [AllExperts, RowsOfHit, SortedRows, Apart], ids=lambda k: k.__name__)
def test_experts_are_trained(kind: type[nn.Module]) -> None:
    case, model, pruned = rewritten(kind)
    call = case.inputs(3, 0)
    wanted = gradients(model, lambda: {"": model(**call)})
    with pruned.dense():
        found = gradients(pruned, lambda: {"": pruned(**call)})
    assert wanted.keys() <= found.keys()
    assert all(gap(wanted[name], found[name]) < 1e-4 for name in wanted)
    active = gradients(pruned, lambda: {"": pruned(**call)})
    assert wanted.keys() <= active.keys()


@pytest.mark.parametrize("kind", MISSES, ids=lambda k: k.__name__)
@torch.no_grad()
def test_rows_that_depend_on_each_other_cost_sites_and_never_correctness(kind: type[nn.Module]) -> None:
    case = experts_case(kind)
    model = case.build()
    call = case.inputs(3, 0)
    assert not find_rowwise(model, normalise_call(model, (), call))
    try:
        pruned = madtp.rewrite(model, call, config=CONFIG)
    except madtp.MadtpError:
        return
    assert [s.name for s in pruned.report.sites] == ["blocks.1"]  # Only readouts follow it.
    assert [r.block for r in pruned.report.refusals] == ["blocks.0"]
    with pruned.dense():
        assert gap(model(**call), pruned(**call)) < 1e-5


@torch.no_grad()
def test_what_stays_is_the_hosts_own_submodule() -> None:
    case, model, pruned = rewritten(Apart)
    seen: list[int] = []
    handle = pruned.get_submodule("blocks.0.mlp.workers").register_forward_hook(lambda *_: seen.append(1))
    pruned(**case.inputs(2, 0))
    handle.remove()
    assert seen == [1]
    assert "forward" not in vars(model.get_submodule("blocks.0.mlp.workers"))


@torch.no_grad()
def test_the_work_of_experts_is_counted_by_rows() -> None:
    case, model, pruned = rewritten(RowsOfHit)
    call = case.inputs(2, 0)
    dense = madtp.count_macs(model, call)
    layer = LENGTH * (WIDTH * 4 + 2 * 2 * WIDTH * 12)
    plain = experts_case(SilentContext).build()
    for block in plain.blocks:
        block.mlp = nn.Identity()
    assert dense == pytest.approx(madtp.count_macs(plain, call) + 2 * layer)
    pruned.madtp.control.forced = {name: torch.arange(LENGTH).expand(2, -1) < 3 for name in ("blocks.0", "blocks.1")}
    kept = madtp.count_macs(pruned, call)
    pruned.madtp.control.forced = None
    assert kept < dense - layer  # Six of nine tokens are missing in both layers.


def test_finding_experts_leaves_the_model_as_it_was() -> None:
    case = experts_case(RowsOfHit)
    model = case.build().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    call = normalise_call(model, (), case.inputs(3, 0))
    (first, second) = find_rowwise(model, call)
    assert (first.path, second.path) == ("blocks.0.mlp", "blocks.1.mlp")
    assert first.rank == 2
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert model.training
