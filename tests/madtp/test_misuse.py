"""The interface used wrongly: the error says what was given, and what to give."""

from __future__ import annotations

import dataclasses
import inspect
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small_vit
from torch import Tensor, nn

import madtp
from madtp.errors import ArgumentError, ConfigError, ExampleInputsError, MadtpError, PlanError

IMAGES = (small_vit.images(2, 0),)
DENSE = small_vit.vit(2)


class WithConfig(nn.Module):
    """A dense model with a configuration of its own, as those of model libraries have."""

    def __init__(self) -> None:
        super().__init__()
        self.config = object()

    def forward(self, pixel_values: Tensor) -> Tensor:
        return pixel_values


@pytest.fixture(scope="module")
def pruned() -> madtp.PrunedModel:
    return small_vit.rewritten(2)


@pytest.mark.parametrize("dense", [DENSE, WithConfig()])
@pytest.mark.parametrize(
    "use",
    [
        lambda model: madtp.calibrate(model, [IMAGES], reduction=0.3),
        lambda model: madtp.teach(model, [IMAGES]),
        lambda model: madtp.freeze(model, [IMAGES]),
        lambda model: madtp.save(model, "never"),
    ],
)
def test_a_dense_model_where_a_pruned_one_is_asked_for(use: Callable[[Any], object], dense: nn.Module) -> None:
    with pytest.raises(ArgumentError, match=rf"this {type(dense).__name__} is no pruned model. Rewrite it first"):
        use(dense)


def test_a_name_or_a_class_where_a_model_is_asked_for(tmp_path: Path) -> None:
    uses: tuple[Callable[[Any], object], ...] = (
        lambda model: madtp.rewrite(model, IMAGES),
        lambda model: madtp.count_macs(model, IMAGES),
        lambda model: madtp.load(tmp_path, model),
    )
    for use in uses:
        with pytest.raises(ArgumentError, match=r"model is 'clip_mini'; pass an nn.Module.*zoo.create"):
            use("clip_mini")
    with pytest.raises(ArgumentError, match="model is the class Linear; pass an instance"):
        madtp.rewrite(nn.Linear, IMAGES)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="model is None"):
        madtp.rewrite(None, IMAGES)  # type: ignore[arg-type]


def test_arguments_of_save_and_load_in_the_wrong_order(pruned: madtp.PrunedModel, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"folder is of type VisionTransformer; .*madtp.load\(folder, model\)"):
        madtp.load(DENSE, tmp_path)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="a pruned model is asked for, but this is"):
        madtp.save(str(tmp_path), pruned)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="folder is of type NoneType"):
        madtp.save(pruned, None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (None, "batches is NoneType"),
        (3, "batches is int"),
        ("data/nlvr2", "batches is one str"),
        ([[IMAGES[0]]], r"batch 0 is a list.*map\(tuple, loader\)"),
        ([], "there are no batches"),
    ],
)
def test_batches_of_the_wrong_kind(batches: Any, message: str, pruned: madtp.PrunedModel) -> None:
    with pytest.raises(ExampleInputsError, match=message):
        madtp.calibrate(pruned, batches, reduction=0.3)


def test_a_misspelt_input_is_told_with_the_nearest_argument() -> None:
    with pytest.raises(ExampleInputsError, match="'pixel_value' is no argument; did you mean 'pixel_values'"):
        madtp.rewrite(WithConfig(), {"pixel_value": IMAGES[0]})


def test_a_misspelt_field_is_told_with_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match=r"unknown field 'temprature'.*did you mean 'temperature'"):
        madtp.PruningConfig(temprature=2.0)  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match="known fields: temperature, gain"):
        madtp.PruningConfig(zzz=2.0)  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match="name each field"):
        madtp.PruningConfig(0.5)  # type: ignore[misc]


def test_the_configuration_keeps_its_signature_and_its_copies() -> None:
    config = madtp.PruningConfig(gain=2.0)
    assert "temperature" in inspect.signature(madtp.PruningConfig).parameters
    assert dataclasses.replace(config, gain=3.0).gain == 3.0
    assert pickle.loads(pickle.dumps(config)) == config


def test_settings_of_the_wrong_kind(pruned: madtp.PrunedModel) -> None:
    for value in ("high", None):
        with pytest.raises(ConfigError, match=f"gain is {value!r}; it has to be a number"):
            pruned.madtp.gain = value
    with pytest.raises(ConfigError, match="config is a dict; set a PruningConfig"):
        pruned.madtp.config = {"gain": 2.0}  # type: ignore[assignment]


def test_a_plan_of_the_wrong_kind_or_with_a_misspelt_site(pruned: madtp.PrunedModel) -> None:
    values = pruned.madtp.report.plan
    with pytest.raises(PlanError, match=r"plan is a dict; .*Plan.from_dict"):
        madtp.rewrite(DENSE, IMAGES, plan=values)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match=r"such as report\.plan; this is a RewriteReport"):
        madtp.Plan.from_dict(pruned.madtp.report)  # type: ignore[arg-type]
    plan = madtp.Plan.from_dict(values)
    with pytest.raises(PlanError, match=r"no site 'block\.0'.*'blocks\.0'"):
        plan.without(["block.0"])
    with pytest.raises(PlanError, match="pass several"):
        plan.without("blocks.0")


def test_one_tensor_is_counted_as_it_is(pruned: madtp.PrunedModel) -> None:
    assert madtp.count_macs(pruned, IMAGES[0]) == madtp.count_macs(pruned, IMAGES)  # type: ignore[arg-type]
    with pytest.raises(ExampleInputsError, match="inputs is a str"):
        madtp.count_macs(pruned, "photo.jpg")  # type: ignore[arg-type]


def test_errors_of_this_kind_are_the_librarys_and_pythons() -> None:
    assert issubclass(ArgumentError, MadtpError)
    assert issubclass(ArgumentError, TypeError)
