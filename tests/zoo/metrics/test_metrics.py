"""Metrics, against what the field's own code gives and against their definitions."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from project_paths import DATA

from madtp.errors import DataError
from zoo.metrics import (
    accuracy,
    accuracy_by_kind,
    answer_score,
    bleu,
    caption_metrics,
    caption_tokens,
    cider,
    normalise_answer,
    recalls,
    vqa_accuracy,
)

words = st.lists(st.sampled_from("a dog cat runs on the mat".split()), min_size=1, max_size=8)


def _stored(name: str) -> dict[str, Any]:
    return json.loads((DATA / name).read_text(encoding="utf-8"))


def test_accuracy_by_kind() -> None:
    assert accuracy([1, 0, 1, 1], [1, 1, 1, 0]) == 0.5
    assert accuracy_by_kind([1, 0, 1, 1], [1, 1, 1, 0], ["x", "y", "x", "y"]) == {"x": 1.0, "y": 0.0}
    for answers, truths in (([], []), ([1], [1, 0])):
        with pytest.raises(DataError, match="as many are needed"):
            accuracy(answers, truths)


def test_recall_both_ways_with_several_captions() -> None:
    # Image 0 owns texts 0 and 1, image 1 owns text 2.
    scores = torch.tensor([[0.1, 0.8, 0.9], [0.2, 0.3, 0.7]])
    found = recalls(scores, scores.T, [0, 0, 1])
    assert found["text_r1"] == 0.5  # image 0: text 2 stands before its best, text 1
    assert found["image_r1"] == pytest.approx(1 / 3)  # only text 1 has its image first
    assert found["text_r5"] == found["image_r10"] == 1.0
    assert found["mean_recall"] == pytest.approx((0.5 + 1 / 3 + 4) / 6)


@given(st.integers(2, 12), st.integers(1, 3), st.integers(0, 99))
def test_recall_by_sorting(images: int, each: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    owners = [image for image in range(images) for _ in range(each)]
    to_text = torch.rand(images, len(owners), generator=generator)
    to_image = torch.rand(len(owners), images, generator=generator)
    found = recalls(to_text, to_image, owners)
    for depth in (1, 5, 10):
        best = to_text.argsort(1, descending=True)[:, :depth].tolist()
        texts = [any(owners[text] == image for text in best[image]) for image in range(images)]
        assert found[f"text_r{depth}"] == pytest.approx(sum(texts) / images)
        best = to_image.argsort(1, descending=True)[:, :depth].tolist()
        right = [owners[text] in best[text] for text in range(len(owners))]
        assert found[f"image_r{depth}"] == pytest.approx(sum(right) / len(owners))


def test_a_model_that_tells_nothing_apart_finds_nothing() -> None:
    scores = torch.zeros(20, 20)
    assert recalls(scores, scores, list(range(20)))["mean_recall"] == 0.0


@pytest.mark.parametrize(
    ("to_text", "to_image", "owners", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 3), [0, 0, 1], "the other way round"),
        (torch.zeros(2, 2), torch.full((2, 2), float("nan")), [0, 1], "NaN"),
        (torch.zeros(2, 2), torch.zeros(2, 2), [0, 0], "has no text"),
    ],
)
def test_recall_refuses(to_text: torch.Tensor, to_image: torch.Tensor, owners: list[int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        recalls(to_text, to_image, owners)


@pytest.mark.parametrize("pair", _stored("caption_tokens.json")["captions"], ids=lambda pair: pair[0][:20])
def test_tokens_are_those_of_the_published_tokeniser(pair: list[str]) -> None:
    assert " ".join(caption_tokens(pair[0])) == pair[1]


def test_bleu_and_cider_are_those_of_the_published_code() -> None:
    stored = _stored("caption_scores.json")
    assert [" ".join(caption_tokens(text)) for text in stored["candidates"]] == stored["tokens"]
    candidates = [text.split() for text in stored["tokens"]]
    references = [[caption_tokens(text) for text in texts] for texts in stored["references"]]
    assert bleu(candidates, references) == pytest.approx(stored["bleu"], rel=1e-6)
    assert cider(candidates, references) == pytest.approx(stored["cider"], rel=1e-6)
    metrics = caption_metrics(stored["candidates"], stored["references"])
    assert metrics["bleu4"] == pytest.approx(stored["bleu"][3], rel=1e-6)
    assert metrics["cider"] == pytest.approx(sum(stored["cider"]) / 5, rel=1e-6)


def test_a_caption_that_people_wrote_scores_highest() -> None:
    texts = [["a dog runs on the mat"], ["two cats sleep in a box"]]
    candidates = [caption_tokens(known[0]) for known in texts]
    references = [[caption_tokens(text) for text in known] for known in texts]
    assert bleu(candidates, references) == pytest.approx((1, 1, 1, 1))
    assert cider(candidates, references) == pytest.approx([10, 10])
    assert cider([[], candidates[1]], references)[0] == 0
    assert bleu([[], []], references) == (0, 0, 0, 0)


@given(st.lists(st.tuples(words, st.lists(words, min_size=1, max_size=3)), min_size=1, max_size=4))
def test_scores_stay_in_range(pairs: list[tuple[list[str], list[list[str]]]]) -> None:
    candidates, references = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    assert all(0 <= score <= 1 + 1e-9 for score in bleu(candidates, references))
    assert all(0 <= score <= 10 + 1e-9 for score in cider(candidates, references))


def test_captions_without_references_are_refused() -> None:
    with pytest.raises(DataError, match="no reference captions"):
        cider([["a"]], [[]])
    with pytest.raises(DataError, match="1 captions of 0 images"):
        bleu([["a"]], [])


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Dog", "dog"),
        ("two", "2"),
        ("none", "0"),
        ("a man, a plan", "man plan"),
        ("red/green", "red green"),
        ("1,000 people", "1000 people"),
        ("dont know", "don't know"),
        ("couldnt've", "couldn't ve"),  # its apostrophe is a mark and goes first
        ("yes.", "yes"),
        ("3.5", "3.5"),
        ("what?", "what"),
        ("black & white", "black & white"),
        ("x-ray", "x-ray"),
    ],
)
def test_answers_are_normalised_as_published(text: str, normal: str) -> None:
    assert normalise_answer(text) == normal


@pytest.mark.parametrize(("agreeing", "score"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_an_answer_is_right_as_far_as_people_agree(agreeing: int, score: float) -> None:
    given = ["yes"] * agreeing + [f"other {number}" for number in range(10 - agreeing)]
    assert answer_score("Yes", given) == pytest.approx(score if agreeing < 10 else 0.0)
    assert answer_score("yes", given) == pytest.approx(score)


def test_vqa_accuracy_is_the_mean() -> None:
    given = [["2"] * 8 + ["two", "3"], ["red"] * 10]
    assert vqa_accuracy(["two", "blue"], given) == pytest.approx(0.5)
    with pytest.raises(DataError, match="nobody's answers are known"):
        vqa_accuracy(["a"], [[]])
    with pytest.raises(DataError, match="1 answers to 2 questions"):
        vqa_accuracy(["a"], given)
