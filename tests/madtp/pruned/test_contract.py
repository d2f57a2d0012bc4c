"""A pruned model is one of the host's kind; all that pruning adds lies in its child `madtp`."""

from __future__ import annotations

import copy
import inspect
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_vit import images, rewritten, vit
from torch import Tensor, nn

import madtp
from madtp.pruned.host_class import SHORT_FORMS

CONFIG = madtp.PruningConfig(alignment_tokens=4)
STEEP = 4.0
BATCH = images(3, 1)


class Named(nn.Module):
    """A host with something of its own under a name, which its forward uses."""

    def __init__(self, name: str, own: Any) -> None:
        super().__init__()
        self.tower, self.name = vit(1), name
        setattr(self, name, own)

    def forward(self, pixels: Tensor) -> Tensor:
        own = getattr(self, self.name)
        found: Tensor = self.tower(pixels)
        if isinstance(own, Tensor):
            return found / own
        return own(found) if isinstance(own, nn.Module) else found * (own if isinstance(own, float) else 1)


OWN: dict[str, tuple[str, Callable[[], Any]]] = {
    "a parameter": ("temperature", lambda: nn.Parameter(torch.tensor(0.5))),
    "a number": ("temperature", lambda: 0.5),
    "a buffer": ("gain", lambda: nn.Buffer(torch.tensor(0.5))),
    "a child": ("config", nn.Identity),
    "an object": ("config", lambda: types.SimpleNamespace(width=3)),
}


@pytest.mark.parametrize("kind", OWN)
@torch.no_grad()
def test_the_hosts_names_win_and_the_handle_has_all(kind: str) -> None:
    name, make = OWN[kind]
    model = Named(name, make()).eval()
    pruned = madtp.rewrite(model, (BATCH,), config=CONFIG)
    own = getattr(pruned, name)
    assert own is getattr(model, name) or type(own) is nn.Identity
    pruned.madtp.temperature = 0.0
    torch.testing.assert_close(pruned(BATCH), model(BATCH))
    pruned.madtp.temperature, pruned.madtp.gain = 1.0, STEEP
    assert pruned(BATCH).shape == model(BATCH).shape
    assert all(counts.float().mean() < 65 for counts in pruned.madtp.token_counts().values())
    assert getattr(pruned, name) is own


@pytest.mark.slow
def test_saving_and_calibrating_use_no_name_of_the_host(tmp_path: Path) -> None:
    for name in ("gain", "report"):
        model = Named(name, nn.Parameter(torch.tensor(0.5))).eval()
        pruned = madtp.rewrite(model, (BATCH,), config=CONFIG)
        madtp.calibrate(pruned, [(BATCH,)], reduction=0.2, tolerance=0.1)
        loaded = madtp.load(madtp.save(pruned, tmp_path / name), copy.deepcopy(model))
        assert loaded.madtp.gain == pruned.madtp.gain != 1
        with torch.no_grad():
            assert torch.equal(loaded(BATCH), pruned(BATCH))


def test_short_forms_are_those_of_the_handle() -> None:
    pruned = rewritten(1)
    pruned.gain = STEEP
    pruned.temperature = 0.5
    assert (pruned.madtp.gain, pruned.madtp.temperature) == (STEEP, 0.5)
    pruned(BATCH)
    assert all(type(getattr(type(pruned), name)) is property for name in SHORT_FORMS)
    assert pruned.report is pruned.madtp.report
    assert pruned.macs() == pruned.madtp.macs() < pruned.dense_macs(BATCH)
    with pruned.dense():
        pruned(BATCH)
    assert pruned.code() == pruned.madtp.code()


def test_a_config_is_the_hosts() -> None:
    """transformers' Trainer writes ``model.config.use_cache`` where a model has a ``config``."""
    pruned = rewritten(1)
    assert not hasattr(pruned, "config")
    pruned.config = types.SimpleNamespace(use_cache=True)
    pruned.config.use_cache = False
    assert not pruned.config.use_cache
    assert isinstance(pruned.madtp.config, madtp.PruningConfig)
    with pytest.raises(madtp.errors.ConfigError, match=r"set pruned\.madtp\.config"):
        pruned.config = madtp.PruningConfig()


def test_it_is_of_the_hosts_class() -> None:
    model = vit(1)
    pruned = madtp.rewrite(model, (BATCH,), config=CONFIG)
    host = type(model)
    assert isinstance(pruned, host)
    assert isinstance(pruned, madtp.PrunedModel)
    assert (type(pruned).__name__, type(pruned).__module__) == (host.__name__, host.__module__)
    assert inspect.signature(pruned.forward) == inspect.signature(model.forward)
    assert list(dict(pruned.named_children())) == [*dict(model.named_children()), "madtp"]
    assert not isinstance(model, madtp.PrunedModel)
    assert "madtp" not in model._modules
    with pytest.raises(TypeError, match=r"madtp\.rewrite"):
        type(pruned)()


