"""The paper's settings, each from a published checkpoint and data in the published format to a pruned model's metrics.

By the command line: load strictly, rewrite, calibrate to half of the MACs, evaluate. Mini models in every run, models of base
size with `-m heavy`. Weights are random and data small, as neither can be shipped; the formats are exact.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import data_files
import published
import pytest
import torch
from typer.testing import CliRunner

import madtp
import zoo
from madtp.cli.app import app

IMAGES = 4
CAPTIONS = (
    "there is a red circle in the left image",
    "no image contains a blue cross",
    "exactly two images are red",
    "a green square is above a circle",
    "a large yellow triangle",
)
QUESTION, ANSWERS = "is there a red circle", ("red", "two", "yes")
WORDS = frozenset(" ".join((*CAPTIONS, QUESTION, *ANSWERS, "a picture of")).split())


def nlvr2(root: Path) -> None:
    for split in ("test", "dev"):
        listed = []
        for number in range(IMAGES):
            images = [f"images/{split}/{number}/{split}-{number}-0-img{side}.png" for side in (0, 1)]
            for side, name in enumerate(images):
                data_files.write_image(root / name, (60 * number, 100 * side, 50), (96, 64))
            label = "True" if number % 2 else "False"
            listed.append({"sentence": CAPTIONS[number].capitalize() + ".", "label": label, "images": images})
        data_files.write_json(root / f"nlvr_{split}.json", listed)


def coco(root: Path) -> None:
    for split in ("test", "val"):
        names = [f"val2014/COCO_val2014_{number:012d}.jpg" for number in range(IMAGES)]
        _captioned(root / "images", root / "annotations" / f"coco_karpathy_{split}.json", names)


def flickr30k(root: Path) -> None:
    for split in ("test", "val"):
        _captioned(root, root / f"flickr30k_{split}.json", [f"flickr30k-images/{n}.jpg" for n in range(IMAGES)])


def _captioned(folder: Path, annotations: Path, names: Sequence[str]) -> None:
    for number, name in enumerate(names):
        data_files.write_image(folder / name, (60 * number, 200 - 50 * number, 50), (96, 64))
    listed = [{"image": name, "caption": [CAPTIONS[n], CAPTIONS[n + 1]]} for n, name in enumerate(names)]
    data_files.write_json(annotations, listed)


def vqav2(root: Path) -> None:
    listed = []
    for number in range(IMAGES):
        image = f"val2014/COCO_val2014_{number:012d}.jpg"
        data_files.write_image(root / image, (60 * number, 0, 50), (96, 64))
        answer = [ANSWERS[number % 2]] * 7 + [ANSWERS[2]] * 3
        entry = {"question_id": number, "question": QUESTION.capitalize() + "?", "image": image, "dataset": "vqa"}
        listed.append({**entry, "answer": answer})
    data_files.write_json(root / "vqa_val.json", listed)
    data_files.write_json(root / "answer_list.json", list(ANSWERS))


def blip(task: str) -> Callable[[str, Path], Path]:
    """Writes random weights of a model as the published file of a task."""

    def write(name: str, folder: Path) -> Path:
        return published.write_blip(folder / f"model_base_{task}.pth", zoo.create(name), task)

    return write


def openai(name: str, folder: Path) -> Path:
    model: Any = zoo.create(name)
    return published.write_openai(folder / "ViT-B-16.pt", model, model.config)


def transformers(name: str, folder: Path) -> Path:
    pytest.importorskip("transformers")
    model: Any = zoo.create(name)
    published.transformers_clip(model.config).save_pretrained(folder / "clip-vit-base-patch16")
    return folder / "clip-vit-base-patch16" / "model.safetensors"


@dataclass(frozen=True)
class Setting:
    """A row of the README's table: model, data, their files, and the metrics that come out."""

    model: str
    data: str
    weights: Callable[[str, Path], Path]
    write_data: Callable[[Path], None]
    metrics: frozenset[str]
    split: str = "test"
    arguments: tuple[str, ...] = ()
    sites: tuple[str, ...] = ("visual_encoder",)


