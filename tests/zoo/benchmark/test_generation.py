"""What ``madtp bench --generate`` measures, on a tiny model that generates."""

from __future__ import annotations

import inspect
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from madtp.benchmark.generation import GenerationMeasurement, GenerationResult, compare_generation
from madtp.errors import ConfigError, UnknownModelError
from zoo.benchmark import GenerationSettings, list_generators, measure_generation
from zoo.benchmark.continuing import Continuing, form_of_steps
from zoo.benchmark.generators import GeneratingModel, PromptSize, open_generator

transformers = pytest.importorskip("transformers")
NAME = "hf:LlavaForConditionalGeneration"
IMAGE_TOKENS, TEXT_TOKENS, NEW_TOKENS, BATCH = 64, (8, 24), 3, 2

open_small = partial(open_generator, NAME, 0, PromptSize(8), NEW_TOKENS)


@pytest.fixture(scope="module")
def opened() -> GeneratingModel:
    return open_small()


@pytest.fixture(scope="module")
def saved() -> list[GenerationResult]:
    settings = GenerationSettings(
        model=NAME,
        reductions=(0.3, 0.95),
        batch_sizes=(BATCH,),
        text_tokens=TEXT_TOKENS,
        new_tokens=NEW_TOKENS,
        batches=1,
        calibration_samples=2,
        rounds=2,
        warm_up=1,
    )
    results: list[GenerationResult] = []
    assert measure_generation(settings, "madtp bench", save=results.append).complete
    return results


@pytest.mark.slow
def test_dense_and_pruned_are_measured_at_each_prompt_length(saved: list[GenerationResult]) -> None:
    rows = compare_generation(saved[-1])
    assert [(row.image_tokens, row.text_tokens, row.name) for row in rows] == [
        (IMAGE_TOKENS, words, name) for words in TEXT_TOKENS for name in ("dense", "pruned −30%")
    ]
    assert all(row.prefill_ms.count == row.step_ms.count == 2 and row.batch == BATCH for row in rows)
    assert [row.macs_share for row in rows] == [1, pytest.approx(0.7, abs=0.1)] * 2


@pytest.mark.slow
def test_the_cache_of_a_pruned_model_is_smaller(saved: list[GenerationResult]) -> None:
    dense, pruned = compare_generation(saved[-1])[:2]
    assert dense.cache_bytes == 2 * 2 * 64 * (IMAGE_TOKENS + TEXT_TOKENS[0]) * BATCH * 4, (
        "keys and values of two layers"
    )
    assert dense.cache_share == 1
    assert pruned.cache_share is not None
    assert pruned.cache_share < 1


@pytest.mark.slow
def test_a_strength_that_cannot_be_reached_is_left_out_with_the_reason(saved: list[GenerationResult]) -> None:
    assert list(saved[-1].notes) == [f"pruned −95%, prompts of {IMAGE_TOKENS + words}" for words in TEXT_TOKENS]
    assert all("left out: a reduction of 95.0% cannot be reached" in note for note in saved[-1].notes.values())


@pytest.mark.slow
def test_what_was_measured_is_saved_after_every_round(saved: list[GenerationResult], tmp_path: Path) -> None:
    counted = [[len(one.step.wall_ms) for one in result.measurements] for result in saved]
    assert counted == [[1] * 2, [2] * 2, [2, 2, 1, 1], [2] * 4, [2] * 4]
    assert [result.complete for result in saved] == [False] * 4 + [True]
    saved[-1].write(tmp_path / "g.json")
    assert GenerationResult.read(tmp_path / "g.json").measurements == saved[-1].measurements


def test_the_steps_write_what_generate_writes(opened: GeneratingModel, capfd: pytest.CaptureFixture[str]) -> None:
    calls = opened.prompts(2, 2, 8)
    blank = GenerationMeasurement(
        batch=2, image_tokens=64, text_tokens=8, new_tokens=NEW_TOKENS, target="", macs=1, cache_bytes=1
    )
    words = Continuing(blank, opened.dense).generate(calls, form_of_steps(opened.dense, opened.cache_name, calls[0]), 0)
    assert "deprecated" not in "".join(capfd.readouterr())
    assert opened.cache_name in inspect.signature(opened.dense.forward).parameters
    written = opened.dense.generate(**calls[0], max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None)
    assert torch.equal(words, written[:, -NEW_TOKENS:])


