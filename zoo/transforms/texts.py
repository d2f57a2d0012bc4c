"""How BLIP cleans texts before they are tokenised: :func:`clean_caption`, :func:`clean_question`."""

from __future__ import annotations

import re

_MARKS = re.compile(r"[.!\"()*#:;~]")
_GAPS = re.compile(r"\s{2,}")

CAPTION_WORDS, STATEMENT_WORDS, QUESTION_WORDS = 30, 40, 50


def clean_caption(text: str, words: int = CAPTION_WORDS) -> str:
    """A caption or statement in lower case, marks as gaps, with at most so many words (BLIP: 30 of a caption, 40 of a
    statement)."""
    spaced = _GAPS.sub(" ", _MARKS.sub(" ", text.lower()))
    return _first(spaced.rstrip("\n").strip(" "), words)


def clean_question(text: str, words: int = QUESTION_WORDS) -> str:
    """A question in lower case without marks (the question mark stays), with at most so many words."""
    return _first(_MARKS.sub("", text.lower()).rstrip(" "), words)


def _first(text: str, words: int) -> str:
    return " ".join(text.split(" ")[:words])
