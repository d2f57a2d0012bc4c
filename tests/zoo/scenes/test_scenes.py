"""Scenes: determinism, truth of statements against an independent reading, balance, interface."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from madtp.errors import DataError
from zoo.scenes import VOCABULARY, SceneDataset, collate, draw_sample, encode, normalise
from zoo.scenes.bias import report
from zoo.scenes.drawing import GRID, PATCH
from zoo.scenes.objects import CANVAS, COLOURS, SHAPES, SIZES, SPLITS, Thing
from zoo.scenes.statements import KINDS
from zoo.scenes.tokens import LONGEST

NUMBERS = {"one": 1, "two": 2, "three": 3, "four": 4}
NOUN = r"((?:small |large )?(?:(?:red|green|blue|yellow|purple) )?(?:shape|circle|square|triangle|cross)(?:e?s)?)"

indices = st.integers(0, 10**6)
splits = st.sampled_from(sorted(SPLITS))


def count(things: tuple[Thing, ...], noun: str) -> int:
    """Count by words what a noun phrase names, sharing no code with the generator."""
    words = noun.split()
    total = 0
    for thing in things:
        says = {COLOURS[thing.colour], SHAPES[thing.shape], SIZES[thing.size], "shape"}
        total += all(any(word in (s, s + "s", s + "es") for s in says) for word in words)
    return total


def truth(text: str, pictures: tuple[tuple[Thing, ...], tuple[Thing, ...]]) -> bool:
    """Read a statement by regular expressions and decide it."""

    def shown(side: str, noun: str) -> int:
        return count(pictures[side == "right"], noun)

    side = "(left|right)"
    if m := re.fullmatch(f"there is a {NOUN} in the {side} image", text):
        return shown(m[2], m[1]) > 0
    if m := re.fullmatch(f"the {side} image contains a {NOUN}", text):
        return shown(m[1], m[2]) > 0
    if m := re.fullmatch(f"there is no {NOUN} in the {side} image", text):
        return shown(m[2], m[1]) == 0
    if m := re.fullmatch(f"the {side} image does not contain a {NOUN}", text):
        return shown(m[1], m[2]) == 0
    subject = "(both images contain|exactly one image contains|at least one image contains|no image contains)"
    if m := re.fullmatch(f"{subject} a {NOUN}", text):
        images = sum(count(things, m[2]) > 0 for things in pictures)
        return {"b": images == 2, "e": images == 1, "a": images >= 1, "n": images == 0}[text[0]]
    number_of = "(exactly|at least|at most) (one|two|three|four)"
    if m := re.fullmatch(f"there (?:is|are) {number_of} {NOUN} in the {side} image", text):
        found, number = shown(m[4], m[3]), NUMBERS[m[2]]
        return {"exactly": found == number, "at least": found >= number, "at most": found <= number}[m[1]]
    if m := re.fullmatch(f"the {side} image has (more|fewer) {NOUN} than the {side} image", text):
        assert m[1] != m[4]
        own, other = shown(m[1], m[3]), shown(m[4], m[3])
        return own > other if m[2] == "more" else own < other
    if m := re.fullmatch(f"the two images have the same number of {NOUN}", text):
        return shown("left", m[1]) == shown("right", m[1])
    if m := re.fullmatch(f"a {NOUN} is (left of|right of|above|below) a {NOUN} in the {side} image", text):
        things = pictures[m[4] == "right"]
        return any(
            {"left of": a.x < b.x, "right of": a.x > b.x, "above": a.y < b.y, "below": a.y > b.y}[m[2]]
            for a in things
            for b in things
            if count((a,), m[1]) and count((b,), m[3])
        )
    raise AssertionError(f"the test cannot read {text!r}")


@given(st.integers(0, 5), splits, indices)
@settings(max_examples=150, deadline=None)
def test_statements_are_as_true_as_they_say(seed: int, split: str, index: int) -> None:
    sample = draw_sample(seed, split, index, 8)
    for statement in sample.statements:
        assert truth(statement.text, sample.pair.pictures) == statement.label, statement
        assert statement.kind in KINDS


@given(st.integers(0, 5), splits, indices)
@settings(max_examples=40, deadline=None)
def test_a_sample_follows_from_seed_split_and_index(seed: int, split: str, index: int) -> None:
    one, again = draw_sample(seed, split, index, 3), draw_sample(seed, split, index, 5)
    assert one.pair == again.pair
    assert one.statements == again.statements[:3]
    assert torch.equal(one.images, again.images)
    np.testing.assert_array_equal(one.annotation.labels, again.annotation.labels)


def test_splits_seeds_and_indices_share_no_pair() -> None:
    samples = [draw_sample(seed, split, index) for seed in (0, 1) for split in SPLITS for index in range(60)]
    assert len({sample.images.numpy().tobytes() for sample in samples}) == len(samples)


@given(indices)
@settings(max_examples=60, deadline=None)
def test_objects_lie_inside_the_picture_and_apart(index: int) -> None:
    for things in draw_sample(0, "train", index).pair.pictures:
        assert 2 <= len(things) <= 5
        for number, one in enumerate(things):
            assert one.radius <= min(one.x, one.y)
            assert max(one.x, one.y) <= CANVAS - 1 - one.radius
            for other in things[:number]:
                distance = ((one.x - other.x) ** 2 + (one.y - other.y) ** 2) ** 0.5
                assert distance >= 0.95 * (one.radius + other.radius)


@given(indices)
@settings(max_examples=40, deadline=None)
def test_annotations_name_what_is_there(index: int) -> None:
    sample = draw_sample(0, "val", index)
    annotation = sample.annotation
    for side, things in enumerate(sample.pair.pictures):
        labels = annotation.labels[side]
        assert labels[3].sum() == len(things)
        assert set(labels[0]) - {0} <= {thing.colour + 1 for thing in things}
        assert ((labels[0] > 0) == (labels[1] > 0)).all()
        assert ((labels[0] > 0) == (labels[2] > 0)).all()
        for thing in things:
            patch = (thing.y // PATCH) * GRID + thing.x // PATCH
            assert tuple(labels[:3, patch]) == (thing.colour + 1, thing.shape + 1, thing.size + 1)
            middle = annotation.centre[side, patch] * PATCH + (CANVAS - 1) / 2
            np.testing.assert_allclose(middle, [thing.x, thing.y], atol=1e-4)


def test_an_object_has_its_colour_in_the_picture() -> None:
    for index in range(20):
        sample = draw_sample(0, "test", index)
        for image, things in zip(sample.images, sample.pair.pictures, strict=True):
            for thing in things:
                spot = image[:, thing.y - 1 : thing.y + 2, thing.x - 1 : thing.x + 2].float()
                red, green, blue = spot.mean((1, 2)).tolist()
                seen = {
                    "red": red > green + 60 and red > blue + 60,
                    "green": green > red + 30 and green > blue + 30,
                    "blue": blue > green + 60 and green > red,
                    "yellow": red > blue + 60 and green > blue + 60,
                    "purple": red > green + 40 and blue > green + 60,
                }
                assert [colour for colour, holds in seen.items() if holds] == [COLOURS[thing.colour]]


def test_nothing_can_be_guessed_from_words_or_pictures_alone() -> None:
    found = report(pairs=900, statements=6)
    for guess in found.guesses:
        assert abs(guess.accuracy - 0.5) < 4 * guess.error, guess
    assert abs(found.dispersion - 1) < 4 * found.dispersion_error


def test_items_collate_to_what_a_model_takes() -> None:
    dataset = SceneDataset("test", 6, seed=3)
    items = [dataset[index] for index in range(len(dataset))]
    assert items[0]["images"].shape == (2, 3, CANVAS, CANVAS)
    assert items[0]["images"].dtype == torch.uint8
    assert {item["label"] for item in items} <= {0, 1}
    assert len({item["id"] for item in items}) == 6
    batch = collate(items)
    assert batch["images"].shape == (6, 2, 3, CANVAS, CANVAS)
    assert batch["images"].abs().max() <= 1
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    assert torch.equal(batch["input_ids"] != 0, batch["attention_mask"].bool())
    assert batch["labels"].tolist() == [item["label"] for item in items]


def test_other_image_sizes_show_the_same_scene() -> None:
    small, full = SceneDataset("test", 2, image_size=48)[1], SceneDataset("test", 2)[1]
    assert small["images"].shape == (2, 3, 48, 48)
    assert small["statement"] == full["statement"]
    pooled = torch.nn.functional.avg_pool2d(normalise(full["images"]), 2)
    assert (pooled - normalise(small["images"])).abs().mean() < 0.05


def test_the_vocabulary_is_closed_and_statements_are_short() -> None:
    texts = [s.text for index in range(300) for s in draw_sample(0, "train", index, 8).statements]
    ids, mask = encode(texts)
    assert mask.sum(1).max() <= LONGEST
    assert (ids[:, 0] == VOCABULARY.index("[ENC]")).all()
    with pytest.raises(DataError, match="pink"):
        encode(["there is a pink circle in the left image"])


def test_bad_arguments_are_named() -> None:
    with pytest.raises(DataError, match="train, val, test"):
        SceneDataset("dev", 4)
    with pytest.raises(DataError, match="size"):
        SceneDataset("val", 0)
    with pytest.raises(DataError, match="negative"):
        draw_sample(-1, "val", 0)
    with pytest.raises(IndexError):
        SceneDataset("val", 3)[3]
