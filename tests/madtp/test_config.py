"""PruningConfig: what it takes, what it refuses and in which words, and that JSON keeps it."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from madtp.config import PruningConfig
from madtp.errors import ConfigError

CONFIGS = st.builds(
    PruningConfig,
    temperature=st.floats(0, 100),
    gain=st.floats(0, 10),
    towers=st.sampled_from([None, ("image",), ("text",), ("image", "text")]),
    layers=st.none() | st.lists(st.integers(0, 9), max_size=3) | st.dictionaries(st.text(max_size=3), st.just((1, 2))),
    protect=st.dictionaries(st.sampled_from(["image", "text"]), st.lists(st.integers(0, 9), max_size=3)),
    min_tokens=st.integers(0, 5),
    batching=st.sampled_from(["ragged", "uniform", "static"]),
    alignment=st.booleans(),
    alignment_width=st.none() | st.integers(1, 64),
    merge=st.booleans(),
    score_queries=st.none() | st.integers(1, 64),
    selection=st.just("threshold"),
    class_score=st.sampled_from(["normalised", "raw"]),
    order=st.sampled_from(["position", "topk"]),
)


@given(CONFIGS)
def test_json_keeps_a_configuration(config: PruningConfig) -> None:
    again = PruningConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert hash(again) == hash(config)


def test_official_differs_in_every_deviation() -> None:
    ours, official = PruningConfig(), PruningConfig.official()
    differing = {f.name for f in dataclasses.fields(ours) if getattr(ours, f.name) != getattr(official, f.name)}
    assert differing == {
        "batching",
        "guidance_score",
        "class_score",
        "padding",
        "order",
        "mask_order",
        "merged_mask",
        "readout",
        "causal_mask",
        "causal_class_row",
        "cross_mask",
    }


def test_unknown_field_names_the_near_match() -> None:
    with pytest.raises(ConfigError, match=r"unknown field 'temprature'.*did you mean 'temperature'"):
        PruningConfig.from_dict({"temprature": 1.0})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0; allowed: a finite number, at least 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"gain": True}, "gain is True"),
        ({"batching": "packed"}, "batching is 'packed'; allowed: 'ragged', 'uniform', 'static'"),
        ({"towers": "image"}, "towers is 'image'; allowed: None for all"),
        ({"towers": ()}, "at least one"),
        ({"towers": ("audio",)}, "towers names 'audio'; allowed: 'image', 'text'"),
        ({"protect": {"image": (-1,)}}, r"protect\['image'\] is -1"),
        ({"protect": 3}, "protect is 3; allowed: a mapping"),
        ({"min_tokens": 1.5}, "min_tokens is 1.5; allowed: a whole number"),
        ({"alignment_tokens": 0}, "alignment_tokens is 0; allowed: a whole number, at least 1"),
        ({"score_queries": 0}, "score_queries is 0; allowed: a whole number, at least 1"),
        ({"score_queries": 8, "readout": "original"}, "leave one of them out"),
        ({"merge": 1}, "merge is 1; allowed: True, False"),
        ({"keep_ratio": 0.5}, "selection='threshold' decides the counts itself"),
        ({"selection": "random", "keep_ratio": 1.5}, "keep_ratio is 1.5; allowed: above 0, at most 1"),
    ],
)
def test_refusals_say_what_is_allowed(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PruningConfig(**values)


def test_protected_positions_and_towers_are_normalised() -> None:
    config = PruningConfig(protect={"text": [3, 1, 3]}, towers=["text"])  # type: ignore[arg-type]
    assert config.protected_positions("text") == (1, 3)
    assert config.protected_positions("image") == ()
    assert config.prunes("text")
    assert not config.prunes("image")


def test_layers_are_chosen_by_number_and_path() -> None:
    assert PruningConfig().prunes_layer("any", 7)
    everywhere = PruningConfig(layers=[8, 2, 2])
    assert everywhere.layers == (("*", (2, 8)),)
    assert [everywhere.prunes_layer("model.layers.8", n) for n in (2, 3, 8)] == [True, False, True]
    by_path = PruningConfig(layers={"*vision*": (), "*language*": (1,)})
    assert [by_path.prunes_layer(path, 1) for path in ("a.vision.0", "a.language.1", "other.1")] == [False, True, True]
    assert not by_path.prunes_layer("a.language.0", 0)
    assert by_path.prunes_layer("other.0", 0)


@pytest.mark.parametrize("layers", ["2", 2, (-1,), (1.5,), {"*": "2"}, {2: (1,)}, (True,)])
def test_layers_that_are_no_numbers_are_refused(layers: Any) -> None:
    with pytest.raises(ConfigError, match="layers is"):
        PruningConfig(layers=layers)