@torch.no_grad()
def test_a_forward_that_is_an_attribute_of_the_host_is_followed() -> None:
    model = vit(1).eval()
    before = model.forward
    model.forward = lambda pixels: before(pixels) + 1  # type: ignore[method-assign]
    pruned = madtp.rewrite(model, {"pixels": BATCH}, config=CONFIG)
    with pruned.dense():
        torch.testing.assert_close(pruned(BATCH), model(BATCH))
    assert list(inspect.signature(pruned.forward).parameters) == ["pixels"]
    assert torch.equal(copy.deepcopy(pruned)(BATCH), pruned(BATCH))


def test_a_pruned_model_is_rewritten_from_its_original() -> None:
    pruned = madtp.rewrite(vit(2), (BATCH,), config=CONFIG)
    again = madtp.rewrite(pruned, (BATCH,), config=madtp.PruningConfig(alignment=False))
    assert not again.madtp.config.alignment
    assert len(again.report.sites) == 2
    assert type(again).__mro__.count(madtp.PrunedModel) == 1
    assert next(again.parameters()) is next(pruned.parameters())


def test_copies_share_or_own_as_those_of_any_module() -> None:
    pruned = rewritten(1)
    shallow, deep = copy.copy(pruned), copy.deepcopy(pruned)
    shallow.gain = STEEP
    assert (pruned.gain, deep.gain) == (STEEP, 1.0)
    assert next(shallow.parameters()) is next(pruned.parameters())
    assert next(deep.parameters()) is not next(pruned.parameters())


def test_errors_of_the_model_come_through() -> None:
    model, pruned = vit(1), rewritten(1)
    for wrong in ({"nothing": 1}, {"x": BATCH[:, :2]}, {"x": "a text"}):
        found = []
        for one in (model, pruned):
            with pytest.raises((TypeError, RuntimeError, AttributeError)) as raised:
                one(**wrong)
            found.append((raised.type, str(raised.value)))
        assert found[0] == found[1]


@torch.no_grad()
def test_an_empty_batch_is_what_it_is_to_the_original() -> None:
    model, pruned = vit(1), rewritten(1)
    assert pruned(BATCH[:0]).shape == model(BATCH[:0]).shape
    assert not pruned.report.notes
    assert pruned(BATCH[:1]).shape == model(BATCH[:1]).shape


def test_replicas_for_data_parallel_are_refused_with_a_way_out() -> None:
    pruned = rewritten(1)
    with pytest.raises(madtp.MadtpError, match="DistributedDataParallel"):
        pruned._replicate_for_data_parallel()


def test_a_child_of_the_handles_name_is_refused() -> None:
    model = vit(1)
    model.add_module("madtp", nn.Identity())
    with pytest.raises(madtp.MadtpError, match="taken"):
        madtp.rewrite(model, (BATCH,), config=CONFIG)


class Setting(nn.Module):
    """Gives itself attributes as it runs, under names that are short forms."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = vit(1)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.tower(pixels)

    def prepare(self) -> None:
        self.temperature, self.code = 0.0, "own"
        self.report = nn.Identity()


def test_what_the_host_sets_later_is_the_hosts() -> None:
    pruned = madtp.rewrite(Setting().eval(), (BATCH,), config=CONFIG)
    pruned.temperature = 2.0
    pruned.prepare()
    assert (pruned.temperature, pruned.code, type(pruned.report)) == (0.0, "own", nn.Identity)
    assert pruned.madtp.temperature == 2.0
    assert pruned.madtp.report.sites


@torch.no_grad()
def test_a_host_that_runs_its_children_in_turn() -> None:
    model = nn.Sequential(vit(1), nn.Linear(5, 3)).eval()
    pruned = madtp.rewrite(model, (BATCH,), config=CONFIG)
    pruned.get_submodule("0.blocks.0").register_forward_hook(lambda module, args, output: None)
    torch.testing.assert_close(pruned(BATCH), model(BATCH))


class Counting(nn.Module):
    """Counts its calls in a buffer and in a list, and keeps running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.tower, self.norm, self.seen = vit(1), nn.BatchNorm1d(5), []
        self.register_buffer("count", torch.zeros(()))

    def forward(self, pixels: Tensor) -> Tensor:
        self.count.add_(1)
        self.seen.append(len(pixels))
        return self.norm(self.tower(pixels))


def test_a_rewrite_leaves_buffers_lists_and_statistics_of_the_original() -> None:
    model = Counting().train()
    madtp.rewrite(model, (BATCH,), config=CONFIG)
    assert (float(model.count), model.seen, int(model.norm.num_batches_tracked)) == (0.0, [], 0)


def test_registers_of_classes_do_not_find_the_pruned_one() -> None:
    known: list[type] = []

    class Registered(nn.Module):
        def __init_subclass__(cls, *, name: str) -> None:
            known.append(cls)

    class Host(Registered, name="host"):
        def __init__(self) -> None:
            super().__init__()
            self.tower = vit(1)

        def forward(self, pixels: Tensor) -> Tensor:
            return self.tower(pixels)

    pruned = madtp.rewrite(Host().eval(), (BATCH,), config=CONFIG)
    assert known == [Host]
    assert isinstance(pruned, Host)
