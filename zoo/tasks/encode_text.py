"""Turn texts into ids: :func:`spell` for BLIP's retrieval, captioning and answering, :func:`clip_texts` for CLIP."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from madtp.errors import DataError
from zoo.clip.config import ClipConfig
from zoo.tasks.vocabulary import FEW, Words, words_for

CAPTION_TOKENS, QUESTION_TOKENS, RETRIEVAL_TOKENS = 40, 35, 35
"""The longest texts that the published models take, special tokens included."""

FIRST = 1
"""Id of the token with which texts of a mini CLIP begin: [ENC] of scenes."""


def spell(
    words: Words, texts: Sequence[str], *, first: int, end: int, limit: int | None = None
) -> tuple[Tensor, Tensor]:
    """Spell texts between two special tokens.

    Args:
        words: Spells single texts.
        texts: B texts.
        first: Id in front of each.
        end: Id behind each.
        limit: Number of tokens to which longer texts are cut, special tokens included. None cuts nothing.

    Returns:
        Ids ``[B, T]``, padded with 0, and mask ``[B, T]``, 1 for a token.
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


def clip_texts(config: ClipConfig, vocabulary: Path | None) -> Callable[[Sequence[str]], Tensor]:
    """Return a function from texts to the ids ``[B, T]`` of a CLIP model.

    A mini model reads the words of scenes; others read the word pieces of OpenAI, which come with open_clip.

    Args:
        config: Configuration of the model.
        vocabulary: Has to be None.

    Raises:
        DataError: A vocabulary is given, which CLIP does not take, or open_clip is not installed.
    """
    if vocabulary is not None:
        raise DataError("CLIP brings its own word pieces; leave the vocabulary out.")
    if config.vocabulary <= FEW:
        words, end = words_for(config.vocabulary, None), config.vocabulary - 1
        return lambda texts: spell(words, texts, first=FIRST, end=end, limit=config.positions)[0]
    try:
        from open_clip.tokenizer import SimpleTokenizer
    except ImportError as error:
        raise DataError("the word pieces of CLIP come with open_clip; pip install 'madtp[open-clip]'.") from error
    tokenizer = SimpleTokenizer(context_length=config.positions)
    return lambda texts: tokenizer(list(texts))
