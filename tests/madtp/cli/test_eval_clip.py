"""``madtp eval`` of CLIP, and of the mini models on scenes of their tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import zoo
from madtp.cli.app import app
from madtp.errors import DataError
from zoo.clip.config import MINI, VIT_B16
from zoo.scenes import VOCABULARY
from zoo.tasks import build_task
from zoo.tasks.encode_text import clip_texts


def evaluated(path: Path, *arguments: str) -> dict[str, Any]:
    outcome = CliRunner().invoke(app, ["eval", "--output", str(path), "-n", "5", "-b", "3", *arguments])
    assert outcome.exit_code == 0, outcome.output
    return json.loads(path.read_text())


def test_clip_retrieves_scenes_by_features(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = zoo.create("clip_mini")
    torch.save(model.state_dict(), tmp_path / "w.pth")
    content = evaluated(
        tmp_path / "e.json", "-m", "clip_mini", "-k", str(tmp_path / "w.pth"), "-d", "scenes_captions", "--per-sample"
    )
    data = zoo.data("scenes_captions", limit=5, transform=zoo.transforms.for_model("clip_mini"))
    task: Any = build_task("clip_mini", model, data, torch.device("cpu"))
    with torch.no_grad():
        similar = (
            model(images=task.images(range(5))).image_features @ model(**task.texts(task.captions)).text_features.T
        )
    right = torch.tensor(task.owners)[similar.argmax(1)] == torch.arange(5)
    assert content["metrics"]["text_r1"] == pytest.approx(float(right.float().mean()))
    assert content["metrics"]["text_r10"] >= content["metrics"]["text_r5"] >= content["metrics"]["text_r1"]
    assert content["task"] == "retrieval"


def test_texts_of_a_mini_clip_end_with_the_highest_id() -> None:
    ids = clip_texts(MINI, None)(["a red circle", "a circle"])
    words = [VOCABULARY.index(word) for word in ("a", "red", "circle")]
    assert ids.tolist() == [[1, *words, 127], [1, words[0], words[2], 127, 0]]


def test_texts_of_clip_are_openais_word_pieces() -> None:
    pytest.importorskip("open_clip")
    ids = clip_texts(VIT_B16, None)(["a red circle", "a dog"])
    assert ids.shape == (2, 77)
    assert ids[:, 0].tolist() == [49406, 49406]
    assert ids.max(1).values.tolist() == [49407, 49407]


def test_clip_takes_no_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="its own word pieces"):
        clip_texts(MINI, tmp_path / "vocab.txt")


@pytest.mark.parametrize(
    ("model", "data", "metric"),
    [("blip_caption_mini", "scenes_captions", "cider"), ("blip_vqa_mini", "scenes_questions", "vqa_accuracy")],
)
def test_mini_models_on_scenes_of_their_tasks(tmp_path: Path, model: str, data: str, metric: str) -> None:
    content = evaluated(tmp_path / "e.json", "-m", model, "-d", data)
    assert content["metrics"][metric] >= 0
    assert content["samples"] == 5
    again = evaluated(tmp_path / "again.json", "-m", model, "-d", data)
    assert again["metrics"] == content["metrics"]


@pytest.mark.parametrize(
    ("model", "data", "metric", "least"),
    [
        ("blip_caption_mini", "scenes_captions", "cider", 5.0),
        ("blip_vqa_mini", "scenes_questions", "vqa_accuracy", 0.79),
        ("blip_retrieval_mini", "scenes_captions", "text_r1", 0.9),
        ("clip_mini", "scenes_captions", "image_r1", 0.9),
    ],
)
def test_dense_minis_have_learned_their_tasks(tmp_path: Path, model: str, data: str, metric: str, least: float) -> None:
    content = evaluated(tmp_path / "e.json", "-m", model, "-d", data, "-k", "dense", "-n", "20", "-b", "20")
    assert content["metrics"][metric] > least


@pytest.mark.parametrize(
    ("model", "checkpoint", "data", "metric", "least"),
    [
        pytest.param("blip_caption_mini", "pruned-50", "scenes_captions", "cider", 5.0, marks=pytest.mark.heavy),
        pytest.param("blip_caption_mini", "pruned-80", "scenes_captions", "cider", 5.0, marks=pytest.mark.slow),
        pytest.param("blip_vqa_mini", "pruned-50", "scenes_questions", "vqa_accuracy", 0.79, marks=pytest.mark.heavy),
        pytest.param("blip_vqa_mini", "pruned-80", "scenes_questions", "vqa_accuracy", 0.79, marks=pytest.mark.heavy),
        pytest.param("blip_retrieval_mini", "pruned-50", "scenes_captions", "text_r1", 0.84, marks=pytest.mark.heavy),
        pytest.param("blip_retrieval_mini", "pruned-80", "scenes_captions", "text_r1", 0.84, marks=pytest.mark.heavy),
        pytest.param("clip_mini", "pruned-50", "scenes_captions", "text_r1", 0.84, marks=pytest.mark.heavy),
        pytest.param("clip_mini", "pruned-80", "scenes_captions", "text_r1", 0.84, marks=pytest.mark.slow),
    ],
)
def test_compressed_minis_keep_what_they_learned(
    tmp_path: Path, model: str, checkpoint: str, data: str, metric: str, least: float
) -> None:
    content = evaluated(tmp_path / "e.json", "-m", model, "-d", data, "-k", checkpoint, "-n", "20", "-b", "20")
    assert content["metrics"][metric] > least
