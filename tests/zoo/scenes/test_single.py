"""Captions of, and questions about, one picture of a scene: true, told apart, balanced, within the vocabulary."""

from __future__ import annotations

from collections import Counter, defaultdict

import pytest
import torch

import zoo
from zoo.blip.config import BLIP_MINI
from zoo.datasets import CaptionedImage, Question
from zoo.scenes import VOCABULARY, draw_sample, encode
from zoo.scenes.objects import COLOURS, SHAPES, SIZES, Thing
from zoo.scenes.phrases import PLURALS
from zoo.scenes.single import ANSWERS, KINDS, NUMBERS

LIMIT = 600


def _things(name: str) -> tuple[Thing, ...]:
    _, seed, split, index, side = name.split("-")
    pair = draw_sample(int(seed), split, int(index)).pair
    return pair.left if side == "left" else pair.right


@pytest.fixture(scope="module")
def captioned() -> tuple[CaptionedImage, ...]:
    return zoo.data("scenes_captions", split="val", limit=LIMIT).records


@pytest.fixture(scope="module")
def asked() -> tuple[Question, ...]:
    return zoo.data("scenes_questions", split="val", limit=LIMIT).records


def test_captions_name_everything_in_their_order(captioned: tuple[CaptionedImage, ...]) -> None:
    for record in captioned[:50]:
        by_order = {caption[: caption.index(" a ")]: caption.split(" a ")[1:] for caption in record.captions}
        for order, place in (("from left to right", "x"), ("from top to bottom", "y")):
            things = sorted(_things(record.id), key=lambda thing, place=place: getattr(thing, place))
            named = [f"{SIZES[t.size]} {COLOURS[t.colour]} {SHAPES[t.shape]}" for t in things]
            assert sorted(by_order[order]) == sorted(named)
            places = [getattr(thing, place) for thing in things]
            if len(set(places)) == len(places):
                assert by_order[order] == named
        assert len(by_order) == 4


def test_captions_tell_pictures_apart(captioned: tuple[CaptionedImage, ...]) -> None:
    owners = defaultdict(set)
    for record in captioned:
        for caption in record.captions:
            owners[caption].add(record.id)
    assert sum(len(ids) > 1 for ids in owners.values()) < LIMIT * 0.02


def test_the_fuller_picture_is_taken(captioned: tuple[CaptionedImage, ...]) -> None:
    for index, record in enumerate(captioned[:50]):
        pair = draw_sample(0, "val", index).pair
        assert len(_things(record.id)) == max(len(pair.left), len(pair.right))


def test_answers_are_true(asked: tuple[Question, ...]) -> None:
    singular = {plural: word for word, plural in PLURALS.items()}
    for record in asked:
        words, answer = record.question.split(), record.answers[0]
        things = [{SIZES[t.size], COLOURS[t.colour], SHAPES[t.shape], "shape"} for t in _things(record.id)]
        named = {singular.get(word, word) for word in words}
        fitting = [t for t in things if named & {*COLOURS, *SHAPES, *SIZES} <= t]
        if record.kind == "number":
            assert answer == NUMBERS[len(fitting)]
        elif record.kind == "existence":
            assert answer == ("yes" if fitting else "no")
        else:
            (thing,) = fitting
            assert answer in thing & {*(COLOURS if record.kind == "colour" else SHAPES)}


def test_kinds_and_answers_are_balanced(asked: tuple[Question, ...]) -> None:
    kinds = Counter(record.kind for record in asked)
    assert set(kinds) == set(KINDS)
    assert min(kinds.values()) > LIMIT * 0.12
    answers = Counter(record.answers[0] for record in asked)
    assert set(answers) <= set(ANSWERS)
    assert answers["yes"] / (answers["yes"] + answers["no"]) == pytest.approx(0.5, abs=0.15)
    assert max(answers[number] for number in NUMBERS) < 0.5 * kinds["number"]


def test_a_question_does_not_depend_on_the_limit(asked: tuple[Question, ...]) -> None:
    assert zoo.data("scenes_questions", split="val", limit=3).records == asked[:3]
    assert zoo.data("scenes_questions", split="val", limit=3, seed=1).records != asked[:3]


def test_texts_fit_the_vocabulary_and_the_mini_models(
    captioned: tuple[CaptionedImage, ...], asked: tuple[Question, ...]
) -> None:
    ids, _ = encode([caption for record in captioned for caption in record.captions])
    assert ids.shape[1] + 1 <= BLIP_MINI.text.positions
    encode([record.question for record in asked])
    encode(ANSWERS)
    assert len(VOCABULARY) <= min(BLIP_MINI.decode_id, BLIP_MINI.end_id)


def test_words_of_statements_kept_their_ids() -> None:
    first = list(VOCABULARY[3 : VOCABULARY.index("bottom")])
    assert first == sorted(first)
    assert VOCABULARY.index("yellow") == len(first) + 2


def test_pictures_are_those_of_the_pairs() -> None:
    data = zoo.data("scenes_captions", split="test", limit=2)
    record = data.records[1]
    side = ("left", "right").index(record.id.rpartition("-")[2])
    assert torch.equal(data[1].images[0], draw_sample(0, "test", 1).images[side])
