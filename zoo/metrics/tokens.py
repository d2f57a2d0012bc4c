"""Split captions into tokens of the Penn Treebank, without punctuation marks: :func:`caption_tokens`.

COCO's evaluation runs a tokeniser written in Java. This one gives the same tokens on captions as people write them (tests
compare the two); it differs on rare spellings such as "rock'n'roll" and on abbreviations that it does not know.
"""

from __future__ import annotations

import re

_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_TYPOGRAPHIC = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": "-", "…": "..."})
_ABBREVIATIONS = frozenset(
    "mr mrs ms dr st jr sr vs etc inc ltd co corp prof gen rev sen rep gov lt col sgt capt mt ave blvd rd ft approx".split()
)
_ACRONYM = re.compile(r"(?:[a-z]\.)+")
_COMPOUNDS = {"cannot": ("can", "not"), "gonna": ("gon", "na"), "wanna": ("wan", "na"), "gotta": ("got", "ta")}
# Tokens of their own wherever they are: ellipses, marks, quotation marks, a comma or colon that is not inside a number.
_SEPARATE = re.compile(r"\.{2,}|-{2,}|[;!?\"`%]|(?<!\d)[,:]|[,:](?!\d)|\$|#(?=\d)")
_CLITIC = re.compile(r"(n't|'(?:s|m|re|ll|d|ve))$")
_MARK = re.compile(r"\.{2,}|-+|[;!?\"`,:.]|'+")


def caption_tokens(text: str) -> list[str]:
    """Return the tokens of the text of a caption, in lower case, without punctuation marks."""
    lowered = text.translate(_TYPOGRAPHIC).lower()
    for bracket, name in _BRACKETS.items():
        lowered = lowered.replace(bracket, f" {name} ")
    words = _SEPARATE.sub(lambda found: f" {found[0]} ", lowered).split()
    tokens: list[str] = []
    for place, word in enumerate(words):
        following = words[place + 1] if place + 1 < len(words) else ""
        tokens += [token for token in _parts(_without_period(_unquoted(word), following)) if not _MARK.fullmatch(token)]
    return tokens


def _unquoted(word: str) -> str:
    """Remove apostrophes that quote; 's and '80s keep theirs."""
    if word.startswith("'") and not re.match(r"'(?:\d|s$|m$|re$|ll$|d$|ve$)", word):
        word = word.lstrip("'")
    return word.rstrip("'") or word


def _without_period(word: str, following: str) -> str:
    """Remove the period that ends a sentence; abbreviations keep theirs, "no." if a number follows."""
    if not word.endswith(".") or _ACRONYM.fullmatch(word) or word[:-1] in _ABBREVIATIONS:
        return word
    return word if word == "no." and following[:1].isdigit() else word.rstrip(".")


def _parts(word: str) -> list[str]:
    """Split contractions: do n't, it 's, can not."""
    if word in _COMPOUNDS:
        return list(_COMPOUNDS[word])
    tail: list[str] = []
    while (found := _CLITIC.search(word)) and found.start() > 0:
        tail.insert(0, found[0])
        word = word[: found.start()]
    return [part for part in (word, *tail) if part]
