"""CLIP: equal to transformers' model, key names, published MACs, formats of its files, rewriting."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_clip import SMALL, inputs, small
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import madtp
import zoo
from madtp.errors import CheckpointError, ConfigError, DataError
from zoo.clip.config import MINI, VIT_B16, VIT_L14_336, TowerConfig
from zoo.clip.model import Clip


class VisionOnly(Clip):
    """A model that TorchScript can trace, as it returns a tensor; its archive holds the whole model all the same."""

    def forward(self, images: Tensor) -> Tensor:  # type: ignore[override]
        return self.visual(images)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_loaded(model: nn.Module, expected: dict[str, Tensor]) -> None:
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())


@pytest.fixture(scope="module")
def theirs() -> Any:
    transformers = pytest.importorskip("transformers")
    tower = {"num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        vision_config={**tower, "hidden_size": 24, "intermediate_size": 96, "image_size": 32, "patch_size": 8},
        text_config={
            **tower,
            "hidden_size": 16,
            "intermediate_size": 64,
            "vocab_size": 40,
            "max_position_embeddings": 12,
            "eos_token_id": 39,
            "bos_token_id": 38,
        },
        projection_dim=12,
    )
    torch.manual_seed(1)
    return transformers.CLIPModel(config).eval()


@torch.no_grad()
def test_outputs_equal_those_of_transformers(theirs: Any, tmp_path: Path) -> None:
    theirs.save_pretrained(tmp_path)
    model, given = small(), inputs()
    report = zoo.load_checkpoint(model, tmp_path)
    assert (report.format, report.absent, report.unused) == ("transformers", (), ())
    out, expected = model(**given), theirs(pixel_values=given["images"], input_ids=given["input_ids"])
    torch.testing.assert_close(out.image_features, expected.image_embeds, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(out.text_features, expected.text_embeds, atol=1e-5, rtol=1e-4)
    cosines = out.scale * out.image_features @ out.text_features.T
    torch.testing.assert_close(cosines, expected.logits_per_image, atol=1e-4, rtol=1e-4)


def test_key_names_are_those_of_openai() -> None:
    kinds = ("weight", "bias")
    block = {"attn.in_proj_weight", "attn.in_proj_bias"}
    block |= {
        f"{name}.{kind}" for name in ("attn.out_proj", "ln_1", "mlp.c_fc", "mlp.c_proj", "ln_2") for kind in kinds
    }
    expected = {f"{tower}transformer.resblocks.{i}.{n}" for tower in ("", "visual.") for i in range(2) for n in block}
    expected |= {f"visual.{name}" for name in ("class_embedding", "positional_embedding", "proj", "conv1.weight")}
    expected |= {f"{name}.{kind}" for name in ("visual.ln_pre", "visual.ln_post", "ln_final") for kind in kinds}
    expected |= {"token_embedding.weight", "positional_embedding", "text_projection", "logit_scale"}
    assert small().state_dict().keys() == expected


@pytest.mark.parametrize("archive", [False, True], ids=["state dict", "TorchScript"])
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")
def test_published_files(tmp_path: Path, archive: bool) -> None:
    """OpenAI publishes half precision, with three sizes beside the weights."""
    model = small(5)
    expected = {key: value.half().float() for key, value in weights(model).items()}
    sizes = {"input_resolution": 32, "context_length": 12, "vocab_size": 40}
    path = tmp_path / "ViT-B-16.pt"
    if archive:
        for name, value in sizes.items():
            model.register_buffer(name, torch.tensor(value))
        model.__class__ = VisionOnly
        with torch.no_grad():
            torch.jit.save(torch.jit.trace(model.half(), inputs()["images"].half()), path)
    else:
        torch.save(
            {k: v.half() for k, v in weights(model).items()} | {n: torch.tensor(v) for n, v in sizes.items()}, path
        )
    loaded = small()
    report = zoo.load_checkpoint(loaded, path)
    assert_loaded(loaded, expected)
    assert report.format == "OpenAI"
    assert sizes.keys() <= set(report.unused)


def test_file_of_the_authors_code(tmp_path: Path) -> None:
    own = weights(small(5))
    more = {f"visual_m.{key.partition('.')[2]}": value for key, value in own.items() if key.startswith("visual.")}
    more |= {"transformer_m.resblocks.0.ln_1.bias": torch.zeros(16), "token_embedding_m.weight": torch.zeros(40, 16)}
    more |= {"ln_final_m.bias": torch.zeros(16), "text_projection_m": torch.zeros(16, 12)}
    more |= {"positional_embedding_m": torch.zeros(12, 16), "image_queue": torch.zeros(12, 8)}
    more |= {"space_dict": torch.zeros(100, 24)}
    more |= {"transformer.resblocks.0.query_model.q_map.0.weight": torch.zeros(24, 16)}
    torch.save({"model": own | more, "temperature": 1.5}, tmp_path / "checkpoint_04.pth")
    model = small()
    report = zoo.load_checkpoint(model, tmp_path / "checkpoint_04.pth")
    assert_loaded(model, own)
    assert (report.format, set(report.unused)) == ("MADTP", more.keys())


def test_images_of_another_size(tmp_path: Path) -> None:
    torch.save(weights(small(5)), tmp_path / "small.pt")
    larger = small(config=replace(SMALL, image_size=48))
    assert zoo.load_checkpoint(larger, tmp_path / "small.pt").resized == ("visual.positional_embedding",)


def test_wrong_files_are_refused(tmp_path: Path) -> None:
    own = weights(small())
    torch.save(own | {"visual.layer1.0.conv1.weight": torch.zeros(1)}, tmp_path / "resnet.pt")
    with pytest.raises(CheckpointError, match=r"not a checkpoint of this Clip: .*1 unexpected \(visual\.layer1"):
        zoo.load_checkpoint(small(), tmp_path / "resnet.pt")
    torch.save(weights(small(config=replace(SMALL, positions=11))), tmp_path / "short.pt")
    with pytest.raises(CheckpointError, match=r"positional_embedding is \[11, 16\] in the file and \[12, 16\]"):
        zoo.load_checkpoint(small(), tmp_path / "short.pt")


def counted(model: nn.Module, **given: Tensor) -> float:
    """Multiply-accumulates as the field counts them (fvcore): products, and five for each value that a LayerNorm sees."""
    normed: list[int] = []
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_hook(lambda _module, args, _output: normed.append(args[0].numel()))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**given)
    return counter.get_total_flops() / 2 + 5 * sum(normed)


def test_dense_macs_equal_the_published_figures() -> None:
    """191.1 G an image of 336, 6.66 G a text of 77 tokens; 395.7 G with the momentum copies of training."""
    with torch.device("meta"):
        model = Clip(VIT_L14_336).eval()
    vision = counted(model.visual, images=torch.empty(1, 3, 336, 336, device="meta"))
    both = counted(
        model,
        images=torch.empty(1, 3, 336, 336, device="meta"),
        input_ids=torch.zeros(1, 77, dtype=torch.long, device="meta"),
    )
    assert vision / 1e9 == pytest.approx(191.1, abs=5e-2)
    assert (both - vision) / 1e9 == pytest.approx(6.66, abs=5e-3)
    assert 2 * both / 1e9 == pytest.approx(395.7, abs=0.2)


def test_sizes_of_the_registered_models() -> None:
    for name, config in (("clip_vit_b16", VIT_B16), ("clip_vit_l14_336", VIT_L14_336), ("clip_mini", MINI)):
        with torch.device("meta"):
            model: Any = zoo.describe(name).builder()
        assert model.config == config
        assert zoo.describe(name).input_size == (3, config.image_size, config.image_size)
    assert VIT_L14_336.image_tokens == 577
    mini = zoo.create("clip_mini")
    with torch.no_grad():
        assert mini(**zoo.example_inputs(mini)).image_features.shape == (2, 64)


def test_rewriting_prunes_both_towers() -> None:
    model, given = small(), inputs()
    pruned = madtp.rewrite(model, given, config=madtp.PruningConfig(alignment_tokens=5, temperature=4.0))
    assert pruned.report.capture == "whole"
    assert sorted(site.modality for site in pruned.report.sites) == ["image"] * 2 + ["text"] * 2
    assert pruned.report.refusals == []
    with torch.no_grad():
        with pruned.dense():
            for own, expected in zip(pruned(**given), model(**given), strict=True):
                torch.testing.assert_close(own, expected)
            dense = pruned.macs()
        out = pruned(**given)
        assert pruned.macs() < 0.9 * dense
        torch.testing.assert_close(pruned(images=given["images"]).image_features, out.image_features)
        assert {name.split(".")[0] for name in pruned.token_counts()} == {"visual"}
        torch.testing.assert_close(pruned(input_ids=given["input_ids"]).text_features, out.text_features)


@torch.no_grad()
def test_what_follows_the_end_does_not_matter() -> None:
    model, given = small(), inputs()
    ids = given["input_ids"].clone()
    ids[1, 6:] = 7
    torch.testing.assert_close(model(input_ids=ids).text_features, model(**given).text_features)
    cut = model(input_ids=given["input_ids"][1:2, :6]).text_features
    torch.testing.assert_close(cut, model(**given).text_features[1:2])


def test_impossible_calls_and_sizes_are_refused() -> None:
    with pytest.raises(DataError, match="pass images, input_ids or both"):
        small()()
    with pytest.raises(DataError, match="The text is 13 tokens long and the model has 12 positions"):
        small()(input_ids=torch.zeros(1, 13, dtype=torch.long))
    with pytest.raises(ConfigError, match="width a multiple of the heads"):
        TowerConfig(10, 2, 3)
    with pytest.raises(ConfigError, match="image_size 33 is not a multiple"):
        replace(SMALL, image_size=33)
    with pytest.raises(ConfigError, match="at least 1"):
        replace(SMALL, embedding=0)


def test_every_parameter_gets_a_gradient() -> None:
    model = small().train()
    sum(value.square().sum() + value.sum() for value in model(**inputs())).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
