"""BLIP for retrieval, captions and questions: equal to transformers' models, published MACs, key names, rewriting."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small_blip as tasks
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import madtp
import zoo
from madtp.errors import ConfigError, DataError
from zoo.blip.config import BLIP_BASE, VQA_BASE, BlipConfig, TextConfig
from zoo.blip.losses import answer_loss, next_token_losses

TASKS = sorted(tasks.TASKS)


@pytest.fixture(scope="module", params=TASKS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Any]:
    """The task, our model and transformers', with the same weights by way of the latter's file."""
    pytest.importorskip("transformers")
    task = request.param
    config = tasks.SMALL
    if task == "vqa":  # there, transformers has one width for all sources
        vision = tasks.VisionConfig(image_size=32, patch_size=8, width=16, depth=2, heads=2, mlp_width=48)
        config = replace(config, vision=vision)
    theirs = tasks.transformers_model(task, config)
    folder = tmp_path_factory.mktemp(task)
    theirs.save_pretrained(folder)
    ours = tasks.small(task, config)
    report = zoo.load_checkpoint(ours, folder)
    assert report.format == "transformers"
    return task, ours, theirs


@torch.no_grad()
def test_outputs_equal_those_of_transformers(pair: tuple[str, Any, Any]) -> None:
    task, ours, theirs = pair
    given = tasks.inputs(task)
    out = ours(**given)
    text = {"input_ids": given["input_ids"], "attention_mask": given["attention_mask"]}
    if task == "caption":
        expected = theirs(pixel_values=given["images"], **text)
        torch.testing.assert_close(out.logits, expected.logits, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(out.image_tokens, expected.last_hidden_state, atol=1e-4, rtol=1e-4)
    elif task == "retrieval":
        marked = text["input_ids"].clone()
        marked[:, 0] = tasks.ENCODE
        matched = theirs(pixel_values=given["images"], **{**text, "input_ids": marked})
        torch.testing.assert_close(out.match_logits, matched.itm_score, atol=1e-4, rtol=1e-4)
        compared = theirs(pixel_values=given["images"], use_itm_head=False, **text)
        cosines = out.image_features @ out.text_features.T
        torch.testing.assert_close(cosines, compared.itm_score, atol=1e-4, rtol=1e-4)
    else:
        image = theirs.vision_model(pixel_values=given["images"])[0]
        states = theirs.text_encoder(**text, encoder_hidden_states=image)[0]
        torch.testing.assert_close(out.question_states, states, atol=1e-4, rtol=1e-4)
        answers = {"input_ids": given["answer_ids"], "attention_mask": given["answer_mask"]}
        expected = theirs.text_decoder(**answers, encoder_hidden_states=states).logits
        # transformers 5.23 drops the question's mask on its way to the cross-attention, so padding is left out here.
        unmasked = ours.text_decoder(**answers, source=states)
        torch.testing.assert_close(unmasked, expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(out.logits[[0, 2]], expected[[0, 2]], atol=1e-4, rtol=1e-4)


@functools.cache
def rewritten(task: str) -> tuple[nn.Module, dict[str, Tensor], madtp.PrunedModel]:
    """A model of the task, a batch, and the rewritten model, to which no test gives another state."""
    model, given = tasks.small(task), tasks.inputs(task)
    config = madtp.PruningConfig(alignment_tokens=5, temperature=4.0)
    return model, given, madtp.rewrite(model, given, config=config)


@pytest.mark.parametrize("task", TASKS)
def test_rewriting_prunes_the_towers_that_the_paper_prunes(task: str) -> None:
    model, given, pruned = rewritten(task)
    assert pruned.report.capture == "whole"
    modalities = {site.modality for site in pruned.report.sites}
    assert modalities == ({"image"} if task == "caption" else {"image", "text"})
    assert all(refusal.block.startswith("text_decoder") for refusal in pruned.report.refusals)
    with torch.no_grad():
        with pruned.dense():
            for own, expected in zip(pruned(**given), model(**given), strict=True):
                assert own is expected is None or torch.equal(own, expected)
            dense = pruned.macs()
        pruned(**given)
    assert pruned.macs() < 0.9 * dense


def test_pruned_retrieval_encodes_and_matches_apart() -> None:
    _, given, pruned = rewritten("retrieval")
    text = {"input_ids": given["input_ids"], "attention_mask": given["attention_mask"]}
    with torch.no_grad():
        whole, images = pruned(**given), pruned(images=given["images"])
        assert set(pruned.token_counts()) == {"visual_encoder.blocks.0", "visual_encoder.blocks.1"}
        torch.testing.assert_close(images.image_features, whole.image_features)
        torch.testing.assert_close(pruned(**text).text_features, whole.text_features)
        matched = pruned(image_tokens=images.image_tokens, **text)
        assert matched.image_features is None
        assert matched.match_logits.shape == (3, 2)
        assert set(pruned.token_counts()) == {f"text_encoder.encoder.layer.{i}.attention" for i in range(2)}


def test_pruned_vqa_takes_several_answers_a_question() -> None:
    model, given, pruned = rewritten("vqa")
    ids, mask = tasks.texts(5, 4, tasks.BEGIN)
    further = {**given, "answer_ids": ids, "answer_mask": mask, "owners": torch.tensor([0, 0, 1, 2, 2])}
    with torch.no_grad():
        with pruned.dense():
            assert torch.equal(pruned(**further).logits, model(**further).logits)
        together = pruned(**further).logits
        alone = pruned(**{**given, "answer_ids": ids[[1, 2, 4]], "answer_mask": mask[[1, 2, 4]]}).logits
    torch.testing.assert_close(together[[1, 2, 4]], alone)


@torch.no_grad()
def test_retrieval_calls_agree() -> None:
    model, given = tasks.small("retrieval"), tasks.inputs("retrieval")
    text = {"input_ids": given["input_ids"], "attention_mask": given["attention_mask"]}
    whole, images = model(**given), model(images=given["images"])
    assert images.text_features is images.match_logits is None
    torch.testing.assert_close(model(**text).text_features, whole.text_features)
    matched = model(image_tokens=images.image_tokens, **text)
    torch.testing.assert_close(matched.match_logits, whole.match_logits)
    assert matched.text_features is None
    for wrong in ({}, {"image_tokens": images.image_tokens}, {**given, "image_tokens": images.image_tokens}):
        with pytest.raises(DataError, match="pass images, or input_ids"):
            model(**wrong)


@pytest.mark.parametrize("task", TASKS)
def test_padding_does_not_matter(task: str) -> None:
    model, given = tasks.small(task), tasks.inputs(task)
    changed = {**given, "input_ids": given["input_ids"].masked_fill(given["attention_mask"] == 0, 9)}
    with torch.no_grad():
        for name, own in model(**given)._asdict().items():
            other = getattr(model(**changed), name)
            if name in ("logits", "question_states") and task != "vqa":
                own, other = own[given["attention_mask"] == 1], other[given["attention_mask"] == 1]
            if name != "question_states":
                torch.testing.assert_close(own, other)


def counted(model: nn.Module, **given: Tensor) -> float:
    """Multiply-accumulates as the field counts them (fvcore): products, and five for each value that a LayerNorm sees."""
    normed = []
    hooks = [
        module.register_forward_hook(lambda _module, args, _output: normed.append(args[0].numel()))
        for module in model.modules()
        if isinstance(module, nn.LayerNorm)
    ]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**given)
    for hook in hooks:
        hook.remove()
    return counter.get_total_flops() / 2 + 5 * sum(normed)


def meta(task: str, config: BlipConfig) -> nn.Module:
    with torch.device("meta"):
        return tasks.TASKS[task](config).eval()


def on_meta(batch: int, length: int) -> dict[str, Tensor]:
    ids = torch.zeros(batch, length, dtype=torch.long, device="meta")
    return {"input_ids": ids, "attention_mask": ids}


def test_dense_macs_of_captions_equal_the_published_figure() -> None:
    """65.7 G: an image of 384 (55.539) and 15 tokens (10.181)."""
    model = meta("caption", BLIP_BASE)
    images = torch.empty(1, 3, 384, 384, device="meta")
    vision, whole = counted(model, images=images), counted(model, images=images, **on_meta(1, 15))
    assert vision / 1e9 == pytest.approx(55.539, abs=5e-4)
    assert (whole - vision) / 1e9 == pytest.approx(10.181, abs=5e-4)


def test_dense_macs_of_questions_equal_the_published_figures() -> None:
    """107.17 G: an image of 480, a question of 13 tokens, an answer of 5.

    The 186.1 G that the authors print are of an image with 32 questions of 14 tokens and 47 answers to one of them, the
    keys of the image and of that question counted once.
    """
    model = meta("vqa", VQA_BASE)
    images = torch.empty(1, 3, 480, 480, device="meta")
    answer = {f"answer_{name.partition('_')[2]}": value for name, value in on_meta(1, 5).items()}
    assert counted(model, images=images, **on_meta(1, 13), **answer) / 1e9 == pytest.approx(107.17, abs=5e-3)
    single = counted(model, images=images, **on_meta(1, 14), **answer)
    vision = counted(model.visual_encoder, x=images)
    question = counted(model, images=images, **on_meta(1, 14)) - vision
    keys_of = 2 * 12 * 768 * 768  # of one source token, in all layers
    questions = 32 * question - 31 * 901 * keys_of
    answers = 47 * (single - vision - question) - 46 * 14 * keys_of
    assert (vision + questions + answers) / 1e9 == pytest.approx(186.1, abs=5e-2)


def test_dense_macs_of_retrieval_equal_the_published_figure() -> None:
    """153.2 G: a training step, with two passes of both towers apart and three of matching (35 tokens); 70.6 G: a pair."""
    model = meta("retrieval", BLIP_BASE)
    images, text = torch.empty(1, 3, 384, 384, device="meta"), on_meta(1, 35)
    vision, alone = counted(model, images=images), counted(model, **text)
    tokens = torch.empty(1, 577, 768, device="meta")
    matching = counted(model, image_tokens=tokens, **text)
    assert counted(model, images=images, **text) / 1e9 == pytest.approx(70.6, abs=5e-2)
    assert (2 * vision + 2 * alone + 3 * matching) / 1e9 == pytest.approx(153.2, abs=5e-2)


def test_key_names_are_the_published_ones() -> None:
    heads = [f"{part}.{kind}" for part in ("query", "key", "value") for kind in ("weight", "bias")]
    layer = {f"{place}.self.{part}" for place in ("attention", "crossattention") for part in heads}
    modules = [f"{place}.output.{part}" for place in ("attention", "crossattention") for part in ("dense", "LayerNorm")]
    modules += ["intermediate.dense", "output.dense", "output.LayerNorm"]
    layer |= {f"{name}.{kind}" for name in modules for kind in ("weight", "bias")}
    bert = {f"encoder.layer.{index}.{name}" for index in range(2) for name in layer}
    bert |= {f"embeddings.{name}.weight" for name in ("word_embeddings", "position_embeddings", "LayerNorm")}
    bert |= {"embeddings.LayerNorm.bias"}
    predictions = {"bias", "decoder.weight", "decoder.bias"}
    predictions |= {f"transform.{name}.{kind}" for name in ("dense", "LayerNorm") for kind in ("weight", "bias")}
    encoder = {f"text_encoder.{name}" for name in bert}
    decoder = {f"text_decoder.bert.{name}" for name in bert} | {
        f"text_decoder.cls.predictions.{n}" for n in predictions
    }
    heads = {f"{name}.{kind}" for name in ("vision_proj", "text_proj", "itm_head") for kind in ("weight", "bias")}
    expected = {"retrieval": encoder | heads | {"temp"}, "caption": decoder, "vqa": encoder | decoder}
    for task, names in expected.items():
        keys = tasks.small(task).state_dict().keys()
        assert {key for key in keys if not key.startswith("visual_encoder.")} == names


def test_sizes_of_the_registered_models() -> None:
    sizes = {"blip_retrieval": 384, "blip_caption": 384, "blip_vqa": 480}
    for name, side in sizes.items():
        assert zoo.describe(name).input_size == zoo.describe(f"{name}_large").input_size == (3, side, side)
        with torch.device("meta"):
            base, large = zoo.describe(name).builder(), zoo.describe(f"{name}_large").builder()
        assert base.visual_encoder.pos_embed.shape == (1, (side // 16) ** 2 + 1, 768)
        assert large.visual_encoder.pos_embed.shape == (1, (side // 16) ** 2 + 1, 1024)
        mini = zoo.create(f"{name}_mini")
        given = zoo.example_inputs(mini)
        with torch.no_grad():
            assert mini(**given) is not None


def test_ids_outside_the_vocabulary_are_refused() -> None:
    with pytest.raises(ConfigError, match="encode_id 30523 lies outside the vocabulary of 10"):
        BlipConfig(text=TextConfig(vocabulary=10))


def test_losses_of_captions_are_those_of_what_is_predicted() -> None:
    torch.manual_seed(0)
    ids, mask = tasks.texts(2, 6, tasks.BEGIN)
    logits = torch.randn(2, 6, tasks.SMALL.text.vocabulary)
    targets = ids.clone()
    targets[mask == 0] = -100
    targets[:, :2] = -100
    expected = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten(), label_smoothing=0.1)
    losses, predicted = next_token_losses(logits, ids, mask, prompt=2, smoothing=0.1)
    torch.testing.assert_close(losses.sum() / predicted.sum(), expected)


def test_answer_loss_weighs_answers() -> None:
    torch.manual_seed(0)
    ids, mask = tasks.texts(3, 4, tasks.BEGIN)
    logits, weights = torch.randn(3, 4, tasks.SMALL.text.vocabulary), torch.tensor([0.5, 0.5, 1.0])
    each = [answer_loss(logits[i, None], ids[i, None], mask[i, None], torch.ones(1), 1) for i in range(3)]
    expected = (0.5 * each[0] + 0.5 * each[1] + each[2]) / 2
    torch.testing.assert_close(answer_loss(logits, ids, mask, weights, questions=2), expected)


@pytest.mark.parametrize("task", TASKS)
def test_every_parameter_gets_a_gradient(task: str) -> None:
    model = tasks.small(task).train()
    out = model(**tasks.inputs(task))
    sum(value.square().sum() for value in out if value is not None).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_saving_and_loading_a_pruned_captioner(tmp_path: Path) -> None:
    """Its word embeddings are tied, which safetensors cannot store twice."""
    model, given = tasks.small("caption"), tasks.inputs("caption")
    pruned = madtp.rewrite(model, given, config=madtp.PruningConfig(alignment_tokens=5, temperature=4.0))
    madtp.save(pruned, tmp_path)
    loaded = madtp.load(tmp_path, tasks.small("caption", seed=1), example_inputs=given)
    with torch.no_grad():
        assert torch.equal(loaded(**given).logits, pruned(**given).logits)
