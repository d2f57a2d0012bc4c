"""Tokens that differ from each other: :func:`max_min_order`, :func:`determinantal_order`, :func:`distinct_values`.

All are greedy, so the first k tokens of an order are what its rule keeps of k. They need features of tokens and no attention.

Symbols: n tokens of one sample, C width, k tokens to pick.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from madtp.method.arrays import Numbers

TINY = 1e-6
SMALLEST_GAIN = 1e-10


def similarities(features: Tensor) -> Numbers:
    """Return the cosine similarities ``[n, n]`` of features ``[n, C]``, float64."""
    unit = torch.nn.functional.normalize(features.detach().float(), dim=1)
    found: Numbers = (unit @ unit.t()).cpu().double().numpy()
    return found


def max_min_order(similarity: Numbers, count: int) -> Numbers:
    """Return ``count`` tokens in the order in which the max-min diversity rule picks them.

    Alvar et al., DivPrune, CVPR 2025, algorithm 1: the first token is the one whose nearest other is farthest away, by the
    distance 1 - cosine; each next one is farthest from the nearest of those picked.

    Args:
        similarity: from :func:`similarities`.
        count: k, at most n.

    Returns:
        ``[k]`` int64.
    """
    distance = 1.0 - similarity
    order = np.zeros(count, dtype=np.int64)
    if count == 0:
        return order
    others = distance.copy()
    np.fill_diagonal(others, np.inf)
    order[0] = others.min(0).argmax()
    nearest = distance[order[0]].copy()
    nearest[order[0]] = -np.inf
    for at in range(1, count):
        chosen = order[at] = nearest.argmax()
        np.minimum(nearest, distance[chosen], out=nearest)
        nearest[chosen] = -np.inf
    return order


def distinct_values(similarity: Numbers, weight: Numbers) -> Numbers:
    """Return how much each token matters beside those that matter more.

    Tokens are picked one by one, each time the one with the largest value: its weight times its distance 1 - cosine to the
    nearest token picked before. This is what remains of that token's value when its turn comes.

    Args:
        similarity: from :func:`similarities`.
        weight: how much each token matters by itself ``[n]``, not negative.

    Returns:
        ``[n]`` float64, falling in the order of picking. The first token is as far as any two tokens are from each other.
    """
    distance = np.maximum(1.0 - similarity, 0.0)
    count = len(weight)
    values = np.zeros(count)
    if count == 0:
        return values
    nearest = np.full(count, distance.max())
    left = weight * nearest
    lowest = np.inf
    for _ in range(count):
        chosen = int(left.argmax())
        lowest = values[chosen] = min(lowest, left[chosen])
        if lowest <= 0:
            break
        np.minimum(nearest, distance[chosen], out=nearest)
        np.multiply(weight, nearest, out=left)
        left[values > 0] = -np.inf
    return values


def relevance_to(features: Tensor, context: Tensor | None) -> Numbers:
    """Return how relevant each token is to a text, scaled to (0, 1]: Zhang et al., CDPruner, NeurIPS 2025, equation 6.

    The relevance is the cosine with the mean of the text's own tokens in the stream, as there is no text encoder beside it.

    Args:
        features: ``[n, C]``.
        context: the mean ``[C]`` of the text tokens. None makes all tokens equally relevant.

    Returns:
        ``[n]`` float64.
    """
    if context is None:
        return np.ones(len(features))
    cosine = torch.nn.functional.cosine_similarity(features.detach().float(), context.detach().float()[None], dim=1)
    values: Numbers = cosine.cpu().double().numpy()
    spread = values.max(initial=-np.inf) - values.min(initial=np.inf)
    if not spread > 0:
        return np.ones(len(values))
    scaled: Numbers = (values - values.min() + TINY) / spread
    return scaled


def determinantal_order(similarity: Numbers, relevance: Numbers, count: int) -> Numbers:
    """Return ``count`` tokens in the order of a greedy search for the subset with the largest determinant.

    Zhang et al., CDPruner, NeurIPS 2025: the kernel is diag(r) L diag(r) with the similarities L and the relevance r. The
    search is that of Chen et al., NeurIPS 2018, algorithm 1, which updates a Cholesky factor.

    Args:
        similarity: L, from :func:`similarities`.
        relevance: r ``[n]``, positive.
        count: k, at most n.

    Returns:
        ``[k]`` int64. Once no token adds to the determinant, the most relevant ones follow.
    """
    kernel = relevance[:, None] * similarity * relevance
    gain = np.diagonal(kernel).copy()
    factors = np.zeros((count, len(relevance)))
    order = np.zeros(count, dtype=np.int64)
    for at in range(count):
        chosen = int(gain.argmax())
        if gain[chosen] < SMALLEST_GAIN:
            left = np.setdiff1d(np.arange(len(relevance)), order[:at])
            order[at:] = left[np.argsort(-relevance[left], kind="stable")][: count - at]
            break
        order[at] = chosen
        factors[at] = (kernel[chosen] - factors[:at, chosen] @ factors[:at]) / np.sqrt(gain[chosen])
        gain = gain - factors[at] ** 2
        gain[chosen] = -np.inf
    return order
