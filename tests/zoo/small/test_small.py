"""Small models of real classes: fields shrink by name, names are matched, and what is built runs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import zoo.small
from madtp.errors import UnknownModelError
from zoo.small.hf import small_fields
from zoo.small.shrink import sections, shrink
from zoo.small.timm import arguments

LARGE = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 11008,
    "layer_types": ["sliding", *["other"] * 30, "full"],
    "vocab_size": 32000,
    "pad_token_id": 0,
    "image_token_id": 31999,
    "name": "large",
    "tie_word_embeddings": False,
    "vision": {"image_size": 336, "patch_size": 14, "image_token_id": 31999, "end_token_id": 31998},
}


def test_sizes_shrink_and_what_belongs_together_stays_together() -> None:
    small = shrink(LARGE)
    assert small["hidden_size"] == small["num_attention_heads"] * small["head_dim"]
    assert small["num_attention_heads"] % small["num_key_value_heads"] == 0
    assert small["num_key_value_heads"] < small["num_attention_heads"]
    assert small["vision"]["image_size"] % small["vision"]["patch_size"] == 0
    assert small["layer_types"] == ["sliding", "full"]
    assert len(small["layer_types"]) == small["num_hidden_layers"]


def test_special_tokens_move_into_the_vocabulary_and_equal_ones_stay_equal() -> None:
    small = shrink(LARGE)
    assert small["image_token_id"] == small["vision"]["image_token_id"] < small["vocab_size"]
    assert small["vision"]["end_token_id"] not in (small["image_token_id"], small["pad_token_id"])
    assert small["pad_token_id"] == 0


def test_other_fields_and_small_sizes_are_left_alone() -> None:
    assert shrink({"name": "large", "tie_word_embeddings": False, "hidden_size": 16, "dropout": 0.1}) == {
        "name": "large",
        "tie_word_embeddings": False,
        "hidden_size": 16,
        "dropout": 0.1,
    }


def test_stages_double_in_width_and_heads() -> None:
    small = shrink({"hidden_sizes": [64, 128, 320, 512], "num_attention_heads": [1, 2, 5, 8], "depths": [3, 4, 18, 3]})
    widths = [w // h for w, h in zip(small["hidden_sizes"], small["num_attention_heads"], strict=True)]
    assert widths == [16] * 4
    assert small["depths"] == [2, 2, 2, 2]


def test_a_backbone_has_a_layer_for_each_feature_that_is_read() -> None:
    fields = {"num_hidden_layers": 12, "out_features": [f"stage{n}" for n in (3, 6, 9, 12)], "stage_names": ["stem"]}
    small = shrink(fields)
    assert small["num_hidden_layers"] == 4
    assert small["out_features"] == ["stage1", "stage2", "stage3", "stage4"]
    assert "stage_names" not in small


def test_the_layers_that_are_kept_are_of_two_types_where_there_are_two() -> None:
    fields = {
        "num_hidden_layers": 6,
        "layer_types": ["sliding"] * 3 + ["full"] + ["sliding"] * 2,
        "intermediate_size": [512, 512, 512, 96, 512, 512],
        "num_kv_shared_layers": 3,
        "global_attn_indexes": [2, 5],
    }
    small = shrink(fields)
    assert small["layer_types"] == ["sliding", "full"]
    assert small["intermediate_size"] == [128, 96]
    assert small["num_kv_shared_layers"] == 0
    assert small["global_attn_indexes"] == [1]


@pytest.mark.parametrize(("share", "frequencies"), [(1.0, [4, 2, 2]), (0.5, [2, 1, 1])])
def test_rotary_sections_share_out_all_frequencies_of_a_head(share: float, frequencies: list[int]) -> None:
    fields = {"head_dim": 16, "rope_parameters": {"rope_type": "default", "partial_rotary_factor": share}}
    assert sections(fields) == frequencies
    assert sum(sections({})) == 8


def test_fields_of_a_class_hold_where_it_is_nested() -> None:
    transformers = pytest.importorskip("transformers")
    fields = small_fields(transformers.Qwen2VLConfig)
    assert fields["text_config"]["rope_parameters"]["mrope_section"] == [4, 2, 2]
    nested = small_fields(transformers.GroundingDinoConfig)["backbone_config"]
    assert nested["window_size"] == small_fields(transformers.SwinConfig)["window_size"]


def test_names_match_with_and_without_their_library() -> None:
    assert zoo.small.names(["hf:CLIPModel"]) == zoo.small.names(["CLIPModel"]) == ["hf:CLIPModel"]
    everything = zoo.small.names()
    assert len(everything) == len(set(everything)) > 250
    assert {name.partition(":")[0] for name in everything} == {"hf", "timm", "open_clip"}


def test_what_an_installed_library_has_needs_no_entry_in_the_catalogue() -> None:
    name = "timm:vit_small_patch16_384"
    assert name not in zoo.small.names()
    assert zoo.small.names([name, "timm:test_vit", name]) == ["timm:test_vit", name]
    with pytest.raises(UnknownModelError):
        zoo.small.names(["timm:vit_small_patch16_38"])
    with pytest.raises(UnknownModelError):
        zoo.small.names(["vit_small_patch16_384"])


def test_unknown_names_list_near_ones() -> None:
    with pytest.raises(UnknownModelError, match="hf:CLIPModel"):
        zoo.small.names(["hf:CLIPModell"])
    with pytest.raises(UnknownModelError, match="not the name of a small architecture"):
        zoo.small.build_model("CLIPModel")


def test_the_first_pattern_decides_how_an_image_model_shrinks() -> None:
    assert arguments("test_vit") == {}
    assert arguments("deit_tiny_patch16_224")["depth"] == 2
    assert arguments("swin_tiny_patch4_window7_224")["window_size"] == 4
    assert arguments("resnet18") == {}


@pytest.mark.parametrize(
    "name",
    [
        "timm:deit_tiny_patch16_224",
        "timm:eva02_tiny_patch14_224",
        "timm:swin_tiny_patch4_window7_224",
        "timm:cait_xxs24_224",
    ],
)
@torch.no_grad()
def test_small_image_models_run(name: str) -> None:
    _runs(name)


@pytest.mark.parametrize("name", zoo.small.names(["open_clip:ViT-B-32", "open_clip:roberta*", "open_clip:coca_ViT*"]))
@torch.no_grad()
def test_small_contrastive_models_run(name: str) -> None:
    pytest.importorskip("open_clip")
    pytest.importorskip("transformers")
    _runs(name)


# One for each way of making inputs.
FAMILIES = """CLIPModel SiglipModel Siglip2Model BlipForImageTextRetrieval Blip2ForConditionalGeneration ViltModel LxmertModel
VisualBertModel FlavaModel BridgeTowerModel GitForCausalLM LlavaForConditionalGeneration LlavaNextForConditionalGeneration
Qwen2VLForConditionalGeneration PaliGemmaForConditionalGeneration IdeficsForVisionText2Text Idefics3ForConditionalGeneration
SmolVLMForConditionalGeneration MllamaForConditionalGeneration Kosmos2Model XCLIPModel LayoutLMv3Model
Pix2StructForConditionalGeneration FuyuForCausalLM VisionEncoderDecoderModel BertForMultipleChoice T5Model
BrosModel VivitModel VideoPrismVisionModel XLNetModel LevitModel
ColPaliForRetrieval ColQwen2ForRetrieval Gemma4ForConditionalGeneration Gemma4UnifiedForConditionalGeneration
Granite4VisionForConditionalGeneration GraniteDoclingForConditionalGeneration Inkling2ForConditionalGeneration
InstructBlipVideoForConditionalGeneration Molmo2ForConditionalGeneration PaddleOCRVLForConditionalGeneration
VideoLlama3ForConditionalGeneration PI0ForConditionalGeneration SegGptModel
DeepseekVLHybridForConditionalGeneration PeVideoEncoder T5Gemma2ForConditionalGeneration RTDetrForObjectDetection
Sam2Model""".split()


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_small_models_of_every_family_run(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, name):
        pytest.skip("this release has no such class")
    _runs(f"hf:{name}")


def _runs(name: str) -> None:
    """The model takes its example inputs, is small, and tells samples and padding apart."""
    model, inputs = zoo.small.build(name)
    assert not model.training
    assert sum(p.numel() for p in model.parameters()) < 4e6
    model(**inputs)
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor) and "input_ids" in inputs and mask.dim() == 2 and mask.shape[1] > 8:
        assert mask[0].all()
        assert not mask[-1].all()


@pytest.mark.parametrize("name", ["Qwen2_5_VL", "Qwen2_5OmniThinker", "Exaone4_5_", "MuseGlimmer"])
@torch.no_grad()
def test_towers_with_windows_have_several_beside_blocks_that_see_the_whole_image(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    name += "ForConditionalGeneration"
    if not hasattr(transformers, name):
        pytest.skip(f"this release has no {name}")
    model, inputs = zoo.small.build(f"hf:{name}")
    lengths: list[int] = []
    original = torch.nn.functional.scaled_dot_product_attention

    def observed(query: Tensor, key: Tensor, *args: object, **kwargs: object) -> Tensor:
        lengths.append(key.size(2))
        return original(query, key, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", observed)
    model(**inputs)
    image = [36, 12, 12, 4]
    assert lengths[:18] == 2 * image + [64, 64] + 2 * image
