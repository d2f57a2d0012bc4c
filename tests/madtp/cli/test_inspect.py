"""``madtp inspect``, and the models and example inputs that it finds."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from shallow_models import shallow_models
from torch import nn
from typer.testing import CliRunner

from madtp.cli.app import app
from madtp.cli.console import to_plain
from madtp.errors import ConfigError, ExampleInputsError, UnknownModelError
from zoo.examples import example_inputs, find_model

TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def test_a_zoo_model_is_found_with_inputs_that_it_takes() -> None:
    found = find_model("blip_nlvr_mini")
    assert found.origin == "zoo"
    assert not found.model.training
    assert found.model(**found.example_inputs).shape == (2, 2)


def test_a_timm_model_is_found_with_inputs_of_its_own_size() -> None:
    found = find_model("test_vit")
    assert found.origin == "timm"
    assert found.example_inputs["x"].shape[1:] == found.model.pretrained_cfg["input_size"]
    assert found.model(**found.example_inputs).shape[0] == 2


@pytest.mark.parametrize(
    ("config_class", "architecture"),
    [
        ("CLIPConfig", "CLIPModel"),
        ("SiglipConfig", "SiglipModel"),
        ("BlipConfig", "BlipForImageTextRetrieval"),
        ("CLIPVisionConfig", "CLIPVisionModel"),
        ("BertConfig", "BertModel"),
    ],
)
@torch.inference_mode()
def test_a_transformers_config_is_built_and_runs(config_class: str, architecture: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    towers = {
        "text_config": {**TINY, "vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
        "vision_config": {**TINY, "image_size": 32, "patch_size": 16},
    }
    single = {"CLIPVisionConfig": towers["vision_config"], "BertConfig": TINY}
    config = getattr(transformers, config_class)(**single.get(config_class, towers))
    config.architectures = [architecture]
    config.save_pretrained(tmp_path)
    found = find_model(str(tmp_path))
    assert type(found.model).__name__ == architecture
    assert all(len(value) == 2 for value in found.example_inputs.values())
    found.model(**found.example_inputs)
    assert type(find_model(str(tmp_path / "config.json")).model) is type(found.model)


def test_end_of_text_stands_at_the_end_of_each_text_and_only_there() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPTextConfig(**TINY, vocab_size=99, eos_token_id=98, bos_token_id=97)
    inputs = example_inputs(transformers.CLIPTextModel(config))
    ids, lengths = inputs["input_ids"], inputs["attention_mask"].sum(1)
    assert lengths[0] > lengths[-1]
    assert (ids[torch.arange(2), lengths - 1] == 98).all()
    assert ((ids >= 97).sum(1) == 1).all()


def test_unknown_names_list_near_matches_of_zoo_and_timm() -> None:
    with pytest.raises(UnknownModelError, match="vit_base_patch16_224"):
        find_model("vit_bse_patch16_224")
    with pytest.raises(UnknownModelError, match="blip_nlvr_mini"):
        find_model("blip_nlvr_mni")
    with pytest.raises(UnknownModelError, match="downloaded"):
        find_model("hf-hub:someone/something")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[]", "model_type"),
        ('{"a": 1}', "model_type"),
        ('{"model_type": "clippp"}', "clippp"),
        ('{"model_type": ["clip"]}', "knows no model type a list of 1"),
        ('{"model_type": null}', "knows no model type None"),
        ('{"model_type": "clip", "architectures": 3}', "'architectures' is 3; it has to be a list of names"),
        ('{"model_type": "clip", "architectures": [["CLIPModel"]]}', "'architectures' is a list of 1"),
        ('{"model_type": "clip", "text_config": 3}', "is no configuration of clip"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(content: str, message: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        find_model(str(path))


def test_a_missing_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        find_model(str(tmp_path))


def test_models_of_others_need_their_inputs_given() -> None:
    with pytest.raises(ExampleInputsError, match="pass example_inputs"):
        example_inputs(nn.Linear(2, 2))


@dataclass(frozen=True)
class _Report:
    sites: tuple[int, ...]
    where: Path
    thing: Any


def test_plain_data_leaves_out_what_json_cannot_hold() -> None:
    plain = to_plain({"report": _Report((1, 2), Path("a"), nn.Linear(1, 1)), "none": None})
    assert plain == {"report": {"sites": [1, 2], "where": "a"}, "none": None}


@pytest.mark.slow
def test_inspect_prints_the_report_as_table_and_as_json_and_draws(tmp_path: Path) -> None:
    runner, graph = CliRunner(), tmp_path / "g.png"
    with shallow_models():
        table = runner.invoke(app, ["inspect", "blip_nlvr_shallow", "--graph", str(graph)], env={"COLUMNS": "140"})
        as_json = json.loads(runner.invoke(app, ["inspect", "blip_nlvr_shallow", "--json"]).stdout)
    assert table.exit_code == 0, table.output
    assert "BlipNlvr" in table.output
    assert "visual_encoder.blocks.0" in table.output
    assert "2 pre-norm self" in table.output
    assert "cross" in table.output
    assert graph.read_bytes().startswith(b"\x89PNG")
    assert as_json["name"] == "blip_nlvr_shallow"
    assert as_json["model"] == "BlipNlvr"
    assert {site["modality"] for site in as_json["sites"]} == {"image", "text"}
    assert as_json["parameters"] > 1e5


def test_a_graph_file_of_unknown_kind_is_refused_before_any_work() -> None:
    result = CliRunner().invoke(app, ["inspect", "blip_nlvr_mini", "--graph", "g.docx"])
    assert result.exit_code == 1
    assert ".png" in result.output
