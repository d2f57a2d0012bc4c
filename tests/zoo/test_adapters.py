"""Adapters: found by class or module without importing anything, refused when taken or malformed, and put to use."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_blip import inputs, small
from torch import nn

import madtp
import zoo
from madtp.config import PruningConfig
from madtp.errors import ConfigError, ExampleInputsError
from zoo import adapters
from zoo.blip.nlvr import BlipNlvr
from zoo.objectives.multi_text import ManyQuestions


class Base(nn.Module):
    """A class of a family that the zoo does not know."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Child(Base):
    """Its subclass."""


def ones(model: nn.Module, batch: int, generator: torch.Generator) -> dict[str, Any]:
    """Example inputs of the test's families."""
    return {"x": torch.ones(batch, 2)}


@pytest.fixture(autouse=True)
def _registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters.ADAPTERS, "_entries", dict(adapters.ADAPTERS))


def test_an_adapter_serves_the_class_and_its_subclasses() -> None:
    made = zoo.register_adapter(f"{__name__}.Base", ones)
    assert zoo.find_adapter(Base()) is made
    assert zoo.find_adapter(Child()) is made
    assert torch.equal(zoo.example_inputs(Child(), batch=3)["x"], torch.ones(3, 2))


def test_the_nearest_class_goes_before_its_bases_and_its_module() -> None:
    whole = zoo.register_adapter(__name__, ones)
    assert zoo.find_adapter(Child()) is whole
    base = zoo.register_adapter(f"{__name__}.Base", ones)
    assert zoo.find_adapter(Base()) is base
    child = zoo.register_adapter(f"{__name__}.Child", ones)
    assert zoo.find_adapter(Child()) is child
    assert zoo.find_adapter(Base()) is base


def test_a_part_of_a_name_is_no_match() -> None:
    zoo.register_adapter(__name__[:-1], ones)
    assert zoo.find_adapter(Base()) is None
    assert zoo.example_inputs_of(Base()) is None
    with pytest.raises(ExampleInputsError, match="pass example_inputs"):
        zoo.example_inputs(Base())


def test_a_key_that_is_taken_is_refused() -> None:
    zoo.register_adapter("some.package", ones)
    with pytest.raises(ConfigError, match=r"adapter .some.package. is registered already"):
        zoo.register_adapter("some.package", ones)


@pytest.mark.parametrize("key", ["", "a..b", "a b", "1a", "a.", ".a"])
def test_a_malformed_key_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match="qualified name"):
        zoo.register_adapter(key, ones)


def test_a_zoo_model_without_example_inputs_says_so() -> None:
    assert zoo.find_adapter(zoo.create("blip_nlvr_mini")).key.endswith(BlipNlvr.__name__)  # type: ignore[union-attr]

    class Other(nn.Module):
        __module__ = "zoo.new_family"

    with pytest.raises(ExampleInputsError, match="no example inputs for Other"):
        zoo.example_inputs(Other())


def test_adapters_are_listed() -> None:
    assert {"timm", "transformers", "open_clip"} <= set(zoo.list_adapters())


@pytest.mark.parametrize("wrapped", [False, True], ids=["model", "many questions"])
def test_the_first_token_of_a_question_is_protected(wrapped: bool) -> None:
    model = small("vqa")
    given = inputs("vqa")
    if wrapped:
        model = ManyQuestions(model)
        given = {name: x if name == "images" else torch.stack([x, x], 1) for name, x in given.items()}
    pruned = madtp.rewrite(model, given)
    sites = {site.name: site for site in pruned.report.sites}
    text = [site for site in sites.values() if site.modality == "text"]
    assert text
    assert all(0 in site.protected for site in text)
    also = madtp.rewrite(model, given, config=PruningConfig(protect={"text": (2,), "image": (3,)}))
    assert also.madtp.config.protected_positions("text") == (0, 2)
    assert also.madtp.config.protected_positions("image") == (3,)


def test_a_model_that_declares_nothing_is_left_as_configured() -> None:
    pruned = madtp.rewrite(small("retrieval"), inputs("retrieval"))
    assert pruned.madtp.config == PruningConfig()
