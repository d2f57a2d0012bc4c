"""The BLIP-NLVR model: golden outputs of the official code, key names, MACs, export, dropout, padding."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from project_paths import DATA
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import zoo
from madtp.errors import ConfigError, DataError
from zoo.blip.config import BASE, MINI, NlvrConfig, TextConfig, VisionConfig
from zoo.blip.nlvr import BlipNlvr
from zoo.blip.text import key_mask
from zoo.blip.twin import MergedTwinOutput

GOLDEN = DATA / "golden"
GOLDEN_CONFIG = NlvrConfig(
    vision=VisionConfig(image_size=32, patch_size=4, width=64, depth=4, heads=4, mlp_width=128),
    text=TextConfig(vocabulary=120, positions=32, width=64, depth=4, heads=4, mlp_width=128),
)
TINY = NlvrConfig(
    vision=VisionConfig(image_size=16, patch_size=4, width=12, depth=2, heads=2, mlp_width=16),
    text=TextConfig(vocabulary=20, positions=9, width=8, depth=2, heads=2, mlp_width=16, merge_from_layer=1),
)


def tiny_model(dropout: float = 0.0) -> BlipNlvr:
    torch.manual_seed(3)
    return BlipNlvr(replace(TINY, text=replace(TINY.text, dropout=dropout))).eval()


def tiny_inputs(batch: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    ids = torch.randint(1, TINY.text.vocabulary, (batch, length))
    return torch.randn(batch, 2, 3, 16, 16), ids, torch.ones(batch, length, dtype=torch.long)


@pytest.fixture(scope="module")
def cases() -> dict[str, Tensor]:
    return load_file(GOLDEN / "cases.safetensors")


@pytest.fixture(scope="module")
def golden_model() -> BlipNlvr:
    model = BlipNlvr(GOLDEN_CONFIG).eval()
    model.visual_encoder.load_state_dict(load_file(GOLDEN / "weights_vit.safetensors"))
    model.text_encoder.load_state_dict(load_file(GOLDEN / "weights_nlvr.safetensors"))
    return model


@pytest.mark.parametrize("batch", [1, 4])
@torch.no_grad()
def test_outputs_equal_the_official_code(golden_model: BlipNlvr, cases: dict[str, Tensor], batch: int) -> None:
    images = cases["in/images"].unflatten(0, (2, 4)).transpose(0, 1)[:batch]
    first, second = golden_model.encode_images(images)
    vision = torch.cat([first, second])
    mask = key_mask(cases["in/attention_mask"][:batch])
    text = golden_model.text_encoder(cases["in/ids"][:batch].long(), mask, first, second)
    ours = {"out_vit": vision, "out_cls_vit": vision[:, 0], "out_text": text, "out_cls_text": text[:, 0]}
    compared = {name for name in ours if f"nlvr/B{batch}/T0/{name}" in cases}
    assert {"out_cls_vit", "out_cls_text"} <= compared
    for name in compared:
        torch.testing.assert_close(ours[name], cases[f"nlvr/B{batch}/T0/{name}"], atol=1e-4, rtol=0)


def meta_base() -> BlipNlvr:
    with torch.device("meta"):
        return BlipNlvr(BASE).eval()


def test_base_key_names_are_the_published_ones() -> None:
    keys = meta_base().state_dict().keys()
    linear = [f"{part}.{kind}" for part in ("query", "key", "value") for kind in ("weight", "bias")]
    layer = {
        f"{name}.{part}"
        for name in ("attention.self", "crossattention.self0", "crossattention.self1")
        for part in linear
    }
    both = [
        "attention.output.dense",
        "attention.output.LayerNorm",
        "crossattention.output.dense0",
        "crossattention.output.dense1",
        "crossattention.output.LayerNorm",
        "intermediate.dense",
        "output.dense",
        "output.LayerNorm",
    ]
    layer |= {f"{name}.{kind}" for name in both for kind in ("weight", "bias")}
    merge = {f"crossattention.output.merge_layer.{kind}" for kind in ("weight", "bias")}
    expected = {"text_encoder.embeddings.word_embeddings.weight", "text_encoder.embeddings.position_embeddings.weight"}
    expected |= {f"text_encoder.embeddings.LayerNorm.{kind}" for kind in ("weight", "bias")}
    for index in range(12):
        names = layer | merge if index >= 6 else layer
        expected |= {f"text_encoder.encoder.layer.{index}.{name}" for name in names}
        block = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
        expected |= {f"visual_encoder.blocks.{index}.{name}.{kind}" for name in block for kind in ("weight", "bias")}
    expected |= {"visual_encoder.cls_token", "visual_encoder.pos_embed"}
    modules = ("visual_encoder.patch_embed.proj", "visual_encoder.norm", "cls_head.0", "cls_head.2")
    expected |= {f"{name}.{kind}" for name in modules for kind in ("weight", "bias")}
    assert keys == expected


def test_base_shapes() -> None:
    shapes = {key: tuple(value.shape) for key, value in meta_base().state_dict().items()}
    assert shapes["visual_encoder.pos_embed"] == (1, 577, 768)
    assert shapes["visual_encoder.blocks.0.attn.qkv.weight"] == (2304, 768)
    assert shapes["text_encoder.embeddings.word_embeddings.weight"] == (30524, 768)
    assert shapes["text_encoder.embeddings.position_embeddings.weight"] == (512, 768)
    assert shapes["text_encoder.encoder.layer.6.crossattention.output.merge_layer.weight"] == (768, 1536)
    assert shapes["cls_head.2.weight"] == (2, 768)


def test_dense_macs_of_base_equal_the_published_figure() -> None:
    """132.54 G for two 384 images and 36 text tokens, one multiply-accumulate counted once.

    The published figure comes from fvcore, which besides convolutions and matrix products (projections and both
    attention products) counts five operations for each element that a LayerNorm sees. torch's counter leaves
    LayerNorm out, so these are added: matrix products alone are 132.42 G.
    """
    model = meta_base()
    normed = {"visual_encoder": 0, "text_encoder": 0}
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm):
            tower = name.partition(".")[0]
            module.register_forward_hook(
                lambda _module, args, _output, tower=tower: normed.update({tower: normed[tower] + args[0].numel()})
            )
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(
            torch.empty(1, 2, 3, 384, 384, device="meta"),
            torch.zeros(1, 36, dtype=torch.long, device="meta"),
            torch.ones(1, 36, dtype=torch.long, device="meta"),
        )
    products = {name: sum(ops.values()) / 2 for name, ops in counter.get_flop_counts().items()}
    assert products["Global"] == 132_424_816_128
    vision = (products["BlipNlvr.visual_encoder"] + 5 * normed["visual_encoder"]) / 1e9
    text = (products["BlipNlvr.text_encoder"] + 5 * normed["text_encoder"]) / 1e9
    assert vision == pytest.approx(111.078, abs=5e-4)
    assert text == pytest.approx(21.462, abs=5e-4)
    assert vision + text + products["BlipNlvr.cls_head"] / 1e9 == pytest.approx(132.54, abs=5e-3)


def test_mini_has_the_sizes_of_its_entry() -> None:
    model = zoo.create("blip_nlvr_mini")
    assert isinstance(model, BlipNlvr)
    assert zoo.describe("blip_nlvr_mini").input_size == (3, MINI.vision.image_size, MINI.vision.image_size)
    assert model.config.vision.tokens == 145
    assert 2e6 < sum(parameter.numel() for parameter in model.parameters()) < 3e6


def test_twin_outputs_merge_from_the_configured_layer() -> None:
    layers = tiny_model().text_encoder.encoder.layer
    assert [isinstance(layer.crossattention.output, MergedTwinOutput) for layer in layers] == [False, True]


@torch.no_grad()
def test_forward_is_encode_then_classify() -> None:
    model, (images, ids, mask) = tiny_model(), tiny_inputs(3, 5)
    first, second = model.encode_images(images)
    assert first.shape == second.shape == (3, 17, 12)
    assert torch.equal(model(images, ids, mask), model.classify(ids, mask, first, second))
    torch.testing.assert_close(first, model.visual_encoder(images[:, 0]))
    torch.testing.assert_close(second, model.visual_encoder(images[:, 1]))


@torch.no_grad()
def test_one_pair_can_answer_several_statements() -> None:
    model, (images, _, _) = tiny_model(), tiny_inputs(2, 5)
    _, ids, mask = tiny_inputs(6, 5)
    first, second = (tokens.repeat_interleave(3, dim=0) for tokens in model.encode_images(images))
    torch.testing.assert_close(
        model.classify(ids, mask, first, second), model(images.repeat_interleave(3, dim=0), ids, mask)
    )


@given(length=st.integers(1, 6), padding=st.integers(0, 3), filler=st.integers(0, 19), seed=st.integers(0, 99))
@torch.no_grad()
def test_padding_and_batch_mates_do_not_matter(length: int, padding: int, filler: int, seed: int) -> None:
    torch.manual_seed(seed)
    model, (images, ids, mask) = tiny_model(), tiny_inputs(2, length)
    padded_ids = torch.cat([ids, torch.full((2, padding), filler)], dim=1)
    padded_mask = torch.cat([mask, torch.zeros(2, padding, dtype=torch.long)], dim=1)
    together = model(images, padded_ids, padded_mask)
    alone = torch.cat([model(images[i : i + 1], ids[i : i + 1], mask[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(together, alone)


@torch.no_grad()
def test_order_of_the_images_matters() -> None:
    model, (images, ids, mask) = tiny_model(), tiny_inputs(2, 5)
    assert not torch.allclose(model(images, ids, mask), model(images.flip(1), ids, mask), atol=1e-6)


@torch.no_grad()
def test_dropout_acts_in_training_only() -> None:
    model, inputs = tiny_model(dropout=0.5), tiny_inputs(2, 5)
    assert torch.equal(model(*inputs), model(*inputs))
    model.train()
    assert not torch.equal(model(*inputs), model(*inputs))


def test_every_parameter_gets_a_gradient() -> None:
    model, inputs = tiny_model().train(), tiny_inputs(2, 5)
    model(*inputs).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_text_longer_than_the_positions_is_refused() -> None:
    with pytest.raises(DataError, match="text is 10 tokens long and the model has 9 positions"):
        tiny_model()(*tiny_inputs(2, 10))


@torch.no_grad()
def test_exports_with_dynamic_batch_and_text_length() -> None:
    model = tiny_model()
    batch, length = torch.export.Dim("batch", min=2), torch.export.Dim("length", min=2, max=TINY.text.positions)
    shapes = ({0: batch}, {0: batch, 1: length}, {0: batch, 1: length})
    exported = torch.export.export(model, tiny_inputs(3, 5), dynamic_shapes=shapes, strict=False).module()
    for size in ((2, 2), (5, 9)):
        inputs = tiny_inputs(*size)
        assert torch.equal(exported(*inputs), model(*inputs))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (lambda: VisionConfig(image_size=65, patch_size=8), "image_size 65 is not a multiple"),
        (lambda: VisionConfig(width=10, heads=3), "vision.width 10 is not a multiple of vision.heads 3"),
        (lambda: VisionConfig(drop_path=1.0), "vision.drop_path is 1.0"),
        (lambda: TextConfig(width=10, heads=3), "text.width 10 is not a multiple of text.heads 3"),
        (lambda: TextConfig(depth=0), "text.depth is 0"),
        (lambda: TextConfig(dropout=-0.1), "text.dropout is -0.1"),
        (lambda: TextConfig(vocabulary=5, pad_id=5), "text.pad_id 5 lies outside"),
    ],
)
def test_impossible_sizes_are_refused(sizes: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sizes()