RECALLS = frozenset(f"{what}_r{k}" for what in ("text", "image") for k in (1, 5, 10)) | {"mean_recall"}
PAIR = ("visual_encoder", "text_encoder")
CLIP_TOWERS = ("visual",)  # texts are a call of their own, whose tokens are not told by sample
SETTINGS = {
    "blip-nlvr2": Setting("blip_nlvr", "nlvr2", blip("nlvr"), nlvr2, frozenset({"accuracy"}), sites=PAIR),
    "blip-coco": Setting("blip_retrieval", "coco", blip("retrieval"), coco, RECALLS, sites=PAIR),
    "blip-flickr30k": Setting("blip_retrieval", "flickr30k", blip("retrieval"), flickr30k, RECALLS, sites=PAIR),
    "blip-captions": Setting("blip_caption", "coco", blip("caption"), coco, frozenset({"bleu4", "cider"})),
    "blip-vqav2": Setting(
        "blip_vqa",
        "vqav2",
        blip("vqa"),
        vqav2,
        frozenset({"vqa_accuracy"}),
        "val",
        ("--answers", "answer_list.json"),
        PAIR,
    ),
    "clip-coco": Setting("clip_vit_b16", "coco", openai, coco, RECALLS, sites=CLIP_TOWERS),
    "clip-flickr30k": Setting("clip_vit_b16", "flickr30k", openai, flickr30k, RECALLS, sites=CLIP_TOWERS),
    "clip-coco-transformers": Setting("clip_vit_b16", "coco", transformers, coco, RECALLS, sites=CLIP_TOWERS),
    "clip-flickr30k-transformers": Setting(
        "clip_vit_b16", "flickr30k", transformers, flickr30k, RECALLS, sites=CLIP_TOWERS
    ),
}


def mini(model: str) -> str:
    return "clip_mini" if model.startswith("clip") else f"{model}_mini"


def evaluated(setting: Setting, model: str, folder: Path, vocabulary: int) -> dict[str, Any]:
    """Write all files, run `madtp eval`, and return what it wrote."""
    torch.manual_seed(0)
    setting.write_data(folder)
    checkpoint = setting.weights(model, folder)
    arguments = [str(folder / text) if text.endswith(".json") else text for text in setting.arguments]
    if model.startswith("blip"):
        arguments += ["--vocabulary", str(published.write_vocabulary(folder / "vocab.txt", WORDS, vocabulary))]
    fixed = ["--model", model, "--checkpoint", str(checkpoint), "--data", setting.data, "--root", str(folder)]
    pruned = ["--reduction", "0.5", "--calibration-split", "val", "--calibration-samples", str(IMAGES)]
    few = ["--split", setting.split, "--limit", str(IMAGES), "--batch-size", str(IMAGES), "--per-sample"]
    output = folder / "evaluation.json"
    outcome = CliRunner().invoke(app, ["eval", *fixed, *pruned, *few, *arguments, "--output", str(output)])
    assert outcome.exit_code == 0, outcome.output
    return json.loads(output.read_text())


def check(setting: Setting, content: dict[str, Any]) -> None:
    assert setting.metrics <= set(content["metrics"])
    assert content["samples"] == IMAGES
    assert content["configuration"]["pruning"]["gain"] > 0
    assert 0.2 < content["compute"]["reduction"] < 0.8
    counts = [count for stage in content["per_sample"][0]["tokens"].values() for count in stage]
    for tower in setting.sites:
        assert any(site.startswith(tower) for site in counts), f"no token of {tower} was counted: {counts}"


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_with_its_mini_model(tmp_path: Path, name: str) -> None:
    setting = SETTINGS[name]
    check(setting, evaluated(setting, mini(setting.model), tmp_path, 126))


@pytest.mark.heavy
@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_with_the_model_of_base_size(tmp_path: Path, name: str) -> None:
    setting = SETTINGS[name]
    if setting.model.startswith("clip"):
        pytest.importorskip("open_clip")
    check(setting, evaluated(setting, setting.model, tmp_path, published.BERT_SIZE))


def ids(length: int) -> torch.Tensor:
    return torch.ones(1, length, dtype=torch.long)


def text(length: int) -> dict[str, torch.Tensor]:
    return {"input_ids": ids(length), "attention_mask": ids(length)}


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("model", "images", "texts", "expected"),
    [
        ("blip_nlvr", (1, 2, 3, 384, 384), text(36), "132.54 G (two images"),
        ("blip_retrieval", (1, 3, 384, 384), text(35), "70.57 G (a pair"),
        ("blip_caption", (1, 3, 384, 384), text(15), "65.72 G (image"),
        ("blip_vqa", (1, 3, 480, 480), {**text(13), "answer_ids": ids(5), "answer_mask": ids(5)}, "107.17 G (image"),
        ("clip_vit_l14_336", (1, 3, 336, 336), {}, "191.10 G an image"),
        ("clip_vit_l14_336", None, {"input_ids": ids(77)}, "6.66 G a text"),
    ],
)
def test_dense_macs_are_those_of_the_readme(
    model: str, images: tuple[int, ...] | None, texts: dict[str, torch.Tensor], expected: str
) -> None:
    inputs = texts if images is None else {"images": torch.randn(images), **texts}
    macs = madtp.count_macs(zoo.create(model), inputs)
    assert f"{macs / 1e9:.2f} G" in expected
    assert expected in (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
