"""Streams that several modalities share: segments are pruned each by itself, joined streams stay pruned, heads that read every
token get them back."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import cache

import pytest
import torch
from joint_stream_models import Encoder, Fusion, Patches, Segmenter, SingleStream, Windows
from model_case import WIDTH, Tensors, lively, text
from rewritten_models import gap
from torch import Tensor, nn

import madtp
from madtp import PrunedModel, PruningConfig
from madtp.calls.call import normalise_call
from madtp.calls.copies import share
from rewriters.pipeline import rewrite_region
from rewriters.plan.plan import Plan
from rewriters.plan.request import Request


def inputs_of(model: nn.Module, batch: int = 3, length: int = 7) -> Tensors:
    images = {"pixels": torch.randn(batch, 3, 32, 32)}
    return images if isinstance(model, (Segmenter, Windows)) else {**images, **text(batch, length)}


def rewritten(build: Callable[[], nn.Module], **settings: object) -> tuple[nn.Module, PrunedModel]:
    """A model, and a copy of what becomes of it, which is rewritten once in this file for each of the settings."""
    model, pruned = _rewritten(build, **settings)
    return model, copy.deepcopy(pruned)


@cache
def _rewritten(build: Callable[[], nn.Module], **settings: object) -> tuple[nn.Module, PrunedModel]:
    torch.manual_seed(0)
    model = lively(build())
    config = PruningConfig(**{"alignment_tokens": 10, "temperature": 2.0, **settings})  # type: ignore[arg-type]
    return model, madtp.rewrite(model, inputs_of(model), config=config)


def outputs(value: Tensors | Tensor) -> list[Tensor]:
    return list(value.values()) if isinstance(value, dict) else [value]


MODELS = [SingleStream, lambda: SingleStream(True), Fusion, Segmenter, Windows]
NAMES = ["text first", "image first", "fusion", "segmenter", "windows"]


@pytest.mark.parametrize("build", MODELS, ids=NAMES)
@torch.no_grad()
def test_every_block_is_pruned_and_temperature_zero_is_the_original(build: Callable[[], nn.Module]) -> None:
    model, pruned = rewritten(build)
    assert not pruned.report.refusals
    for batch, length in ((2, 5), (3, 9)):
        inputs = inputs_of(model, batch, length)
        wanted, found = outputs(model(**inputs)), outputs(pruned(**inputs))
        assert [w.shape for w in wanted] == [f.shape for f in found]
        active = pruned.macs()
        with pruned.dense():
            found = outputs(pruned(**inputs))
            assert active < 0.9 * pruned.macs()
        for want, have in zip(wanted, found, strict=True):
            assert gap(want, have) < 1e-5


@torch.no_grad()
def test_a_sample_that_is_scored_by_some_queries_ignores_padding_of_a_text_that_is_not_pruned() -> None:
    model, pruned = rewritten(MODELS[0], towers=("image",), score_queries=3)
    inputs = inputs_of(model, 4, 12)
    mask = torch.ones_like(inputs["attention_mask"])
    mask[0, 3:] = 0
    padded = {**inputs, "attention_mask": mask}
    whole = pruned(**padded)
    alone = pruned(**{name: value[:1] for name, value in padded.items()})
    cut = pruned(pixels=inputs["pixels"][:1], input_ids=inputs["input_ids"][:1, :3], attention_mask=mask[:1, :3])
    for name in whole:
        assert gap(whole[name][:1], alone[name]) < 1e-5
        if whole[name].shape[1:] == cut[name].shape[1:]:
            assert gap(whole[name][:1], cut[name]) < 1e-5


@torch.no_grad()
def test_a_text_of_padding_alone_has_nothing_to_prune() -> None:
    model, pruned = rewritten(Fusion)
    inputs = inputs_of(model, 3, 12)
    inputs["attention_mask"][1] = 0
    whole = pruned(**inputs)
    alone = pruned(**{name: value[1:2] for name, value in inputs.items()})
    for name in whole:
        assert gap(whole[name][1:2], alone[name]) < 1e-5


@pytest.mark.parametrize("build", MODELS, ids=NAMES)
@torch.no_grad()
def test_a_sample_ignores_its_batch_mates(build: Callable[[], nn.Module]) -> None:
    model, pruned = rewritten(build)
    inputs = inputs_of(model)
    together = outputs(pruned(**inputs))
    for row in range(3):
        alone = outputs(pruned(**{n: v[row : row + 1] for n, v in inputs.items()}))
        for all_rows, one in zip(together, alone, strict=True):
            assert gap(all_rows[row : row + 1], one) < 1e-4


@pytest.mark.parametrize("image_first", [False, True])
@torch.no_grad()
def test_segments_of_a_single_stream_are_pruned_apart(image_first: bool) -> None:
    _, pruned = rewritten(MODELS[image_first], min_tokens=2, merge=False, gain=1e4)
    inputs = inputs_of(SingleStream(), 3, 9)
    pruned(**inputs)
    (stream,) = pruned.report.streams
    assert stream.segments == (("image", "text") if image_first else ("text", "image"))
    image_start, text_start = (0, 17) if image_first else (9, 0)
    for kept in pruned.kept_tokens().values():
        image, words = kept[:, image_start : image_start + 17], kept[:, text_start : text_start + 9]
        # Two tokens of each segment, and the class token and the first word, which are read.
        assert bool(image[:, 0].all())
        assert bool(words[:, 0].all())
        assert image.sum(1).tolist() == [3, 3, 3]
        assert words.sum(1).tolist() == [3, 3, 3]
        assert not bool((words & ~inputs["attention_mask"].bool()).any())


@torch.no_grad()
def test_towers_select_segments() -> None:
    _, pruned = rewritten(SingleStream, towers=("image",))
    inputs = inputs_of(SingleStream(), 3, 9)
    pruned(**inputs)
    for kept in pruned.kept_tokens().values():
        assert bool(kept[:, :9].all())
        assert not bool(kept[:, 9:].all())
    wanted = outputs(pruned(**inputs))
    padded = {n: nn.functional.pad(v, (0, 3)) if n != "pixels" else v for n, v in inputs.items()}
    found = outputs(pruned(**padded))
    for want, have in zip(wanted[:2], found[:2], strict=True):
        assert gap(want, have) < 1e-4


def test_a_single_stream_has_an_alignment_loss() -> None:
    _, pruned = rewritten(SingleStream)
    pruned.train()
    pruned(**inputs_of(SingleStream()))
    loss = pruned.alignment_loss()
    loss.backward()
    assert pruned.get_parameter("madtp.alignment.tokens").grad is not None
    assert 0 < loss.item() < 2


@torch.no_grad()
def test_counts_are_frozen_by_segment() -> None:
    _, pruned = rewritten(SingleStream)
    counts = madtp.freeze(pruned, [inputs_of(SingleStream(), 3, 9) for _ in range(2)])
    assert {name.partition("[")[2] for name in counts} == {"image]", "text]"}
    pruned(**inputs_of(SingleStream(), 2, 9))
    for site in pruned.report.sites:
        expected = counts[f"{site.name}[image]"] + counts[f"{site.name}[text]"]
        kept = pruned.kept_tokens()[site.name]
        # Two protected tokens; a text with fewer valid tokens than the count keeps what it has.
        assert bool((kept.sum(1) <= expected + 2).all())


def test_a_plan_with_segments_goes_through_json() -> None:
    model = lively(SingleStream())
    plan = rewrite_region(Request(share(model), normalise_call(model, (), inputs_of(model)), PruningConfig())).plan
    assert plan.sites[0].segments
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


@torch.no_grad()
def test_tokens_that_enter_a_joined_stream_stay_pruned() -> None:
    model, pruned = rewritten(Fusion, merge=False)
    pruned(**inputs_of(model))
    kept = pruned.kept_tokens()
    image, words = kept["image_encoder.blocks.1"], kept["text_encoder.blocks.1"]
    before = torch.cat([image, words], 1)
    assert bool((kept["fusion.blocks.0"] <= before).all())


class Concatenated(nn.Module):
    """Returns its tokens behind a copy of the first one."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.encoder = Patches(), Encoder(2)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.encoder(self.image(pixels))
        return torch.cat([x[:, :1] * 2, x], 1)


@torch.no_grad()
def test_a_concatenation_that_only_an_output_reads_is_restored() -> None:
    torch.manual_seed(0)
    model = lively(Concatenated())
    pixels = torch.randn(2, 3, 32, 32)
    pruned = madtp.rewrite(model, (pixels,))
    assert len(pruned.report.sites) == 2
    assert pruned(pixels).shape == (2, 18, WIDTH)
    with pruned.dense():
        assert gap(model(pixels), pruned(pixels)) < 1e-5
