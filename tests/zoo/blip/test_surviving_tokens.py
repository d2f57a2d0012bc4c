"""Decoders that run by themselves, and matching of encoded images, see what they would see inside of a pruned model."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from reranking import rerank
from small_blip import inputs, small
from torch import Tensor

import madtp
from madtp.errors import DataError
from zoo.blip.matching import match, matching_distance, matching_loss
from zoo.blip.surviving_tokens import compacted, surviving_mask, surviving_tokens


@cache
def _rewritten(task: str, merge: bool, towers: tuple[str, ...] | None) -> tuple[madtp.PrunedModel, dict[str, Tensor]]:
    given = inputs(task, batch=4)
    config = madtp.PruningConfig(merge=merge, towers=towers, alignment_tokens=8, min_tokens=2)
    return madtp.rewrite(small(task), given, config=config), given


def pruned(
    task: str, merge: bool = False, towers: tuple[str, ...] | None = None
) -> tuple[madtp.PrunedModel, dict[str, Tensor]]:
    """A model of the task, rewritten once in this file, and a batch."""
    rewritten, given = _rewritten(task, merge, towers)
    model = copy.deepcopy(rewritten)
    model.gain = 3.0
    return model, given


@torch.no_grad()
def test_a_decoder_by_itself_sees_what_it_sees_inside() -> None:
    model, given = pruned("caption")
    whole = model(**given)
    tokens, mask = surviving_tokens(model, "visual_encoder", whole.image_tokens)
    assert mask is not None
    assert 0 < int(mask.sum()) < whole.image_tokens.shape[:2].numel()
    ids, padding = given["input_ids"], given["attention_mask"]
    outside = model.text_decoder(ids, padding, tokens, mask)
    torch.testing.assert_close(outside[padding.bool()], whole.logits[padding.bool()])
    assert not torch.allclose(model.text_decoder(ids, padding, whole.image_tokens), whole.logits, atol=1e-3)


@pytest.mark.parametrize(("multiple", "length"), [(1, 3), (2, 4), (4, 4), (5, 5), (16, 6)])
def test_survivors_stand_first_and_in_order(multiple: int, length: int) -> None:
    tokens = torch.arange(12.0).reshape(2, 6, 1)
    left = torch.tensor([[0, 1, 0, 1, 0, 1], [1, 0, 0, 0, 1, 0]])
    found, mask = compacted(tokens, left, multiple)
    assert found.shape == (2, length, 1)
    assert mask.sum(dim=1).tolist() == [3, 2]
    assert found[mask.bool()].flatten().tolist() == [1, 3, 5, 6, 10]


@torch.no_grad()
def test_an_answer_by_itself_is_the_answer_inside() -> None:
    model, given = pruned("vqa")
    whole = model(**given)
    outside = model.text_decoder(
        given["answer_ids"], given["answer_mask"], whole.question_states, given["attention_mask"]
    )
    words = given["answer_mask"].bool()
    torch.testing.assert_close(outside[words], whole.logits[words])


@torch.no_grad()
def test_matching_encoded_images_equals_matching_images() -> None:
    model, given = pruned("retrieval", towers=("image",))
    whole = model(**given)
    for tokens, mask in (
        surviving_tokens(model, "visual_encoder", whole.image_tokens),
        (whole.image_tokens, surviving_mask(model, "visual_encoder")),
    ):
        again = match(model, tokens, given["input_ids"], given["attention_mask"], mask)
        torch.testing.assert_close(again, whole.match_logits)


def test_right_and_wrong_pairs_are_matched_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Merged tokens, which only the whole call sees, must not tell right pairs from wrong ones."""
    model, given = pruned("retrieval", merge=True)
    found = model(**given)
    asked: list[Tensor] = []

    def watched(model: Any, image_tokens: Tensor, ids: Tensor, mask: Tensor, left: Tensor | None) -> Tensor:
        asked.append(ids)
        return match(model, image_tokens, ids, mask, left)

    monkeypatch.setattr("zoo.blip.matching.match", watched)
    loss = matching_loss(model, found, given["input_ids"], given["attention_mask"], torch.arange(4))
    loss.backward()
    assert len(asked[0]) == 12
    assert torch.equal(asked[0][:4], given["input_ids"])


def test_matching_follows_the_dense_model() -> None:
    model, given = pruned("retrieval")
    dense: Any = small("retrieval")
    texts = given["input_ids"], given["attention_mask"]
    with torch.no_grad():
        wanted = dense(**given)
    torch.manual_seed(0)
    assert float(matching_distance(dense, dense, wanted, wanted, *texts).detach()) == pytest.approx(0.0, abs=1e-5)
    found = model(**given)
    left = surviving_mask(model, "visual_encoder")
    torch.manual_seed(0)
    distance = matching_distance(model, dense, found, wanted, *texts)
    assert float(distance.detach()) > 1e-3
    distance.backward()
    assert all(p.grad is not None for p in model.text_encoder.parameters())
    assert all(p.grad is None for p in dense.parameters())
    again = surviving_mask(model, "visual_encoder")
    assert left is not None
    assert again is not None
    assert torch.equal(left, again)
    hidden = found._replace(image_tokens=found.image_tokens.masked_fill(left[..., None] == 0, 9.0))
    torch.manual_seed(0)
    torch.testing.assert_close(matching_distance(model, dense, hidden, wanted, *texts), distance)
    with pytest.raises(DataError, match="calls of both models with images and texts"):
        matching_distance(model, dense, found, dense(images=given["images"]), *texts)


@torch.no_grad()
def test_a_call_of_a_part_does_not_complain_of_blocks_that_it_does_not_run(caplog: pytest.LogCaptureFixture) -> None:
    model, given = pruned("retrieval")
    texts = given["input_ids"], given["attention_mask"]
    with caplog.at_level("WARNING", logger="madtp"):
        tokens = model(images=given["images"]).image_tokens
        match(model, tokens, *texts)
        model(input_ids=texts[0], attention_mask=texts[1])
    assert "nothing is pruned" not in caplog.text


@torch.no_grad()
def test_reranking_sees_what_survives() -> None:
    model, given = pruned("retrieval", towers=("image",))
    whole = model(**given)
    left, texts = surviving_mask(model, "visual_encoder"), (given["input_ids"], given["attention_mask"])
    scores, _ = rerank(model, torch.zeros(4, 4), whole.image_tokens, *texts, image_mask=left)
    torch.testing.assert_close(scores.diagonal(), whole.match_logits[:, 1])


@torch.no_grad()
def test_a_model_that_prunes_nothing_keeps_all() -> None:
    model, given = pruned("caption")
    tokens = model(**given).image_tokens
    assert surviving_tokens(small("caption"), "visual_encoder", tokens) == (tokens, None)
    assert surviving_tokens(model, "text_decoder", tokens) == (tokens, None)
    model.temperature = 0.0
    tokens = model(**given).image_tokens
    assert surviving_tokens(model, "visual_encoder", tokens) == (tokens, None)
