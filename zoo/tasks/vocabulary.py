"""Turn texts into ids and back: :func:`words_for`.

Models of full size read a vocabulary that the user supplies; mini models read the words of scenes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from madtp.errors import DataError
from zoo.scenes.tokens import VOCABULARY, encode

Encode = Callable[[Sequence[str]], tuple[Tensor, Tensor]]
"""Takes texts; returns ids ``[B, T]``, [ENC] first, and mask ``[B, T]``, 1 for a token."""

FEW = 1000
"""Mini models have fewer ids than this."""


@dataclass(frozen=True)
class Words:
    """How a model's texts are spelled.

    Attributes:
        encode: Takes texts; returns ids ``[B, T]``, [ENC] first, and mask ``[B, T]``, 1 for a token.
        decode: Takes ids; returns the text without special tokens.
        cleaned: Whether texts are cleaned as BLIP does. The texts of scenes need no cleaning.
    """

    encode: Encode
    decode: Callable[[Sequence[int]], str]
    cleaned: bool


def words_for(vocabulary_size: int, vocabulary: Path | None) -> Words:
    """Return how a model's texts are spelled.

    Args:
        vocabulary_size: Number of the model's ids.
        vocabulary: A BERT ``vocab.txt``. None stands for the words of scenes.

    Raises:
        DataError: The model has a vocabulary of full size, and none or another one is given.
    """
    if vocabulary is None:
        if vocabulary_size > FEW:
            raise DataError(
                f"the model reads {vocabulary_size} word pieces; give the vocab.txt of bert-base-uncased as vocabulary."
            )
        return Words(encode, _words_of_scenes, cleaned=False)
    from zoo.blip.tokenizer import StatementTokenizer

    tokenizer = StatementTokenizer(vocabulary)
    if len(tokenizer) != vocabulary_size:
        raise DataError(
            f"{vocabulary} gives {len(tokenizer)} word pieces, [DEC] and [ENC] included, and the model has "
            f"{vocabulary_size}; give the vocabulary that the model was trained with."
        )
    return Words(tokenizer, tokenizer.decode, cleaned=True)


def _words_of_scenes(ids: Sequence[int]) -> str:
    return " ".join(VOCABULARY[i] for i in ids if i < len(VOCABULARY) and not VOCABULARY[i].startswith("["))
