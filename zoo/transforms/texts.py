"""Clean texts as BLIP does before they are tokenised: :func:`clean_caption`, :func:`clean_question`."""

from __future__ import annotations

import re

_MARKS = re.compile(r"[.!\"()*#:;~]")
_GAPS = re.compile(r"\s{2,}")

CAPTION_WORDS, STATEMENT_WORDS, QUESTION_WORDS = 30, 40, 50


def clean_caption(text: str, words: int = CAPTION_WORDS) -> str:
    """Return a caption or statement in lower case, with marks replaced by spaces, cut to ``words`` words.

    BLIP keeps 30 words of a caption and 40 of a statement.
    """
    spaced = _GAPS.sub(" ", _MARKS.sub(" ", text.lower()))
    return _first(spaced.rstrip("\n").strip(" "), words)


def clean_question(text: str, words: int = QUESTION_WORDS) -> str:
    """Return a question in lower case without marks, cut to ``words`` words. The question mark stays."""
    return _first(_MARKS.sub("", text.lower()).rstrip(" "), words)


def _first(text: str, words: int) -> str:
    return " ".join(text.split(" ")[:words])
