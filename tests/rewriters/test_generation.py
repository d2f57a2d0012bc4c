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
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["hf:LlavaForConditionalGeneration", "hf:Gemma3ForConditionalGeneration"])
@torch.no_grad()
def test_steps_from_a_cache_give_what_one_long_call_gives(name: str) -> None:
    """Several turns, too. The window of Gemma 3 slides, and is shorter than the prompt."""
    torch.manual_seed(0)
    model, made = zoo.small.build(name)
    if hasattr(model.config.text_config, "sliding_window"):
        model.config.text_config.sliding_window = 9
        model = type(model)(model.config).eval()
    inputs = _padded_on_the_left(dict(made))
    pruned = madtp.rewrite(model, inputs, config=madtp.PruningConfig(merge=False, gain=2.0))
    output = pruned(**inputs, use_cache=True)
    cache_name = "cache" if hasattr(output, "cache") else "past_key_values"
    kept = {site: x.clone() for site, x in pruned.kept_tokens().items()}
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    length = ids.shape[1]
    for tokens in (1, 1, 3, 1):
        new = torch.randint(20, 60, (len(ids), tokens))
        ids, mask = torch.cat([ids, new], 1), torch.cat([mask, torch.ones_like(new)], 1)
        given = {cache_name: getattr(output, cache_name), "use_cache": True}
        output = pruned(input_ids=new, attention_mask=mask, **given)
        longer = {
            **{n: _longer(x, ids.shape[1]) if x.shape == inputs["input_ids"].shape else x for n, x in inputs.items()},
            "input_ids": ids,
            "attention_mask": mask,
        }
        pruned.madtp.control.forced = {
            site: _longer(x, ids.shape[1], fill=True) if x.shape[1] == length else x for site, x in kept.items()
        }
        wanted = pruned(**longer, use_cache=False)
        pruned.madtp.control.forced = None
        torch.testing.assert_close(output.logits[:, -1], wanted.logits[:, -1], atol=1e-4, rtol=1e-4)


def _longer(x: Tensor, length: int, *, fill: bool = False) -> Tensor:
    return torch.nn.functional.pad(x, (0, length - x.shape[1]), value=fill)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_beams_and_caches_of_each_kind() -> None:
    torch.manual_seed(0)
    model, made = zoo.small.build("hf:Mistral3ForConditionalGeneration")
    inputs = _padded_on_the_left(dict(made))
    with eager_arithmetic():
        pruned = madtp.rewrite(model.eval(), inputs)
        beams = {**SAID, "num_beams": 3}
        with pruned.dense():
            assert torch.equal(pruned.generate(**inputs, **beams), model.generate(**inputs, **beams))
        pruned.gain = 3.0
        said = pruned.generate(**inputs, **beams)
        for row in range(len(said)):
            assert torch.equal(pruned.generate(**_row(inputs, row), **beams)[0], said[row])
        held, dense = pruned.madtp.cache_bytes()
        assert held < dense
        assert not pruned.report.notes
        static = {**SAID, "cache_implementation": "static"}
        with pruned.dense():
            assert torch.equal(pruned.generate(**inputs, **static), model.generate(**inputs, **static))
        pruned.generate(**inputs, **static)
        assert any("memory set aside" in note for note in pruned.report.notes)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_a_cache_in_float8_holds_survivors() -> None:
    cache_utils = pytest.importorskip("transformers.cache_utils")
    if not hasattr(cache_utils, "Fp8QuantizedLayer"):
        pytest.skip("this transformers has no cache in float8")
    torch.manual_seed(0)
    model, made = zoo.small.build("hf:LlavaForConditionalGeneration")
    inputs = _padded_on_the_left(dict(made))
    float8 = {**SAID, "cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
    with eager_arithmetic():
        pruned = madtp.rewrite(model.eval(), inputs)
        for options in (float8, {**float8, "num_beams": 3}):
            with pruned.dense():
                assert torch.equal(pruned.generate(**inputs, **options), model.generate(**inputs, **options))
        pruned.gain = 3.0
        assert torch.equal(pruned.generate(**inputs, **float8), pruned.generate(**inputs, **SAID))
        pruned.generate(**inputs, **float8)
        held, dense = pruned.madtp.cache_bytes()
        assert held < dense
    assert not pruned.report.notes


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_a_cache_that_cannot_be_taken_apart_leaves_the_decoder_dense_and_is_named() -> None:
    cache_utils = pytest.importorskip("transformers.cache_utils")

    class Blocks(cache_utils.QuantizedLayer):  # type: ignore[misc, name-defined]
        """Keeps the shape beside the values, as some libraries of quantisation do."""

        def _quantize(self, tensor: Tensor, axis: int) -> tuple[Tensor, torch.Size]:
            return tensor.flatten().half(), tensor.shape

        def _dequantize(self, q_tensor: tuple[Tensor, torch.Size]) -> Tensor:
            return q_tensor[0].float().view(q_tensor[1])

    def cache() -> object:
        return cache_utils.Cache(layer_class_to_replicate=Blocks)

    torch.manual_seed(0)
    model, made = zoo.small.build("hf:LlavaForConditionalGeneration")
    inputs = _padded_on_the_left(dict(made))
    config = madtp.PruningConfig(gain=3.0, layers={"*vision*": ()})
    pruned = madtp.rewrite(model.eval(), inputs, config=config)
    with eager_arithmetic():
        said = pruned.generate(**inputs, **SAID, past_key_values=cache())
        assert torch.equal(said, model.generate(**inputs, **SAID, past_key_values=cache()))
    (note,) = pruned.report.notes
    assert "keeps an object for later calls that cannot be taken apart: Cache (it holds a Size)" in note
    assert "leave the option out" in note


@pytest.mark.slow
def test_a_decoder_layer_that_cannot_be_told_where_images_are_leaves_the_rest() -> None:
    """What reaches its second layer has been through the first, in which nothing is followed."""
    model, inputs = zoo.small.build("hf:AriaForConditionalGeneration")
    report = madtp.rewrite(model, inputs).report
    assert report.sites
    assert not any("that run unpruned" in note for note in report.notes)
