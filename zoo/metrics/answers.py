"""Accuracy of answers to questions about images, as VQA's evaluation defines it (Antol et al. 2015): :func:`vqa_accuracy`.

The more people gave an answer, the more it is right: an answer of three people in ten, or more, is wholly right. Before they
are compared, answers are normalised. The rules are reproduced with their oddities, as the field's figures depend on them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from madtp.errors import DataError

AGREEING = 3
"""Number of other people who have to give an answer for it to be wholly right."""

_MARKS = ";:/'[]\"()=+\\_><@`,?"
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_MOST_PERIODS = int(re.UNICODE)  # the published code passes this flag where a count is meant
_NUMBERS = {"none": "0"} | {
    word: str(number) for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
}
_ARTICLES = ("a", "an", "the")

_APOSTROPHES = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's "
    "how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock "
    "oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd "
    "someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's "
    "they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd "
    "where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all "
    "y'all'll y'all'd've you'd you'd've you'll you're you've"
).split()

# A word that lacks one of its apostrophes gets it back. "somebody'd" is the other way round in the published table.
_MENDED = {
    word[:place] + word[place + 1 :]: word
    for word in _APOSTROPHES
    for place, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}


def normalise_answer(text: str) -> str:
    """Return the text of an answer without marks, articles and capitals, with numbers up to ten in digits."""
    words = [_NUMBERS.get(word, word) for word in _without_marks(text).lower().split()]
    return " ".join(_MENDED.get(word, word) for word in words if word not in _ARTICLES)


def answer_score(answer: str, given: Sequence[str]) -> float:
    """Return how right an answer is, 0 to 1, by what people answered.

    For each of these people, the answer scores a third for every other one who gave it, up to 1; the result is the mean. Where
    all people agree, answers are compared without normalisation, as in the official evaluation.

    Args:
        answer: Of the model.
        given: The answers of all people who were asked.

    Raises:
        DataError: Nobody answered.
    """
    if not given:
        raise DataError("nobody's answers are known; the answers of test sets are secret, use a split that has them.")
    answer = answer.replace("\n", " ").replace("\t", " ").strip()
    known = [text.replace("\n", " ").replace("\t", " ").strip() for text in given]
    if len(set(known)) > 1:
        answer, known = normalise_answer(answer), [normalise_answer(text) for text in known]
    agreeing = sum(text == answer for text in known)
    scores = [min(1.0, (agreeing - (text == answer)) / AGREEING) for text in known]
    return sum(scores) / len(scores)


def vqa_accuracy(answers: Sequence[str], given: Sequence[Sequence[str]]) -> float:
    """Return the mean :func:`answer_score`, 0 to 1.

    Args:
        answers: One for each question.
        given: For each question, the answers of all people who were asked.

    Raises:
        DataError: There are no answers, or not one for each question, or a question that nobody answered.
    """
    if not answers or len(answers) != len(given):
        raise DataError(f"{len(answers)} answers to {len(given)} questions; as many are needed, and at least one.")
    return sum(answer_score(answer, known) for answer, known in zip(answers, given, strict=True)) / len(answers)


def _without_marks(text: str) -> str:
    """Remove marks that touch a space, or all marks in a text with a number like 1,000; replace others by a space."""
    number = _COMMA_IN_NUMBER.search(text) is not None
    result = text
    for mark in _MARKS:
        touching = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if touching or number else " ")
    return _PERIOD.sub("", result, count=_MOST_PERIODS)
