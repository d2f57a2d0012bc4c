"""Vision-language models of transformers that generate: prompts are read with image tokens pruned inside the decoder."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rewritten_models import eager_arithmetic
from torch import Tensor

import madtp
import zoo.small

pytest.importorskip("transformers")

# A text into which the tower's features are written in the graph; one that is handed embeddings, with rotary positions of three
# axes and patches of all images in one row; and one whose prompt is seen in both directions.
MODELS = (
    "hf:LlavaForConditionalGeneration",
    "hf:Qwen2VLForConditionalGeneration",
    "hf:PaliGemmaForConditionalGeneration",
)
SAID: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}


def _padded_on_the_left(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The last sample's padding in front, as generation wants it."""
    short = int((inputs["attention_mask"][-1] == 0).sum())
    moved = {}
    for name, x in inputs.items():
        moved[name] = x
        if x.shape == inputs["input_ids"].shape:
            moved[name] = torch.cat([x[:-1], x[-1:].roll(short, 1)])
    return moved


def _row(inputs: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    samples = len(inputs["input_ids"])
    return {name: x.unflatten(0, (samples, -1))[row] for name, x in inputs.items()}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_generation_from_pruned_prompts(name: str) -> None:
    torch.manual_seed(0)
    model, made = zoo.small.build(name)
    model.eval()
    inputs = _padded_on_the_left(dict(made))
    with eager_arithmetic():
        pruned = madtp.rewrite(model, inputs)
        wanted = model.generate(**inputs, **SAID)
        with pruned.dense():
            assert torch.equal(pruned.generate(**inputs, **SAID), wanted)
            assert torch.equal(pruned.generate(**_row(inputs, 1), **SAID), model.generate(**_row(inputs, 1), **SAID))
        pruned.gain = 4.0
        said = pruned.generate(**inputs, **SAID)
        kept = {site: x for site, x in pruned.kept_tokens().items() if "language_model" in site}
        assert len(kept) == 2
        places = inputs["input_ids"] == model.config.image_token_id
        for alive in kept.values():
            assert bool((alive | places)[inputs["attention_mask"] > 0].all()), "text stays"
            assert int((alive & places).sum()) < int(places.sum())
        for row in range(len(said)):
            assert torch.equal(pruned.generate(**_row(inputs, row), **SAID)[0], said[row])
    assert not pruned.report.notes


@pytest.mark.slow
def test_a_decoder_layer_that_cannot_be_told_where_images_are_leaves_the_rest() -> None:
    """What reaches its second layer has been through the first, in which nothing is followed."""
    model, inputs = zoo.small.build("hf:AriaForConditionalGeneration")
    report = madtp.rewrite(model, inputs).report
    assert report.sites
    assert not any("that run unpruned" in note for note in report.notes)
