"""The closed vocabulary of scene statements and its word-level tokenizer: :func:`tokenizer`, :func:`encode`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from madtp.errors import DataError
from zoo.scenes.objects import COLOURS, SHAPES, SIZES
from zoo.scenes.phrases import ANY_SHAPE, PLURALS

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PAD, ENC, UNKNOWN = "[PAD]", "[ENC]", "[UNK]"

LONGEST = 20
"""Tokens of the longest statement, [ENC] included."""

_FRAME_WORDS = (
    "a above are at below both contain contains does exactly fewer four has have image images in is least left more most "
    "no not number of one right same than the there three two"
).split()

# Words of captions and questions about one picture. They come last, as trained weights depend on the ids of the others.
_MORE_WORDS = "bottom colour five from how many to top what yes zero".split()

VOCABULARY: tuple[str, ...] = (
    PAD,
    ENC,
    UNKNOWN,
    *sorted({*COLOURS, *SHAPES, *SIZES, ANY_SHAPE, *PLURALS.values(), *_FRAME_WORDS}),
    *_MORE_WORDS,
)
"""All words of scenes, by their ids."""


@lru_cache(maxsize=1)
def tokenizer() -> Tokenizer:
    """Return the tokenizer: it splits at white space and puts [ENC] in front; [PAD] is id 0."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing

    ids = {word: number for number, word in enumerate(VOCABULARY)}
    made = Tokenizer(WordLevel(ids, unk_token=UNKNOWN))
    made.pre_tokenizer = Whitespace()
    made.post_processor = TemplateProcessing(single=f"{ENC} $A", special_tokens=[(ENC, ids[ENC])])
    made.enable_padding(pad_id=ids[PAD], pad_token=PAD)
    return made


def encode(statements: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Return ids ``[B, T]`` and mask ``[B, T]``, 1 for a token, of statements; T is the longest of them.

    Raises:
        DataError: A statement holds a word that the grammar of scenes does not know.
    """
    encodings = tokenizer().encode_batch(list(statements))
    ids = torch.tensor([encoding.ids for encoding in encodings])
    if (unknown := (ids == VOCABULARY.index(UNKNOWN)).any(1)).any():
        culprit = statements[int(unknown.nonzero()[0])]
        raise DataError(f"the statement {culprit!r} holds a word outside the vocabulary of scenes {VOCABULARY[3:]}")
    return ids, torch.tensor([encoding.attention_mask for encoding in encodings])
