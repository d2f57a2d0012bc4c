"""Texts to ids and back, for the models of the zoo: :func:`words_for`.

Full-size models read a vocabulary that the user supplies, mini models the words of scenes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from madtp.errors import DataError
from zoo.scenes.tokens import VOCABULARY, encode

Encode = Callable[[Sequence[str]], tuple[Tensor, Tensor]]
"""Texts -> ids [B, T], with [ENC] first, and mask [B, T] (1: token)."""


@dataclass(frozen=True)
class Words:
    """How a model's texts are spelled.

    Attributes:
        encode: texts -> ids [B, T], [ENC] first, and mask [B, T] (1: token).
        decode: ids -> text, without special tokens.
        cleaned: whether texts have to be cleaned as BLIP does; the texts of scenes are as they should be.
    """

    encode: Encode
    decode: Callable[[Sequence[int]], str]
    cleaned: bool


def words_for(vocabulary_size: int, vocabulary: Path | None) -> Words:
    """The words of a model.

    Args:
        vocabulary_size: number of the model's ids.
        vocabulary: a BERT `vocab.txt`; None stands for the words of scenes.

    Raises:
        DataError: the model has a full vocabulary and none is given, or another one.
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


FEW = 1000
"""Ids of a mini model are fewer."""


def _words_of_scenes(ids: Sequence[int]) -> str:
    return " ".join(VOCABULARY[i] for i in ids if i < len(VOCABULARY) and not VOCABULARY[i].startswith("["))
