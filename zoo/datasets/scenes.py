"""Scenes, drawn by rule, in the interface of the data sets that lie in files.

``scenes`` has statements about pairs of pictures; ``scenes_captions`` and ``scenes_questions`` are about the fuller picture of
each pair.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from PIL import Image

from zoo.datasets.records import CaptionedImage, ImageSource, PairStatement, Question
from zoo.datasets.registry import DataEntry, Opener, Request, register_data
from zoo.scenes.dataset import Sample, draw_sample
from zoo.scenes.objects import SPLITS, draws_for
from zoo.scenes.phrases import Census
from zoo.scenes.single import captions, draw_question, fuller_side

SIZE = 2048
"""Samples of a split without a limit."""

SIDES = ("left", "right")
PEOPLE = 10
"""How many people count as having given the one answer, as in the data sets of the field, where fewer than 4 count less."""

_QUESTIONS = 1  # random stream


def open_scenes(request: Request) -> tuple[list[Any], ImageSource]:
    """Statements about pairs of pictures, the same as :class:`zoo.scenes.SceneDataset`."""
    records = []
    for index in range(request.limit or SIZE):
        statement = draw_sample(request.seed, request.split, index).statements[0]
        name = f"scenes-{request.seed}-{request.split}-{index}"
        images = (f"{name}-left", f"{name}-right")
        records.append(PairStatement(name, images, statement.text, int(statement.label), statement.kind))
    return records, picture


def open_captions(request: Request) -> tuple[list[Any], ImageSource]:
    """Pictures with four captions each."""
    records = []
    for index in range(request.limit or SIZE):
        pair = draw_sample(request.seed, request.split, index).pair
        side = fuller_side(pair)
        name = f"scenes-{request.seed}-{request.split}-{index}-{SIDES[side]}"
        records.append(CaptionedImage(name, (name,), captions(pair.pictures[side])))
    return records, picture


def open_questions(request: Request) -> tuple[list[Any], ImageSource]:
    """A question about each picture."""
    records = []
    for index in range(request.limit or SIZE):
        pair = draw_sample(request.seed, request.split, index).pair
        side = fuller_side(pair)
        draws = draws_for(request.seed, request.split, index, _QUESTIONS)
        asked = draw_question(Census(pair), side, draws)
        name = f"scenes-{request.seed}-{request.split}-{index}-{SIDES[side]}"
        records.append(Question(name, (name,), asked.question, (asked.answer,) * PEOPLE, asked.kind))
    return records, picture


def picture(name: str) -> Image.Image:
    """Draw the picture of a name such as "scenes-0-test-17-left"."""
    _, seed, split, index, side = name.split("-")
    pixels = _drawn(int(seed), split, int(index)).images[SIDES.index(side)]
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


@lru_cache(maxsize=8)
def _drawn(seed: int, split: str, index: int) -> Sample:
    """The two pictures of a pair are asked for one after the other, and drawn together."""
    return draw_sample(seed, split, index)


def _register(name: str, opener: Opener, description: str, *tasks: str) -> None:
    register_data(DataEntry(name, opener, description, tasks=tasks, splits=tuple(SPLITS), made_by_rule=True))


_register("scenes", open_scenes, "true or false statements about two drawn pictures", "reasoning")
_register("scenes_captions", open_captions, "drawn pictures with four captions each", "captioning", "retrieval")
_register("scenes_questions", open_questions, "questions about drawn pictures, 16 answers", "questions")
