"""What ``llava_mini`` reads and writes: :func:`conversation` for training, :func:`prompts` for questions.

A conversation is ``[ENC]``, the image tokens, and turns. A turn is a question, :data:`ANSWER`, its answer and :data:`END`. The
words are those of scenes; a caption is the answer to the order in which it names things ("from left to right").

Axes: B pictures, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from zoo.scenes.tokens import VOCABULARY, encode

PADDING, BEGIN = 0, 1
IMAGE, ANSWER, END = 125, 126, 127
VOCABULARY_SIZE = 128


@dataclass(frozen=True, slots=True)
class Turn:
    """A question, or another request, and the answer to it; an empty answer is still to be written."""

    question: str
    answer: str = ""


def conversation(turns: Sequence[Turn], image_tokens: int) -> tuple[Tensor, Tensor]:
    """Return the ids ``[T]`` of turns about a picture, and which of them the model writes, ``[T]`` bool.

    The last turn may lack its answer: the ids then end with :data:`ANSWER`, and the model goes on.
    """
    ids, written = [BEGIN] + [IMAGE] * image_tokens, [False] * (1 + image_tokens)
    for turn in turns:
        question = [*_words(turn.question), ANSWER]
        answer = [*_words(turn.answer), END] if turn.answer else []
        ids += question + answer
        written += [False] * len(question) + [True] * len(answer)
    return torch.tensor(ids), torch.tensor(written)


def prompts(questions: Sequence[Sequence[Turn]], image_tokens: int) -> tuple[Tensor, Tensor]:
    """Return ids ``[B, T]`` and mask ``[B, T]``, 1 for a token, of B conversations, padded on the left as for ``generate``."""
    rows = [conversation(turns, image_tokens)[0] for turns in questions]
    ids = pad_sequence(rows, batch_first=True, padding_side="left", padding_value=PADDING)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
    return ids, mask


def spoken(ids: Sequence[int]) -> str:
    """Return the words of an answer, up to its :data:`END`."""
    ended = list(ids)[: list(ids).index(END)] if END in ids else list(ids)
    return " ".join(VOCABULARY[number] for number in ended if 2 < number < len(VOCABULARY))


def _words(text: str) -> list[int]:
    return [int(number) for number in encode([text])[0][0][1:]]
