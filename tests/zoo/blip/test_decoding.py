"""Beam search, captions and answers: equal to transformers' search, to brute force, and with pruned models."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import small_blip as tasks
import torch
from torch import Tensor

import madtp
import zoo
from madtp.errors import ConfigError
from zoo.blip.decoding import Beams, beam_search, rank_answers, write_answers, write_captions
from zoo.blip.losses import next_token_losses

PROMPT = torch.tensor([tasks.BEGIN, 5, 6])


@torch.no_grad()
def test_steps_equal_the_whole_text() -> None:
    decoder = tasks.small("vqa").text_decoder
    ids, _ = tasks.texts(3, 7, tasks.BEGIN)
    source, mask = torch.randn(3, 5, 16), torch.tensor([[1] * 5, [1] * 3 + [0] * 2, [1] * 5])
    whole = decoder(ids, torch.ones_like(ids), source, mask)
    state = decoder.start(source, mask)
    for start, end in ((0, 3), (3, 4), (4, 7)):
        logits, state = decoder.step(ids[:, start:end], state)
        torch.testing.assert_close(logits, whole[:, end - 1])
    rows = torch.tensor([2, 1, 1])
    logits, _ = decoder.step(ids[rows, -1:], state.reorder(rows))
    longer = torch.cat([ids, ids[:, -1:]], dim=1)
    torch.testing.assert_close(logits, decoder(longer, torch.ones_like(longer), source, mask)[rows, -1])


@pytest.mark.parametrize(("count", "minimum"), [(1, 1), (3, 1), (3, 9), (4, 5)])
def test_captions_equal_those_of_transformers(tmp_path: Any, count: int, minimum: int) -> None:
    pytest.importorskip("transformers")
    theirs = tasks.transformers_model("caption")
    theirs.save_pretrained(tmp_path)
    ours = tasks.small("caption")
    zoo.load_checkpoint(ours, tmp_path)
    with torch.no_grad():  # or hardly a text would end before the limit
        for model in (ours, theirs):
            model.text_decoder.cls.predictions.bias[tasks.END] += 1.5
    images = tasks.inputs("caption", batch=4)["images"]
    captions = write_captions(ours, images, PROMPT, Beams(count, minimum, 14))
    # transformers drops the last id of a prompt and puts its own first one in front.
    prompt = torch.cat([PROMPT, PROMPT[:1]]).repeat(4, 1)
    out = theirs.generate(
        pixel_values=images,
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        num_beams=count,
        min_length=minimum,
        max_length=14,
        do_sample=False,
        early_stopping=False,
    )
    expected = [[i for i in row[len(PROMPT) :].tolist() if i not in (tasks.END, tasks.PAD)] for row in out]
    assert [caption.tolist() for caption in captions] == expected
    assert {len(text) for text in expected} != {14 - len(PROMPT)} or minimum > 5


@torch.no_grad()
def test_wide_search_finds_the_best_text() -> None:
    """With enough beams nothing is lost, so the result is the best of all texts."""
    decoder = tasks.small("caption").text_decoder
    source = torch.randn(1, 5, tasks.SMALL.vision.width)
    vocabulary, length = tasks.SMALL.text.vocabulary, 4

    def score(text: list[int]) -> float:
        ids = torch.tensor([[tasks.BEGIN, *text]])
        losses, _ = next_token_losses(decoder(ids, torch.ones_like(ids), source), ids, torch.ones_like(ids))
        return -float(losses.sum()) / (len(text) + 2)

    words = [word for word in range(vocabulary) if word != tasks.END]
    ended = [[*text, tasks.END] for size in (0, 1) for text in itertools.product(words, repeat=size)]
    best = max(ended, key=score)
    beams = Beams(count=vocabulary, max_length=length - 1, length_offset=2)
    found = beam_search(decoder, torch.tensor([[tasks.BEGIN]]), decoder.start(source), beams)[0].tolist()
    cut = max(([a, b] for a in words for b in words), key=score)
    assert found == (best[:-1] if score(best) >= score(cut) else cut)


@torch.no_grad()
def test_samples_do_not_depend_on_their_batch_mates() -> None:
    model, given = tasks.small("vqa"), tasks.inputs("vqa")
    question = [given["images"], given["input_ids"], given["attention_mask"]]
    together = write_answers(model, *question)
    for sample in range(3):
        alone = write_answers(model, *(value[sample : sample + 1] for value in question))
        assert torch.equal(alone[0], together[sample])


def ranked(model: Any, given: dict[str, Tensor], answers: tuple[Tensor, Tensor], candidates: int) -> Tensor:
    return rank_answers(
        model, given["images"], given["input_ids"], given["attention_mask"], *answers, candidates=candidates
    )


@torch.no_grad()
def test_ranking_finds_the_most_probable_answer() -> None:
    model, given, answers = tasks.small("vqa"), tasks.inputs("vqa"), tasks.texts(6, 4, tasks.BEGIN)
    question = {name: given[name] for name in ("images", "input_ids", "attention_mask")}
    every = torch.arange(3).repeat_interleave(6)
    ids, mask = answers[0].repeat(3, 1), answers[1].repeat(3, 1)
    logits = model(**question, answer_ids=ids, answer_mask=mask, owners=every).logits
    losses = next_token_losses(logits, ids, mask)[0].sum(1).view(3, 6)
    assert torch.equal(ranked(model, given, answers, 99), losses.argmin(1))
    first = logits[:, 0].softmax(-1).gather(1, ids[:, 1:2]).view(3, 6)
    assert torch.equal(ranked(model, given, answers, 1), first.argmax(1))


@pytest.mark.slow
@torch.no_grad()
def test_pruned_models_write_and_rank() -> None:
    config = madtp.PruningConfig(alignment_tokens=5, temperature=4.0)
    for task in ("caption", "vqa"):
        model, given = tasks.small(task), tasks.inputs(task)
        pruned: Any = madtp.rewrite(model, given, config=config)
        question = (given["images"], given["input_ids"], given["attention_mask"])

        def texts(model: Any, task: str = task, question: Any = question) -> list[list[int]]:
            written = (
                write_captions(model, question[0], PROMPT) if task == "caption" else write_answers(model, *question)
            )
            return [text.tolist() for text in written]

        with pruned.dense():
            assert texts(pruned) == texts(model)
        assert len(texts(pruned)) == 3
        assert pruned.token_counts()["visual_encoder.blocks.1"].max() < 17
        if task == "vqa":
            assert ranked(pruned, given, tasks.texts(6, 4, tasks.BEGIN), 4).shape == (3,)


def test_impossible_searches_are_refused() -> None:
    with pytest.raises(ConfigError, match="0 beams of 1 to 30 tokens"):
        Beams(count=0)
    with pytest.raises(ConfigError, match="the lengths in order"):
        Beams(min_length=9, max_length=8)
    with pytest.raises(ConfigError, match="the prompt has 3 tokens, and texts may have 3"):
        write_captions(tasks.small("caption"), tasks.inputs("caption")["images"], PROMPT, Beams(max_length=3))
