"""Variants: names, targets, equal MACs, pictures that differ."""

from __future__ import annotations

import pytest
import torch

from madtp.errors import ConfigError, UnknownModelError
from zoo.benchmark import BenchmarkSettings
from zoo.benchmark.bench import Target, targets_of
from zoo.benchmark.models import open_model
from zoo.benchmark.pictures import draw_pictures
from zoo.benchmark.variants import VARIANTS, choose_variants, nearest_number, spread_evenly


def test_every_variant_is_built_in_one_way() -> None:
    assert len({variant.name for variant in VARIANTS}) == len(VARIANTS)
    assert all((variant.build is None) != (variant.build_at is None) for variant in VARIANTS)


def test_variants_are_chosen_with_the_dense_model() -> None:
    assert [v.name for v in choose_variants(["floor"], compiled=True)] == ["dense", "compiled", "floor"]
    assert "compiled" not in [v.name for v in choose_variants([])]
    with pytest.raises(ConfigError, match="there is no variant 'best'; there are dense, "):
        choose_variants(["best"])


def test_targets_are_reductions_and_checkpoints() -> None:
    assert targets_of([0.5], ["pruned-80"]) == [
        Target("−50%", reduction=0.5),
        Target("(pruned-80)", checkpoint="pruned-80"),
    ]


def test_whole_numbers_are_spread_evenly() -> None:
    assert spread_evenly(7, 3) == [2, 2, 3]
    assert sum(spread_evenly(577, 12)) == 577


@pytest.mark.parametrize("answer", [1, 17, 96, 97, 150, 299])
def test_the_number_with_the_wanted_macs_is_found_in_few_steps(answer: int) -> None:
    tried: list[int] = []

    def macs(number: int) -> float:
        tried.append(number)
        return 1e6 * 0.99 ** min(number, 300)

    assert nearest_number(macs, 1e6, macs(answer), first=96) == answer
    assert len(tried) < 16


def test_a_number_that_no_merging_reaches_ends_the_search() -> None:
    assert nearest_number(lambda number: max(40.0, 100.0 - number), 100.0, 10.0, first=8) >= 60


def test_pictures_differ_and_repeat_with_the_seed() -> None:
    pictures = draw_pictures(3, (3, 32, 48), 0)
    assert pictures.shape == (3, 3, 32, 48)
    assert torch.equal(pictures, draw_pictures(3, (3, 32, 48), 0))
    assert not torch.equal(pictures[0], pictures[1])
    assert not torch.equal(pictures, draw_pictures(3, (3, 32, 48), 1))


def test_samples_to_time_are_others_than_those_to_calibrate_on() -> None:
    opened = open_model("timm:test_vit", (), 0)
    (first, second), (other, _) = opened.samples(4, 2), opened.samples(4, 2, calibration=True)
    rows = torch.cat([first["x"], second["x"], other["x"]]).flatten(1)
    assert len(rows.unique(dim=0)) == 6


def test_data_of_a_mini_are_those_of_its_task() -> None:
    assert open_model("blip_vqa_mini", (), 0).data == "scenes_questions"
    assert open_model("blip_nlvr_mini", ("dense",), 0).data == "scenes"
    with pytest.raises(ConfigError, match="is a model of timm, so it has no checkpoints"):
        open_model("timm:test_vit", ("dense",), 0)
    with pytest.raises(UnknownModelError, match="blip_nlvr_mini"):
        open_model("blip_nlvr_mni", ("pruned-80",), 0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dtype": "int8"}, "dtype is 'int8'; allowed: float32"),
        ({"batches": 0}, "batches is 0; allowed: at least 1"),
        ({"batch_sizes": ()}, "one or more sizes"),
        ({"variants": ("x",)}, "no variant 'x'"),
    ],
)
def test_impossible_settings_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BenchmarkSettings("blip_nlvr_mini", **values)  # type: ignore[arg-type]
