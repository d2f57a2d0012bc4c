"""Texts as BLIP's retrieval, captioning and answering models take them: :func:`spell`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from zoo.tasks.words import Words

CAPTION_TOKENS, QUESTION_TOKENS, RETRIEVAL_TOKENS = 40, 35, 35
"""The longest texts that the published models take, special tokens included."""


def spell(
    words: Words, texts: Sequence[str], *, first: int, end: int, limit: int | None = None
) -> tuple[Tensor, Tensor]:
    """Texts between two special tokens.

    Args:
        words: spells.
        texts: B of them.
        first: id in front.
        end: id behind.
        limit: longer texts are cut, in front of the end; None leaves them.

    Returns:
        ids [B, T], padded with 0, and mask [B, T] (1: token).
    """
    rows = []
    for ids, mask in zip(*words.encode(texts), strict=True):
        pieces = ids[mask.bool()][1:]
        if len(pieces) and int(pieces[-1]) == end:
            pieces = pieces[:-1]
        pieces = pieces if limit is None else pieces[: limit - 2]
        rows.append(torch.cat([torch.tensor([first]), pieces, torch.tensor([end])]))
    ids = pad_sequence(rows, batch_first=True)
    return ids, pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
