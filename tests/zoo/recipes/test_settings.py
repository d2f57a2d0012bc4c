"""Every number of the recipes and of an evaluation is checked when the settings are made."""

from __future__ import annotations

from typing import Any

import pytest
from settings_numbers import absurd_values, number_fields

from madtp.errors import ConfigError
from zoo.recipes.compress_data import CompressDataSettings
from zoo.recipes.compress_scenes import CompressSceneSettings
from zoo.recipes.compression_settings import CompressionSettings
from zoo.recipes.scenes_dense import DenseSceneSettings
from zoo.tasks import EvaluationSettings

ALL = (CompressionSettings, CompressSceneSettings, CompressDataSettings, DenseSceneSettings, EvaluationSettings)


@pytest.mark.parametrize("settings", ALL)
def test_no_number_takes_nonsense(settings: type[Any]) -> None:
    assert len(number_fields(settings)) >= 5
    start = {"model": "blip_nlvr_mini"}
    for name, value in absurd_values(settings):
        with pytest.raises(ConfigError, match=rf"\b{name} is "):
            settings(**{**start, name: value})


@pytest.mark.parametrize(("name", "value"), [("alignment_tokens", 10**9), ("alignment_width", 10**9), ("seed", 2**70)])
def test_nor_do_those_of_pruning(name: str, value: int) -> None:
    with pytest.raises(ConfigError, match=f"{name} is {value}"):
        CompressionSettings(pruning={name: value}).config(seed=0)
