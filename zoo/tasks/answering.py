"""Questions about images: :class:`Answering`, for BLIP's question-answering model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from madtp.errors import DataError
from madtp.evaluation.task import Result
from zoo.blip.decoding import Answerer, rank_answers, write_answers
from zoo.blip.vqa import BlipVqa
from zoo.datasets.records import DataSet, Question
from zoo.metrics.answers import vqa_accuracy
from zoo.tasks.encode_text import QUESTION_TOKENS, spell
from zoo.tasks.one_stage import OneStage
from zoo.tasks.vocabulary import Words
from zoo.transforms.texts import clean_question

CANDIDATES = 128
"""Answers of the list that are scored in full, as published; the others only by their first token."""


class Answering(OneStage):
    """The task, in one stage: itself.

    Args:
        data: Questions about images.
        words: Spells questions and answers.
        device: Device of the model.
        model: The dense model; its special tokens are read.
        answers: Answers that the model chooses from, as published. None lets it write answers.
    """

    name = "questions"

    def __init__(
        self,
        data: DataSet[Question],
        words: Words,
        device: torch.device,
        model: BlipVqa,
        answers: Sequence[str] | None = None,
    ) -> None:
        self.data = data
        self.words = words
        self.device = device
        self.config = model.config
        self.answers = answers

    def inputs(self, samples: range) -> dict[str, Tensor]:
        """Return images ``[B, 3, H, W]``, questions ``[B, T]``, one answer to each ``[B, L]``, and masks."""
        ids, mask = self._spell([record.answers[0] for record in self._answered(samples)], self.config.decode_id)
        return {**self._questions(samples), "answer_ids": ids, "answer_mask": mask}

    def all_answers(self, samples: range) -> dict[str, Tensor]:
        """Return what :meth:`inputs` does, with every different answer to each question.

        Answers ``[A, L]`` are in the order of the questions' ``weighted_answers``; ``owners`` ``[A]`` says which question each
        belongs to.
        """
        given = [list(record.weighted_answers()) for record in self._answered(samples)]
        ids, mask = self._spell([answer for answers in given for answer in answers], self.config.decode_id)
        owners = torch.tensor([index for index, answers in enumerate(given) for _ in answers], device=self.device)
        return {**self._questions(samples), "answer_ids": ids, "answer_mask": mask, "owners": owners}

    def run(self, model: nn.Module, samples: range, earlier: Mapping[str, Sequence[Result]]) -> list[Result]:
        """Return the ``answer`` to each question."""
        del earlier
        question, answerer = self._questions(samples), cast(Answerer, model)
        if self.answers is None:
            written = write_answers(answerer, question["images"], question["input_ids"], question["attention_mask"])
            return [{"answer": self.words.decode(ids.tolist())} for ids in written]
        ids, mask = self._spell(self.answers, self.config.decode_id)
        best = rank_answers(answerer, **question, answer_ids=ids, answer_mask=mask, candidates=CANDIDATES)
        return [{"answer": self.answers[index]} for index in best.tolist()]

    def metrics(self, results: Mapping[str, Sequence[Result]]) -> dict[str, float]:
        """Return ``vqa_accuracy``, or nothing where the answers are secret."""
        given = [record.answers for record in self.data.records]
        if not all(given):
            return {}
        return {"vqa_accuracy": vqa_accuracy([result["answer"] for result in results[self.name]], given)}

    def _answered(self, samples: range) -> list[Question]:
        """Return the records of these questions, all of which have answers."""
        records = [self.data.records[index] for index in samples]
        unknown = [record.id for record in records if not record.answers]
        if unknown:
            raise DataError(f"{self.data.name}, split {self.data.split!r}, keeps the answer to {unknown[0]} secret.")
        return records

    def _questions(self, samples: range) -> dict[str, Tensor]:
        items = [self.data[index] for index in samples]
        texts = [item.record.question for item in items]
        if self.words.cleaned:
            texts = [clean_question(text) for text in texts]
        ids, mask = self._spell(texts, self.config.encode_id, min(QUESTION_TOKENS, self.config.text.positions))
        images = torch.cat([item.images for item in items])
        return {"images": images.to(self.device), "input_ids": ids, "attention_mask": mask}

    def _spell(self, texts: Sequence[str], first: int, limit: int | None = None) -> tuple[Tensor, Tensor]:
        ids, mask = spell(self.words, texts, first=first, end=self.config.end_id, limit=limit)
        return ids.to(self.device), mask.to(self.device)
