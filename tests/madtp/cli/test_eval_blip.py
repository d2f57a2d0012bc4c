"""``madtp eval`` of BLIP for retrieval, captions and questions, on small files in the published formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import dataset_files
import pytest
import torch
from reranking import rerank
from typer.testing import CliRunner

import madtp
import zoo
from madtp.cli.app import app
from zoo.datasets.records import CaptionedImage
from zoo.tasks import build_task
from zoo.tasks.encode_text import spell
from zoo.tasks.vocabulary import words_for

CAPTIONS = ("there is a red circle in the left image", "no image contains a blue cross", "exactly two images are red")


def karpathy(root: Path) -> None:
    """Three images with two captions each, in the words of scenes."""
    names = [f"val2014/COCO_val2014_00000000000{number}.jpg" for number in range(3)]
    for number, name in enumerate(names):
        dataset_files.write_image(root / "images" / name, (80 * number, 200 - 80 * number, 50), (96, 96))
    listed = [{"image": name, "caption": [CAPTIONS[i], CAPTIONS[i - 1]]} for i, name in enumerate(names)]
    dataset_files.write_json(root / "annotations" / "coco_karpathy_test.json", listed)
    training = [{"image": e["image"], "caption": c, "image_id": e["image"]} for e in listed for c in e["caption"]]
    dataset_files.write_json(root / "annotations" / "coco_karpathy_train.json", training)


def questions(root: Path) -> None:
    listed = []
    for number in range(3):
        image = f"val2014/COCO_val2014_00000000000{number}.jpg"
        dataset_files.write_image(root / image, (80 * number, 0, 50), (96, 96))
        answers = ["red"] * 7 + ["two"] * 3
        listed.append(
            {
                "question_id": number,
                "question": "is there a red circle",
                "image": image,
                "dataset": "vqa",
                "answer": answers,
            }
        )
    dataset_files.write_json(root / "vqa_val.json", listed)


def weights(name: str, path: Path) -> Any:
    """Write random weights in the published format."""
    torch.manual_seed(0)
    model = zoo.create(name)
    torch.save({"model": model.state_dict(), "epoch": 3}, path)
    return model


def evaluated(tmp_path: Path, name: str, data: str, *arguments: str) -> dict[str, Any]:
    fixed = ["--model", name, "-k", str(tmp_path / "w.pth"), "--data", data, "--root", str(tmp_path), "-b", "2"]
    outcome = CliRunner().invoke(
        app, ["eval", *fixed, "--output", str(tmp_path / "e.json"), "--per-sample", *arguments]
    )
    assert outcome.exit_code == 0, outcome.output
    return json.loads((tmp_path / "e.json").read_text())


def test_retrieval_by_published_files(tmp_path: Path) -> None:
    karpathy(tmp_path)
    model = weights("blip_retrieval_mini", tmp_path / "w.pth")
    content = evaluated(tmp_path, "blip_retrieval_mini", "coco")
    assert set(content["metrics"]) == {f"{what}_r{k}" for what in ("text", "image") for k in (1, 5, 10)} | {
        "mean_recall"
    }
    data = zoo.data("coco", tmp_path, "test", transform=zoo.transforms.for_model("blip_retrieval_mini"))
    task: Any = build_task("blip_retrieval_mini", model, data, torch.device("cpu"))
    with torch.no_grad():
        images, texts = model(images=task.images(range(3))), model(**task.texts(task.captions))
        similar = images.image_features @ texts.text_features.T
        expected = rerank(model, similar, images.image_tokens, **task.texts(task.captions))
    for image, sample in enumerate(content["per_sample"]):
        for text, score in sample["matching"]["texts"]:
            assert score == pytest.approx(float(expected[0][image, text]), abs=1e-4)
        for caption, found in zip(task.captions_of(range(image, image + 1)), sample["matching"]["images"], strict=True):
            assert {place for place, _ in found} == {0, 1, 2}
            for place, score in found:
                assert score == pytest.approx(float(expected[1][caption, place]), abs=1e-4)


def test_captions_by_published_files(tmp_path: Path) -> None:
    karpathy(tmp_path)
    weights("blip_caption_mini", tmp_path / "w.pth")
    content = evaluated(tmp_path, "blip_caption_mini", "coco")
    assert {"bleu4", "cider"} <= set(content["metrics"])
    assert [sample["id"] for sample in content["per_sample"]]
    assert all(isinstance(sample["captioning"]["caption"], str) for sample in content["per_sample"])


@pytest.mark.parametrize("listed", [False, True], ids=["written", "chosen"])
def test_answers_by_published_files(tmp_path: Path, listed: bool) -> None:
    questions(tmp_path)
    weights("blip_vqa_mini", tmp_path / "w.pth")
    answers = dataset_files.write_json(tmp_path / "answer_list.json", ["red", "blue", "two"])
    arguments = ("--answers", str(answers)) if listed else ()
    content = evaluated(tmp_path, "blip_vqa_mini", "vqav2", "--split", "val", *arguments)
    given = [sample["questions"]["answer"] for sample in content["per_sample"]]
    if listed:
        assert set(given) <= {"red", "blue", "two"}
        right = sum({"red": 1.0, "two": 0.9, "blue": 0.0}[answer] for answer in given) / 3
        assert content["metrics"]["vqa_accuracy"] == pytest.approx(right, abs=0.01)
    assert 0 <= content["metrics"]["vqa_accuracy"] <= 1


@pytest.mark.slow
def test_retrieval_pruned_to_half_of_the_macs(tmp_path: Path) -> None:
    karpathy(tmp_path)
    weights("blip_retrieval_mini", tmp_path / "w.pth")
    arguments = ("-r", "0.5", "--calibration-samples", "4", "--calibration-split", "test")
    content = evaluated(tmp_path, "blip_retrieval_mini", "coco", *arguments)
    assert content["compute"]["reduction"] > 0.2
    assert content["configuration"]["pruning"]["gain"] > 0


def test_spelling_puts_texts_between_special_tokens() -> None:
    words = words_for(128, None)
    red, two = (int(words.encode([word])[0][0, 1]) for word in ("red", "two"))
    ids, mask = spell(words, ["red two red", "two"], first=126, end=127, limit=4)
    assert ids.tolist() == [[126, red, two, 127], [126, two, 127, 0]]
    assert mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert spell(words, [""], first=126, end=127)[0].tolist() == [[126, 127]]


def test_inputs_of_a_task_are_a_call_of_its_model(tmp_path: Path) -> None:
    karpathy(tmp_path)
    for name in ("blip_retrieval_mini", "blip_caption_mini"):
        model = zoo.create(name)
        data = zoo.data("coco", tmp_path, "test", transform=zoo.transforms.for_model(name))
        assert isinstance(data.records[0], CaptionedImage)
        task = build_task(name, model, data, torch.device("cpu"))
        assert madtp.count_macs(model, task.inputs(range(2))) > 0
