"""Text from BLIP's decoders: captions, answers, and answers of a list ranked. Start with :func:`write_captions` and
:func:`rank_answers`.

Models may be dense or pruned. They encode by their own call; the decoder then runs step by step on the surviving tokens.
Axes: B samples, K beams, T tokens, W words of the vocabulary, A answers of a list, L tokens of an answer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from madtp.errors import ConfigError
from zoo.blip.caption import CaptionOutput
from zoo.blip.decoder import DecoderState, TextDecoder
from zoo.blip.losses import next_token_losses
from zoo.blip.surviving_tokens import surviving_tokens
from zoo.blip.vqa import VqaOutput

_NEVER = -1e9


class Captioner(Protocol):
    """A :class:`~zoo.blip.caption.BlipCaption`, dense or rewritten."""

    text_decoder: TextDecoder

    def __call__(self, images: Tensor) -> CaptionOutput:
        """Encode images ``[B, 3, H, W]``."""


class Answerer(Protocol):
    """A :class:`~zoo.blip.vqa.BlipVqa`, dense or rewritten."""

    text_decoder: TextDecoder

    def __call__(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor) -> VqaOutput:
        """Encode questions ``[B, T]`` (mask ``[B, T]``, 1: token) about images ``[B, 3, H, W]``."""


@dataclass(frozen=True)
class Beams:
    """How to search.

    Attributes:
        count: K, the number of hypotheses that are followed at once.
        min_length: The shortest text, prompt and end included.
        max_length: The longest text, prompt and end included.
        length_penalty: A hypothesis scores its log-probability over ``(new tokens, its end included, + length_offset)`` to
            this power.
        length_offset: Added to the number of new tokens; the published captions were made with the length of the prompt
            less one.
    """

    count: int = 3
    min_length: int = 1
    max_length: int = 30
    length_penalty: float = 1.0
    length_offset: int = 0

    def __post_init__(self) -> None:
        if self.count < 1 or not 1 <= self.min_length <= self.max_length:
            raise ConfigError(
                f"{self.count} beams of {self.min_length} to {self.max_length} tokens: count has to be at least 1, and the "
                "lengths in order."
            )


@dataclass
class _Finished:
    """The best complete texts of one sample."""

    limit: int
    texts: list[tuple[float, Tensor]] = field(default_factory=list)

    def add(self, score: float, ids: Tensor) -> None:
        self.texts = sorted([*self.texts, (score, ids)], key=lambda text: -text[0])[: self.limit]

    def unbeaten_by(self, score: float) -> bool:
        """Whether there are enough, and none is worse than a text of this score would be."""
        return len(self.texts) == self.limit and score <= self.texts[-1][0]


class _Search:
    """The K best unfinished texts of each sample, and the best finished ones.

    Attributes:
        ids: ``[B * K, T]``.
        scores: ``[B, K]``, log-probabilities.
        going: Samples whose finished texts may still be beaten.
    """

    def __init__(self, beams: Beams, end_id: int, prompt: Tensor) -> None:
        self.beams, self.end_id = beams, end_id
        batch, self.given = prompt.shape
        self.ids = prompt.repeat_interleave(beams.count, dim=0)
        self.scores = torch.full((batch, beams.count), _NEVER, device=prompt.device)
        self.scores[:, 0] = 0  # all beams are alike at first
        self.finished = [_Finished(beams.count) for _ in range(batch)]
        self.going = set(range(batch))
        self.done = False

    def advance(self, words: Tensor) -> Tensor:
        """Add a word to every text, by log-probabilities ``[B * K, W]``; return the rows ``[B * K]`` that new texts extend."""
        count, length = self.beams.count, self.ids.shape[1] + 1
        if length <= self.beams.min_length:
            words = words.index_fill(1, torch.tensor([self.end_id], device=words.device), -torch.inf)
        totals = (self.scores[:, :, None] + torch.unflatten(words, 0, (-1, count))).flatten(1)
        best, place = totals.topk(2 * count, dim=1)  # so many that K of them go on
        beam, word = place // words.shape[1], place % words.shape[1]
        ends, last = word == self.end_id, length == self.beams.max_length
        norm = (length - self.given + self.beams.length_offset) ** self.beams.length_penalty
        for sample in self.going:
            for rank in range(count):  # further down, a text that ends is none of the best
                if ends[sample, rank] or last:
                    text = self.ids[sample * count + int(beam[sample, rank]), self.given :]
                    text = text if ends[sample, rank] else torch.cat([text, word[sample, rank, None]])
                    self.finished[sample].add(float(best[sample, rank]) / norm, text)
        self.scores, chosen = best.masked_fill(ends, _NEVER).topk(count, dim=1)
        self.going = {s for s in self.going if not self.finished[s].unbeaten_by(float(self.scores[s, 0]) / norm)}
        self.done = last or not self.going
        first = torch.arange(len(best), device=best.device)[:, None] * count
        rows: Tensor = (first + beam.gather(1, chosen)).flatten()
        self.ids = torch.cat([self.ids[rows], word.gather(1, chosen).flatten()[:, None]], dim=1)
        return rows


@torch.no_grad()
def beam_search(decoder: TextDecoder, prompt: Tensor, state: DecoderState, beams: Beams) -> list[Tensor]:
    """Return the most probable continuation of each prompt.

    Args:
        decoder: The decoder.
        prompt: ``[B, T]`` long, without padding.
        state: ``decoder.start(...)`` for the B samples.
        beams: How to search.

    Returns:
        B tensors of new ids, without prompt and end.
    """
    count, (batch, given) = beams.count, prompt.shape
    if given >= beams.max_length:
        raise ConfigError(f"the prompt has {given} tokens, and texts may have {beams.max_length}; raise max_length.")
    search = _Search(beams, decoder.end_id, prompt)
    state = state.reorder(torch.arange(batch, device=prompt.device).repeat_interleave(count))
    logits, state = decoder.step(search.ids, state)
    while True:
        rows = search.advance(logits.float().log_softmax(dim=-1))
        if search.done:
            return [finished.texts[0][1] for finished in search.finished]
        logits, state = decoder.step(search.ids[:, -1:], state.reorder(rows))


@torch.no_grad()
def write_captions(model: Captioner, images: Tensor, prompt: Tensor, beams: Beams | None = None) -> list[Tensor]:
    """Return captions of images ``[B, 3, H, W]``: ids after the prompt ``[T]`` ([DEC] first), without end.

    The default beams are the published ones, of 10 to 30 tokens.
    """
    if beams is None:
        beams = Beams(min_length=10, max_length=30, length_offset=len(prompt) - 1)
    tokens, mask = surviving_tokens(model, "visual_encoder", model(images).image_tokens)
    state = model.text_decoder.start(tokens, mask)
    return beam_search(model.text_decoder, prompt.expand(len(images), -1), state, beams)


@torch.no_grad()
def write_answers(
    model: Answerer, images: Tensor, input_ids: Tensor, attention_mask: Tensor, beams: Beams | None = None
) -> list[Tensor]:
    """Return answers to questions ``[B, T]`` about images ``[B, 3, H, W]``: ids without end."""
    states = model(images, input_ids, attention_mask).question_states
    prompt = torch.full((len(images), 1), model.text_decoder.begin_id, device=images.device)
    state = model.text_decoder.start(states, attention_mask)
    return beam_search(model.text_decoder, prompt, state, Beams(max_length=10) if beams is None else beams)


@torch.no_grad()
def rank_answers(
    model: Answerer,
    images: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor,
    answer_ids: Tensor,
    answer_mask: Tensor,
    *,
    candidates: int = 128,
) -> Tensor:
    """Return which answer of a list fits each question best.

    Args:
        model: Dense or rewritten.
        images: ``[B, 3, H, W]``.
        input_ids: Questions ``[B, T]``.
        attention_mask: ``[B, T]``, 1 for a token.
        answer_ids: The list ``[A, L]``, [DEC] first.
        answer_mask: ``[A, L]``, 1 for a token.
        candidates: How many answers, those with the most probable first words, are scored whole.

    Returns:
        ``[B]`` long, places in the list.
    """
    decoder = model.text_decoder
    batch, candidates = len(images), min(candidates, len(answer_ids))
    states = model(images, input_ids, attention_mask).question_states
    logits, _ = decoder.step(answer_ids[:1, :1].expand(batch, -1), decoder.start(states, attention_mask))
    places = logits.softmax(dim=-1)[:, answer_ids[:, 1]].topk(candidates, dim=1).indices
    rows = torch.arange(batch, device=images.device).repeat_interleave(candidates)
    ids, mask = answer_ids[places.flatten()], answer_mask[places.flatten()]
    scored = decoder(ids, mask, states[rows], attention_mask[rows])
    losses = next_token_losses(scored, ids, mask)[0].sum(dim=1).view(batch, candidates)
    return places.gather(1, losses.argmin(dim=1, keepdim=True))[:, 0]
