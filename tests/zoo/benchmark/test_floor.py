"""The floor: its layers are those of the model on the same tokens, packed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_blip import SMALL
from torch import Tensor, nn

import madtp
from madtp.errors import ConfigError, DataError
from zoo.benchmark.floor import floor_of
from zoo.benchmark.packed_reasoning import PackedReasoning, embed_words, run_layer
from zoo.benchmark.packed_rows import attend, kept_by_block
from zoo.benchmark.packed_vision import PackedVisionTower, run_block
from zoo.blip.config import NlvrConfig
from zoo.blip.nlvr import BlipNlvr
from zoo.blip.text import key_mask


def vit(**more: Any) -> Any:
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2, "num_classes": 5}
    return VisionTransformer(**{**sizes, **more}).eval()


def reasoning() -> BlipNlvr:
    torch.manual_seed(0)
    model = BlipNlvr(NlvrConfig(vision=SMALL.vision, text=SMALL.text)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model


def pairs(batch: int) -> dict[str, Tensor]:
    ids = torch.randint(1, 40, (batch, 7))
    mask = torch.ones_like(ids)
    ids[1:2, -2:], mask[1:2, -2:] = 0, 0
    return {"images": torch.randn(batch, 2, 3, 32, 32), "input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("more", [{}, {"init_values": 0.5, "qk_norm": True}, {"class_token": True, "reg_tokens": 2}])
def test_without_pruning_it_is_the_vision_transformer(batch: int, more: dict[str, Any]) -> None:
    model, images = vit(**more), torch.randn(batch, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(floor_of(model)({"x": images}, {}), model(images))


@pytest.mark.parametrize("batch", [1, 3])
def test_without_pruning_it_is_the_reasoning_model(batch: int) -> None:
    model, given = reasoning(), pairs(batch)
    with torch.no_grad():
        torch.testing.assert_close(floor_of(model)(given, {}), model(**given))


@pytest.mark.parametrize("init_values", [None, 0.5])
def test_each_block_is_that_of_the_tower_on_the_same_tokens(init_values: float | None) -> None:
    block = vit(init_values=init_values).blocks[0]
    samples = [torch.randn(n, 24) for n in (9, 4, 7)]
    with torch.no_grad():
        whole = run_block(block, torch.cat(samples), (9, 4, 7), (9, 4, 7))
        for found, sample in zip(whole.split((9, 4, 7)), samples, strict=True):
            torch.testing.assert_close(found, block(sample[None])[0])
        # Attention reads all tokens of the sample, the feed-forward runs on the survivors.
        pruned = run_block(block, samples[0], (9,), (5,))
        torch.testing.assert_close(pruned, block(samples[0][None])[0, :5])


def test_each_layer_is_that_of_the_text_encoder_on_the_same_tokens() -> None:
    model: Any = reasoning()
    layer, width = model.text_encoder.encoder.layer[1], SMALL.vision.width
    lengths, seen = (6, 4), ((9, 5), (3, 8))
    texts = [torch.randn(n, SMALL.text.width) for n in lengths]
    images = [[torch.randn(n, width) for n in counts] for counts in seen]
    sources = [(torch.cat(rows), counts) for rows, counts in zip(images, seen, strict=True)]
    with torch.no_grad():
        found = run_layer(layer, torch.cat(texts), lengths, lengths, sources).split(lengths)
        for number, text in enumerate(texts):
            mask = key_mask(torch.ones(1, len(text)))
            expected = layer(text[None], mask, images[0][number][None], images[1][number][None])
            torch.testing.assert_close(found[number], expected[0])
        alone = [(images[side][0], (seen[side][0],)) for side in (0, 1)]
        cut = run_layer(layer, texts[0], (6,), (2,), alone)
        expected = layer(texts[0][None], key_mask(torch.ones(1, 6)), *(rows[None] for rows, _ in alone))
        torch.testing.assert_close(cut, expected[0, :2])


def test_embedded_words_leave_out_padding() -> None:
    model, given = reasoning(), pairs(2)
    with torch.no_grad():
        rows, lengths = embed_words(model.text_encoder.embeddings, given["input_ids"], given["attention_mask"])
        dense = model.text_encoder.embeddings(given["input_ids"])
    assert lengths == (7, 5)
    torch.testing.assert_close(rows, torch.cat([dense[0], dense[1, :5]]))


def test_it_takes_the_counts_of_a_pruned_model() -> None:
    model, given = reasoning(), pairs(3)
    pruned = madtp.rewrite(model, given).eval()
    with torch.no_grad():
        pruned(**given)
        counts = {site: kept.tolist() for site, kept in pruned.token_counts().items()}
        packed = PackedReasoning(model)
        rows, lengths = packed.vision.embed(given["images"].transpose(0, 1).flatten(0, 1))
        kept = kept_by_block(counts, "visual_encoder.blocks.", 2, lengths)
        assert [list(lengths) for lengths in kept] == [counts[f"visual_encoder.blocks.{n}"] for n in (0, 1)]
        left, lengths = packed.vision.blocks(rows, lengths, kept)
        assert len(left) == sum(lengths) == sum(kept[-1]) < len(rows)
        assert floor_of(model)(given, counts).shape == (3, 2)


def test_counts_are_found_by_block_and_padding_is_no_row() -> None:
    counts = {"a.layer.1.attention": [4, 9], "a.layer.10": [1, 1], "b": [0]}
    assert kept_by_block(counts, "a.layer.", 3, (5, 6)) == [(5, 6), (4, 6), (4, 6)]
    with pytest.raises(DataError, match=r"the site b\.0 counted 1 samples, and the batch has 2"):
        kept_by_block({"b.0": [3]}, "b.", 1, (5, 6))


def test_samples_of_one_length_are_one_batch() -> None:
    queries, keys = torch.randn(6, 2, 4), torch.randn(10, 2, 4)
    together = attend(queries, keys, keys, (3, 3), (5, 5))
    apart = [attend(queries[3 * i : 3 * i + 3], *[keys[5 * i : 5 * i + 5]] * 2, (3,), (5,)) for i in (0, 1)]
    torch.testing.assert_close(together, torch.cat(apart))


def test_other_models_have_no_floor() -> None:
    with pytest.raises(ConfigError, match="the floor of Linear is not known"):
        floor_of(nn.Linear(1, 1))
    with pytest.raises(ConfigError, match="knows no pooling by 'avg'"):
        floor_of(vit(global_pool="avg"))
    with pytest.raises(ConfigError, match="no plain VisionTransformer"):
        PackedVisionTower(nn.Linear(1, 1))
