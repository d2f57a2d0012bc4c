"""VQAv2 and Visual Genome, questions about photographs, in the official format (VQAv2) or in BLIP's.

The official format has one file for questions (``v2_OpenEnded_mscoco_val2014_questions.json``) and one for annotations
(``v2_mscoco_val2014_annotations.json``); BLIP has one list (``vqa_val.json``, ``vg_qa.json``). Answers of the test sets are
secret.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from madtp.errors import DataError
from madtp.files.limits import shown
from zoo.datasets.files import Entry, entries, find_annotations, named_once, read_json
from zoo.datasets.images import ImageFolder
from zoo.datasets.records import ImageSource, Question
from zoo.datasets.registry import DataEntry, Request, register_data

_OFFICIAL = {"train": "train2014", "val": "val2014", "test": "test2015", "test_dev": "test-dev2015"}
_QUESTIONS = "v2_OpenEnded_mscoco_{part}_questions.json"
_ANNOTATIONS = "v2_mscoco_{part}_annotations.json"
_SECRET = ("test", "test_dev")

VISUAL_GENOME_WEIGHT = 0.2
"""The weight of an answer of Visual Genome in BLIP's training; only one person gave each."""


def open_vqav2(request: Request) -> tuple[list[Any], ImageSource]:
    """Return the records of a split and the folder of their images."""
    root, part = request.folder(), _OFFICIAL[request.split]
    names = (f"vqa_{request.split}.json", _QUESTIONS.format(part=part))
    path = request.annotations or find_annotations(request.name, root, names)
    content = read_json(path)
    if isinstance(content, dict):
        return _of_official(Entry(content, str(path)), path, request), ImageFolder(root)
    listed = entries(content, str(path))
    return named_once([_of_blip(entry, request.split) for entry in listed], listed), ImageFolder(root)


def open_visual_genome(request: Request) -> tuple[list[Any], ImageSource]:
    """Return the records and the folder of their images."""
    root = request.folder()
    path = request.annotations or find_annotations(request.name, root, ("vg_qa.json",))
    listed = entries(read_json(path), str(path))
    records = [
        Question(
            f"vg-{number}",
            (entry.text("image"),),
            entry.text("question"),
            (entry.text("answer"),),
            weight=VISUAL_GENOME_WEIGHT,
        )
        for number, entry in enumerate(listed)
    ]
    return records, ImageFolder(root, (".", "images", "visual-genome"))


def answer_list(path: str | Path) -> tuple[str, ...]:
    """Read the answers that a model chooses from: a JSON list of texts, such as BLIP's ``answer_list.json``.

    Args:
        path: Of the file.

    Raises:
        DataError: The file is missing or something else.
    """
    content = read_json(Path(path))
    if not isinstance(content, list) or not content:
        raise DataError(f"{path} is not a list of answers; it has to be a JSON list of texts.")
    places: dict[str, int] = {}
    for number, answer in enumerate(Entry({"answers": content}, str(path)).texts("answers")):
        if places.setdefault(answer, number) != number:
            raise DataError(
                f"{path} lists {answer!r} twice, as entries {places[answer]} and {number}; remove one of them."
            )
    return tuple(places)


def _of_blip(entry: Entry, split: str) -> Question:
    if entry.has("dataset") and entry.choice("dataset", ("vqa", "vg")) == "vg":
        raise DataError(f"{entry.place} is of Visual Genome; open that file as 'visual_genome'.")
    answers = () if split in _SECRET else entry.texts("answer")
    return Question(entry.name("question_id"), (entry.text("image"),), entry.text("question"), answers)


def _of_official(content: Entry, path: Path, request: Request) -> list[Question]:
    part = _OFFICIAL[request.split]
    if content.has("data_subtype"):
        content.choice("data_subtype", (part,))
    answers = {} if request.split in _SECRET else _annotations(path, part)
    records, listed = [], content.entries("questions")
    for entry in listed:
        name = entry.name("question_id")
        if request.split not in _SECRET and name not in answers:
            raise DataError(
                f"{entry.place}: question {name} is not among the annotations; the two files do not belong together."
            )
        given, kind = answers.get(name, ((), ""))
        records.append(Question(name, (_image(entry, part),), entry.text("question"), given, kind))
    return named_once(records, listed)


def _annotations(questions: Path, part: str) -> dict[str, tuple[tuple[str, ...], str]]:
    """Answers and type of answer, by question."""
    path = questions.parent / _ANNOTATIONS.format(part=part)
    if not path.is_file():
        raise DataError(f"{path} is not there, which holds the answers to {questions.name}; put it beside that file.")
    content = read_json(path)
    if not isinstance(content, dict):
        raise DataError(f"{path} holds {type(content).__name__}, not an object with 'annotations'.")
    found: dict[str, tuple[tuple[str, ...], str]] = {}
    places: dict[str, str] = {}
    for entry in Entry(content, str(path)).entries("annotations"):
        name = entry.name("question_id")
        if places.setdefault(name, entry.place) != entry.place:
            raise DataError(
                f"{entry.place} answers question {name} once more, after {places[name]}; remove one of them."
            )
        answers = tuple(answer.text("answer") for answer in entry.entries("answers"))
        found[name] = (answers, entry.text("answer_type"))
    return found


def _image(entry: Entry, part: str) -> str:
    """Where COCO keeps an image; the two test sets share theirs."""
    folder = part.replace("test-dev", "test")
    number = entry.name("image_id")
    if not re.fullmatch("[0-9]{1,12}", number):
        raise DataError(f"{entry.place}: 'image_id' is {shown(number)}; images of COCO have numbers.")
    return f"{folder}/COCO_{folder}_{int(number):012d}.jpg"


register_data(
    DataEntry(
        "vqav2",
        open_vqav2,
        "questions about photographs with ten answers each (VQAv2), in the official or in BLIP's format",
        tasks=("questions",),
        splits=tuple(_OFFICIAL),
    )
)
register_data(
    DataEntry(
        "visual_genome",
        open_visual_genome,
        "questions about photographs with one answer each (Visual Genome), in BLIP's format; for training",
        tasks=("questions",),
        splits=("train",),
    )
)
