"""Matching of encoded images at evaluation: texts attend to what survived, and MACs are compared with those of all tokens."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from reranking import rerank
from small_blip import inputs, small
from torch import Tensor

import madtp
from madtp.evaluation.compute_meter import ComputeMeter, override_dense_macs
from zoo.blip.matching import match
from zoo.blip.surviving_tokens import surviving_mask
from zoo.tasks.retrieval import Features, Matching

COUNT = 5


class Task(SimpleNamespace):
    """Five images with a text each, as `zoo.tasks.retrieval.Retrieval` gives them."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        given = inputs("retrieval", batch=COUNT)
        every = list(range(COUNT))
        super().__init__(
            given=given, ids=every, captions=every, owners=every, candidates=COUNT, device=torch.device("cpu")
        )

    def captions_of(self, samples: range) -> list[int]:
        return list(samples)

    def images(self, places: Any) -> Tensor:
        return self.given["images"][list(places)]

    def texts(self, places: list[int]) -> dict[str, Tensor]:
        return {name: self.given[name][places] for name in ("input_ids", "attention_mask")}


@pytest.fixture(scope="module")
def pruned() -> madtp.PrunedModel:
    settings = {"merge": False, "alignment_tokens": 8, "min_tokens": 2, "towers": ("image",)}
    given = inputs("retrieval", batch=COUNT)
    model = madtp.rewrite(small("retrieval"), given, config=madtp.PruningConfig.from_dict(settings))
    model.gain = 1.0
    return model


def found(model: Any, task: Any, size: int) -> tuple[list[dict[str, Any]], ComputeMeter]:
    """What both stages find, `size` images at a time, and what matching alone spends."""
    parts = [range(start, min(start + size, COUNT)) for start in range(0, COUNT, size)]
    features = [one for part in parts for one in Features(task).run(model, part, {})]
    stage, meter = Matching(task), ComputeMeter()
    stage._encode(model, range(COUNT))
    with meter.watching(model):
        return [one for part in parts for one in stage.run(model, part, {"features": features})], meter


@torch.no_grad()
def test_which_images_are_encoded_together_does_not_depend_on_what_was_done_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So a run that resumes in the middle rounds as one that does not."""
    monkeypatch.setattr("zoo.tasks.retrieval._TOGETHER", 2)
    task: Any = Task()
    task.candidates = 1
    model = small("retrieval").eval()
    features = [one for at in range(COUNT) for one in Features(task).run(model, range(at, at + 1), {})]

    def asked(samples: list[int]) -> tuple[set[tuple[int, ...]], list[dict[str, Any]]]:
        together: set[tuple[int, ...]] = set()
        own = task.images
        task.images = lambda places: together.add(tuple(places)) or own(places)
        stage = Matching(task)
        found = [one for at in samples for one in stage.run(model, range(at, at + 1), {"features": features})]
        task.images = own
        return together, found

    together, whole = asked(list(range(COUNT)))
    assert together == {(0, 1), (2, 3), (4,)}
    for at in range(COUNT):
        again, resumed = asked(list(range(at, COUNT)))
        assert again <= together
        assert resumed == whole[at:]


@torch.no_grad()
def test_what_a_batch_spends_does_not_depend_on_what_was_done_before(
    pruned: madtp.PrunedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zoo.tasks.retrieval._TOGETHER", 2)
    task: Any = Task()
    features = [one for at in range(COUNT) for one in Features(task).run(pruned, range(at, at + 1), {})]

    def spent(stage: Matching, at: int) -> list[float]:
        meter = ComputeMeter()
        with meter.watching(pruned):
            stage.run(pruned, range(at, at + 1), {"features": features})
        return [call["macs"] for call in meter.calls]

    going_on = Matching(task)
    whole = [spent(going_on, at) for at in range(COUNT)]
    assert [spent(Matching(task), at) for at in range(COUNT)] == whole
    assert [len(calls) - len(whole[1]) for calls in whole] == [1, 0, 1, 0, 1]


@pytest.mark.slow
@torch.no_grad()
def test_pairs_score_as_with_dropped_tokens_hidden(pruned: madtp.PrunedModel) -> None:
    task: Any = Task()
    whole = pruned(images=task.images(range(COUNT)))
    left, texts = surviving_mask(pruned, "visual_encoder"), task.texts(task.captions)
    assert left is not None
    assert int(left.sum(dim=1).max()) < left.shape[1]
    assert len(set(left.sum(dim=1).tolist())) > 1
    similar = whole.image_features @ pruned(**texts).text_features.T
    results, _ = found(pruned, task, 2)
    for image, result in enumerate(results):
        for text, score in result["texts"]:
            row = task.texts([text])
            own = match(pruned, whole.image_tokens[image : image + 1], **row, image_mask=left[image : image + 1])
            assert score == pytest.approx(float(similar[image, text] + own[0, 1]), abs=1e-4)
    again = rerank(pruned, similar, whole.image_tokens, **texts, image_mask=left)[0]
    for image, result in enumerate(results):
        for text, score in result["texts"]:
            assert float(again[image, text]) == pytest.approx(score, abs=1e-4)


@torch.no_grad()
def test_batches_do_not_matter(pruned: madtp.PrunedModel) -> None:
    task = Task()
    ways = [found(pruned, task, size) for size in (1, 3)]
    for one, other in zip(ways[0][0], ways[1][0], strict=True):
        assert dict(one["texts"]) == pytest.approx(dict(other["texts"]), abs=1e-4)
    assert [call["macs"] for call in ways[0][1].calls] == [call["macs"] for call in ways[1][1].calls]


@torch.no_grad()
def test_macs_are_compared_with_those_of_all_tokens(pruned: madtp.PrunedModel) -> None:
    task: Any = Task()
    _, meter = found(pruned, task, COUNT)
    texts = task.texts([0])
    tokens = small("retrieval")(images=task.images([0])).image_tokens
    expected = madtp.count_macs(small("retrieval"), {"image_tokens": tokens, **texts})
    for call in meter.calls:
        assert call["dense_macs"] == pytest.approx(expected * call["samples"])
        assert call["macs"] < call["dense_macs"]


@torch.no_grad()
def test_dense_macs_of_a_call_leave_the_record_alone(pruned: madtp.PrunedModel) -> None:
    given = inputs("retrieval", batch=COUNT)
    pruned(**given)
    before = pruned.macs()
    with ComputeMeter().watching(pruned) as meter:
        dense = pruned.dense_macs(**given)
    assert dense == pytest.approx(madtp.count_macs(small("retrieval"), given))
    assert not meter.calls
    assert pruned.macs() == before < dense
    with override_dense_macs(7.0), ComputeMeter().watching(pruned) as meter:
        pruned(**given)
    assert meter.calls[0]["dense_macs"] == 7.0 * COUNT


@torch.no_grad()
def test_a_dense_model_matches_all_tokens() -> None:
    model, task = small("retrieval"), Task()
    results, meter = found(model, task, 2)
    whole, texts = model(images=task.images(range(COUNT))), task.texts(task.captions)
    similar = whole.image_features @ model(**texts).text_features.T
    expected = rerank(model, similar, whole.image_tokens, **texts)[0]
    assert not meter.calls
    for image, result in enumerate(results):
        for text, score in result["texts"]:
            assert score == pytest.approx(float(expected[image, text]), abs=1e-4)