def test_prompts_differ_in_their_images_and_words(opened: GeneratingModel) -> None:
    batches = [*opened.prompts(4, 2, 24), *opened.prompts(4, 2, 24, calibration=True)]
    assert all(batch["attention_mask"].all() for batch in batches)
    for name in ("input_ids", "pixel_values"):
        samples = torch.cat([batch[name] for batch in batches])
        assert len(samples.unique(dim=0)) == 8
    again = opened.prompts(4, 2, 24)
    assert all(torch.equal(again[i][name], batches[i][name]) for i in range(2) for name in again[i])


def test_image_size_and_fields_size_the_model(tmp_path: Path) -> None:
    fields = {"text_config.num_hidden_layers": 3}
    larger = open_generator(NAME, 0, PromptSize(400, 96), NEW_TOKENS, fields)
    assert larger.prompts(2, 2, 400)[0]["input_ids"].shape == (2, 144 + 400)
    assert larger.dense.config.text_config.num_hidden_layers == 3
    assert larger.dense.config.text_config.max_position_embeddings >= 144 + 400 + NEW_TOKENS
    larger.dense.config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="names no class"):
        open_generator(str(tmp_path), 0, PromptSize(8), NEW_TOKENS)
    larger.dense.config.architectures = [NAME.removeprefix("hf:")]
    larger.dense.config.save_pretrained(tmp_path)
    assert open_generator(str(tmp_path), 0, PromptSize(8), NEW_TOKENS).prompts(2, 2, 8)[0]["input_ids"].shape == (
        2,
        152,
    )


@pytest.mark.parametrize(
    ("size", "fields", "told"),
    [
        (60, {}, "not made of whole patches of 8"),
        (None, {"text_config.num_layer": 3}, "Did you mean 'text_config.num_hidden_layers'"),
        (None, {"text_config.hidden_size": 50}, "does not take"),
    ],
)
def test_a_size_that_does_not_fit_is_told(size: int | None, fields: dict[str, int], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        open_generator(NAME, 0, PromptSize(8, size), NEW_TOKENS, fields)


@pytest.mark.parametrize(
    "name", ["hf:CLIPModel", "hf:BlipForConditionalGeneration", "hf:LlamaForCausalLM", "blip_caption_mini"]
)
def test_a_model_that_does_not_generate_says_which_do(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} does not generate .* such as {NAME}.*--generate --list"):
        open_generator(name, 0, PromptSize(8), NEW_TOKENS)


def test_an_unknown_class_is_told() -> None:
    with pytest.raises(UnknownModelError, match="LlavaForConditionalGeneration"):
        open_generator("hf:LlavaForConditionalGenerator", 0, PromptSize(8), NEW_TOKENS)


@pytest.mark.parametrize(
    ("name", "value"), [("new_tokens", 1), ("text_tokens", ()), ("batch_sizes", (0,)), ("dtype", "int8")]
)
def test_settings_out_of_range_are_refused(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"{name} is .*; allowed"):
        GenerationSettings(model=NAME, **{name: value})


@pytest.mark.slow
def test_models_that_generate_are_listed() -> None:
    found = list_generators()
    assert {NAME, "hf:Qwen2VLForConditionalGeneration"} <= set(found)
    assert not {"hf:BlipForConditionalGeneration", "hf:Florence2ForConditionalGeneration", "hf:CLIPModel"} & set(found)


@pytest.mark.slow
def test_a_rule_is_measured_by_its_share() -> None:
    settings = GenerationSettings(
        model=NAME,
        pruning={"selection": "diversity", "keep_ratio": 0.5, "layers": {"*language_model*": [0], "*vision*": []}},
        reductions=(0.2,),
        batch_sizes=(BATCH,),
        text_tokens=TEXT_TOKENS[:1],
        new_tokens=2,
        batches=1,
        calibration_samples=2,
        rounds=1,
        warm_up=0,
    )
    dense, pruned = compare_generation(measure_generation(settings))
    assert dense.cache_share == 1
    assert pruned.macs_share == pytest.approx(0.8, abs=0.05)
    with pytest.raises(ConfigError, match="give keep_ratio"):
        measure_generation(replace(settings, pruning={"selection": "diversity"}))
