"""The paper's settings as data: for each its model, its files in the published formats, and its metrics.

Start at :data:`SETTINGS`. Weights are random and data small, as neither can be shipped; the formats are exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dataset_files
import published_checkpoints
import pytest

import zoo

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
                dataset_files.write_image(root / name, (60 * number, 100 * side, 50), (96, 64))
            label = "True" if number % 2 else "False"
            listed.append({"sentence": CAPTIONS[number].capitalize() + ".", "label": label, "images": images})
        dataset_files.write_json(root / f"nlvr_{split}.json", listed)


def coco(root: Path) -> None:
    for split in ("test", "val"):
        names = [f"val2014/COCO_val2014_{number:012d}.jpg" for number in range(IMAGES)]
        _captioned(root / "images", root / "annotations" / f"coco_karpathy_{split}.json", names)


def flickr30k(root: Path) -> None:
    for split in ("test", "val"):
        _captioned(root, root / f"flickr30k_{split}.json", [f"flickr30k-images/{n}.jpg" for n in range(IMAGES)])


def _captioned(folder: Path, annotations: Path, names: Sequence[str]) -> None:
    for number, name in enumerate(names):
        dataset_files.write_image(folder / name, (60 * number, 200 - 50 * number, 50), (96, 64))
    listed = [{"image": name, "caption": [CAPTIONS[n], CAPTIONS[n + 1]]} for n, name in enumerate(names)]
    dataset_files.write_json(annotations, listed)


def vqav2(root: Path) -> None:
    listed = []
    for number in range(IMAGES):
        image = f"val2014/COCO_val2014_{number:012d}.jpg"
        dataset_files.write_image(root / image, (60 * number, 0, 50), (96, 64))
        answer = [ANSWERS[number % 2]] * 7 + [ANSWERS[2]] * 3
        entry = {"question_id": number, "question": QUESTION.capitalize() + "?", "image": image, "dataset": "vqa"}
        listed.append({**entry, "answer": answer})
    dataset_files.write_json(root / "vqa_val.json", listed)
    dataset_files.write_json(root / "answer_list.json", list(ANSWERS))


def blip(task: str) -> Callable[[str, Path], Path]:
    """Writes random weights of a model as the published file of a task."""

    def write(name: str, folder: Path) -> Path:
        return published_checkpoints.write_blip(folder / f"model_base_{task}.pth", zoo.create(name), task)

    return write


def openai(name: str, folder: Path) -> Path:
    model: Any = zoo.create(name)
    return published_checkpoints.write_openai(folder / "ViT-B-16.pt", model, model.config)


def transformers(name: str, folder: Path) -> Path:
    pytest.importorskip("transformers")
    model: Any = zoo.create(name)
    published_checkpoints.transformers_clip(model.config).save_pretrained(folder / "clip-vit-base-patch16")
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
