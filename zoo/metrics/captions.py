"""BLEU (Papineni et al. 2002) and CIDEr-D (Vedantam et al. 2015) of captions, as COCO's evaluation computes them.

:func:`caption_metrics` takes plain texts; :func:`bleu` and :func:`cider` take tokens, which :mod:`zoo.metrics.tokens` makes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from statistics import fmean

from madtp.errors import DataError
from zoo.metrics.tokens import caption_tokens

ORDERS = 4
"""n-grams of 1 to 4 words."""

_LENGTH_SPREAD = 6.0  # sigma of CIDEr-D's penalty for another length
_SCALE = 10.0

Tokens = Sequence[str]
NGrams = list[Counter[tuple[str, ...]]]


def caption_metrics(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return ``bleu1`` to ``bleu4``, in [0, 1], and ``cider``, in [0, 10]. Papers print both times 100.

    Args:
        candidates: One caption for each image.
        references: The captions that people wrote about each image.

    Raises:
        DataError: See :func:`cider`.
    """
    tokens = [caption_tokens(text) for text in candidates]
    known = [[caption_tokens(text) for text in texts] for texts in references]
    scores = {f"bleu{order}": score for order, score in enumerate(bleu(tokens, known), start=1)}
    return {**scores, "cider": fmean(cider(tokens, known))}


def bleu(candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> tuple[float, ...]:
    """Return BLEU-1 to BLEU-4 of the whole corpus.

    BLEU-n = min(1, exp(1 - r / c)) (p_1 ... p_n)^(1/n). The clipped precisions p_n are over all captions. The brevity penalty
    compares their total length c with r, the sum of the reference lengths that are closest (the shorter of two).

    Args:
        candidates: The tokens of one caption for each image.
        references: For each image, the tokens of the captions that people wrote.

    Raises:
        DataError: See :func:`cider`.
    """
    _check(candidates, references)
    right, possible = [0] * ORDERS, [0] * ORDERS
    length = closest = 0
    for candidate, known in zip(candidates, references, strict=True):
        length += len(candidate)
        closest += min((abs(len(text) - len(candidate)), len(text)) for text in known)[1]
        counts, limits = _ngrams(candidate), [_ngrams(text) for text in known]
        for n in range(ORDERS):
            most: Counter[tuple[str, ...]] = Counter()
            for limit in limits:
                most |= limit[n]
            right[n] += (counts[n] & most).total()
            possible[n] += counts[n].total()
    penalty = 1.0 if length >= closest else math.exp(1 - closest / length) if length else 0.0
    scores, product = [], 1.0
    for n in range(ORDERS):
        product *= right[n] / possible[n] if possible[n] else 0.0
        scores.append(penalty * product ** (1 / (n + 1)))
    return tuple(scores)


def cider(candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> list[float]:
    """Return CIDEr-D of each caption, 0 to 10.

    n-grams are weighted by how few images have them in a reference (tf-idf). A caption scores the cosine to each reference,
    with weights clipped to the reference's, times exp(-(difference of lengths)^2 / 72), averaged over references and orders.
    Lengths are counted in pairs of words, as in COCO's code.

    Args:
        candidates: The tokens of one caption for each image.
        references: For each image, the tokens of the captions that people wrote.

    Raises:
        DataError: There are no captions, not one for each image, or an image without references.
    """
    _check(candidates, references)
    counted = [[_ngrams(text) for text in known] for known in references]
    images = Counter(gram for known in counted for gram in {gram for text in known for n in text for gram in n})
    most = math.log(len(references))

    def weigh(counts: NGrams) -> list[dict[tuple[str, ...], float]]:
        return [{g: times * (most - math.log(max(1, images[g]))) for g, times in n.items()} for n in counts]

    scores = []
    for candidate, known in zip(candidates, counted, strict=True):
        counts = _ngrams(candidate)
        own = weigh(counts)
        total = 0.0
        for text in known:
            gap = counts[1].total() - text[1].total()
            cosines = [_clipped_cosine(a, b) for a, b in zip(own, weigh(text), strict=True)]
            total += math.exp(-(gap**2) / (2 * _LENGTH_SPREAD**2)) * sum(cosines) / ORDERS
        scores.append(_SCALE * total / len(known))
    return scores


def _clipped_cosine(own: dict[tuple[str, ...], float], other: dict[tuple[str, ...], float]) -> float:
    norms = math.sqrt(sum(w * w for w in own.values())) * math.sqrt(sum(w * w for w in other.values()))
    shared = sum(min(weight, other[gram]) * other[gram] for gram, weight in own.items() if gram in other)
    return shared / norms if norms else 0.0


def _ngrams(tokens: Tokens) -> NGrams:
    """Return counts of n-grams, one counter for each order."""
    return [
        Counter(tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)) for n in range(1, ORDERS + 1)
    ]


def _check(candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> None:
    if not candidates or len(candidates) != len(references):
        raise DataError(f"{len(candidates)} captions of {len(references)} images; one of each is needed.")
    if not all(references):
        raise DataError("an image has no reference captions; it cannot be scored.")
