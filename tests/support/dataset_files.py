"""Small data sets in exactly the published formats, for tests: each function writes one below a folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

COCO_NAMES = ("COCO_val2014_000000391895.jpg", "COCO_val2014_000000522418.jpg", "COCO_train2014_000000318219.jpg")


def write_json(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def write_image(path: Path, colour: tuple[int, int, int] = (200, 30, 30), size: tuple[int, int] = (12, 8)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def nlvr2_lines(
    root: Path, statements: Sequence[tuple[str, str]] = (("Two dogs.", "True"), ("No dog.", "False"))
) -> Path:
    """The corpus' own format: dev.json with an object a line, images in dev/."""
    lines = []
    for number, (sentence, label) in enumerate(statements):
        stem = f"dev-{number}-0"
        lines.append(
            {
                "validation": {"1": label},
                "sentence": sentence,
                "left_url": "https://a.example/l.jpg",
                "writer": "144",
                "label": label,
                "identifier": f"{stem}-1",
                "right_url": "https://a.example/r.jpg",
                "synset": "dog",
                "query": "dogs",
            }
        )
        write_image(root / "dev" / f"{stem}-img0.png", (10 * number, 0, 0))
        write_image(root / "dev" / f"{stem}-img1.png", (0, 10 * number, 0))
    (root / "dev.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root / "dev.json"


def nlvr2_list(root: Path, split: str = "train") -> Path:
    """BLIP's format: a list with names of images."""
    listed = []
    for number, label in enumerate(("True", "False", "True")):
        images = [f"images/{split}/{number}/{split}-{number}-0-img{side}.png" for side in (0, 1)]
        for name in images:
            write_image(root / name)
        listed.append({"sentence": f"There are {number} dogs.", "label": label, "images": images})
    return write_json(root / f"nlvr_{'dev' if split == 'val' else split}.json", listed)


def coco_list(root: Path, split: str) -> Path:
    """BLIP's format: in training an entry a caption, else an entry an image."""
    listed: list[dict[str, Any]] = []
    for number, name in enumerate(COCO_NAMES):
        image = f"{name.split('_')[1]}/{name}"
        write_image(root / "images" / image, (number, number, number))
        captions = [f"A dog number {number}, seen {times} times." for times in range(5)]
        if split == "train":
            listed += [{"image": image, "caption": text, "image_id": f"coco_{int(name[-16:-4])}"} for text in captions]
        else:
            listed.append({"image": image, "caption": captions})
    return write_json(root / "annotations" / f"coco_karpathy_{split}.json", listed)


def karpathy(root: Path, name: str = "coco") -> Path:
    """Karpathy's format, all splits in a file."""
    images = []
    for number, split in enumerate(("train", "restval", "val", "test")):
        filename = f"{name}-{number}.jpg"
        sentences = [
            {"tokens": ["a", "dog"], "raw": f"A dog, {split}. ", "imgid": number, "sentid": 5 * number + place}
            for place in range(2)
        ]
        entry = {
            "filename": filename,
            "imgid": number,
            "sentids": [s["sentid"] for s in sentences],
            "sentences": sentences,
            "split": split,
        }
        if name == "coco":
            entry |= {"filepath": "val2014", "cocoid": 391895 + number}
        write_image(root / ("val2014" if name == "coco" else "flickr30k-images") / filename)
        images.append(entry)
    return write_json(root / f"dataset_{name}.json", {"images": images, "dataset": name})


def flickr_list(root: Path, split: str = "test") -> Path:
    """BLIP's format of Flickr30k."""
    image = "flickr30k-images/1007129816.jpg"
    write_image(root / image)
    captions = [f"The man with pierced ears, {number}." for number in range(5)]
    return write_json(root / f"flickr30k_{split}.json", [{"image": image, "caption": captions}])


def vqa_list(root: Path, split: str) -> Path:
    """BLIP's format: secret answers are left out."""
    image = f"{'test2015/COCO_test2015' if split == 'test' else 'val2014/COCO_val2014'}_000000262144.jpg"
    write_image(root / image)
    entry: dict[str, Any] = {
        "question_id": 262144000,
        "question": "Is the ball flying?",
        "image": image,
        "dataset": "vqa",
    }
    if split != "test":
        entry["answer"] = ["yes"] * 7 + ["no"] * 3
    return write_json(root / f"vqa_{split}.json", [entry])


def vqa_official(root: Path, part: str = "val2014") -> tuple[Path, Path]:
    """The official pair of files."""
    head = {"info": {"version": "2.0"}, "license": {}, "data_subtype": part, "data_type": "mscoco"}
    questions = [
        {"image_id": 262148, "question": "Where is he looking?", "question_id": 262148000},
        {"image_id": 262148, "question": "How many are there?", "question_id": 262148001},
    ]
    annotations = []
    for question, words, kind in zip(questions, (("down", "table"), ("4", "four")), ("other", "number"), strict=True):
        answers = [
            {"answer": words[number > 6], "answer_confidence": "yes", "answer_id": number + 1} for number in range(10)
        ]
        annotations.append(
            {
                "question_type": "none of the above",
                "multiple_choice_answer": words[0],
                "answers": answers,
                "image_id": 262148,
                "answer_type": kind,
                "question_id": question["question_id"],
            }
        )
    write_image(root / part / f"COCO_{part}_000000262148.jpg")
    asked = {**head, "task_type": "Open-Ended", "questions": questions}
    return (
        write_json(root / f"v2_OpenEnded_mscoco_{part}_questions.json", asked),
        write_json(root / f"v2_mscoco_{part}_annotations.json", {**head, "annotations": annotations}),
    )


def visual_genome(root: Path) -> Path:
    """BLIP's format of Visual Genome's questions."""
    write_image(root / "VG_100K" / "2370799.jpg")
    entry = {"image": "VG_100K/2370799.jpg", "question": "What is on the table?", "answer": "a cup", "dataset": "vg"}
    return write_json(root / "vg_qa.json", [entry])
