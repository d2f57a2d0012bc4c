"""Small models of every kind that has to be rewritten without help, with what an independent oracle must know about them.

Start at :data:`CASES`. A :class:`Case` builds a model and its inputs and states by hand, from reading the model's own code, what the
rewriter has to find out: which attention reads which tokens, where residual values can be observed, which tokens are protected.
`oracle.py` uses these statements; nothing here asks the rewriter. Hugging Face models skip where transformers is missing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

VOCABULARY = 99
END = 98
PIXELS = 16
PATCH = 8
WIDTH = 16


@dataclass(frozen=True)
class Keys:
    """Keys of the attention in modules whose path matches `pattern`: tokens of `stream`.

    The pattern's group is the layer; tokens dropped in earlier layers are gone. Without a group all layers of the stream
    lie before. `part` is the half of the stream's batch that is read; the first `skip` tokens are not.
    """

    pattern: str
    stream: str
    part: int | None = None
    skip: int = 0


@dataclass(frozen=True)
class Case:
    """One model.

    Attributes:
        inputs: keyword arguments for a batch size and a text length; rows end in different amounts of padding.
        keys: of all attention modules. layers: self-attention layers by stream.
        residual: path of the module whose input or output ("path:input") is the residual value at the site of a layer.
        final: path of the module whose output is the stream's last token values; `norm` of it maps the residual to them.
        protected: positions [B, N] that must survive, by stream.
        full: output leaves that hold a token for each position, and their stream.
        repool: computes leaves anew that pool tokens, from all tokens and the final survivors.
        alone: leaves that couple samples by design (a similarity matrix); they are compared on the diagonal.
        exact: attention keeps its spelling, so equality is bit for bit. sequence_first: tokens are [N, B, C] inside.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int, int], dict[str, Tensor]]
    keys: tuple[Keys, ...]
    layers: dict[str, int]
    residual: dict[str, str]
    final: dict[str, str]
    norm: dict[str, str | None]
    protected: Callable[[dict[str, Tensor]], dict[str, Tensor]]
    full: dict[str, str] = field(default_factory=dict)
    repool: Callable[[nn.Module, dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]], dict[str, Tensor]] | None = None
    alone: tuple[str, ...] = ()
    exact: bool = True
    sequence_first: bool = False
    images: int = 1

    @property
    def text(self) -> bool:
        """Whether the model reads text."""
        return "text" in self.layers

    def valid(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Which tokens are not padding [B, N], by stream."""
        found = {}
        for stream, where in self.protected(inputs).items():
            mask = text_mask(inputs) if stream == "text" else None
            found[stream] = torch.ones_like(where) if mask is None else mask
        return found


def text_mask(inputs: dict[str, Tensor]) -> Tensor | None:
    """True at text tokens [B, T]."""
    return inputs["attention_mask"].bool() if "attention_mask" in inputs else None


def images(batch: int, *lead: int) -> Tensor:
    """Random pixels [B, *lead, 3, PIXELS, PIXELS]."""
    return torch.randn(batch, *lead, 3, PIXELS, PIXELS)


def text(batch: int, length: int) -> dict[str, Tensor]:
    """Ids and mask [B, T]: row i ends in i % 3 padding tokens; END closes each text."""
    lengths = torch.tensor([max(3, length - i % 3) for i in range(batch)])
    mask = torch.arange(length) < lengths[:, None]
    ids = torch.randint(4, END, (batch, length))
    ids[torch.arange(batch), lengths - 1] = END
    return {"input_ids": ids.masked_fill(~mask, 0), "attention_mask": mask.long()}


def marks(batch: int, length: int, *positions: int) -> Tensor:
    """[B, N] bool, True at the given positions."""
    found = torch.zeros(batch, length, dtype=torch.bool)
    for position in positions:
        found[:, position] = True
    return found


# ---- timm


def vit(**options: Any) -> nn.Module:
    """A small timm VisionTransformer; weights large enough that tokens differ."""
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(
        img_size=32, patch_size=PATCH, embed_dim=WIDTH, depth=3, num_heads=2, mlp_ratio=2, num_classes=5, **options
    )
    return lively(model)


def lively(model: nn.Module) -> nn.Module:
    """The model with weights so large that every token matters to the outputs, in eval mode."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                fan = parameter[0].numel() if "embed" not in name and "token" not in name else 1
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * (1.5 / fan**0.5))
            elif parameter.dim() == 1 and "norm" not in name.lower():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def _vit_pool(first: int) -> Callable[..., dict[str, Tensor]]:
    def repool(
        model: nn.Module, inputs: dict[str, Tensor], tokens: dict[str, Tensor], kept: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        use = kept["image"].clone()
        use[:, :first] = False
        weight = use[:, :, None].float()
        mean = (tokens["image"] * weight).sum(1) / weight.sum(1)
        return {"": model.head(model.fc_norm(mean))}  # type: ignore[operator]

    return repool


def _vit_case(name: str, prefix: int, pool: str = "token", **options: Any) -> Case:
    return Case(
        name=name,
        build=lambda: vit(global_pool=pool, **options),
        inputs=lambda batch, length: {"x": torch.randn(batch, 3, 32, 32)},
        keys=(Keys(r"^blocks\.(\d+)\.attn", "image"), Keys(r"^attn_pool", "image", skip=prefix)),
        layers={"image": 3},
        residual={"image": "blocks.{}.norm2:input"},
        final={"image": "norm"},
        norm={"image": "norm"},
        protected=lambda inputs: {"image": marks(len(inputs["x"]), 16 + prefix, *range(prefix))},
        repool=_vit_pool(prefix) if pool == "avg" else None,
    )


# ---- transformers


def _towers(**text_options: Any) -> dict[str, Any]:
    text_config = {
        "hidden_size": WIDTH,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 20,
        "projection_dim": WIDTH,
        "bos_token_id": 1,
        "eos_token_id": END,
        "pad_token_id": 0,
        "encoder_hidden_size": WIDTH,
        "sep_token_id": 3,
        "attention_dropout": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "hidden_dropout_prob": 0.1,
        **text_options,
    }
    vision_config = {
        "hidden_size": WIDTH,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": PATCH,
        "attention_dropout": 0.1,
    }
    return {"text_config": text_config, "vision_config": vision_config, "projection_dim": WIDTH}


def _hf(model: str, config: str, spelling: str, **options: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    settings = getattr(transformers, config)(**_towers(**options))
    return lively(getattr(transformers, model)._from_config(settings, attn_implementation=spelling))


def _hf_inputs(batch: int, length: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(batch, 3, 32, 32), **text(batch, length)}


def _clip_protected(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    batch = len(inputs["input_ids"])
    return {"image": marks(batch, 17, 0), "text": inputs["input_ids"] == END}


def _clip(name: str, spelling: str, **options: Any) -> Case:
    return Case(
        name=name,
        build=lambda: _hf("CLIPModel", "CLIPConfig", spelling, **options),
        inputs=_hf_inputs,
        keys=(
            Keys(r"^vision_model\.encoder\.layers\.(\d+)\.self_attn", "image"),
            Keys(r"^text_model\.encoder\.layers\.(\d+)\.self_attn", "text"),
        ),
        layers={"image": 3, "text": 3},
        residual={
            "image": "vision_model.encoder.layers.{}.layer_norm2:input",
            "text": "text_model.encoder.layers.{}.layer_norm2:input",
        },
        final={"image": "vision_model.encoder.layers.2", "text": "text_model.final_layer_norm"},
        norm={"image": None, "text": "text_model.final_layer_norm"},
        protected=_clip_protected,
        full={"vision_model_output.last_hidden_state": "image", "text_model_output.last_hidden_state": "text"},
        alone=("logits_per_image", "logits_per_text"),
        exact=spelling == "sdpa",
    )


def _siglip_protected(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    batch, length = inputs["input_ids"].shape
    return {"image": marks(batch, 16), "text": marks(batch, length, -1)}


def _siglip(name: str, spelling: str) -> Case:
    return Case(
        name=name,
        build=lambda: _hf("SiglipModel", "SiglipConfig", spelling),
        inputs=_hf_inputs,
        keys=(
            Keys(r"^vision_model\.encoder\.layers\.(\d+)\.self_attn", "image"),
            Keys(r"^vision_model\.head\.attention", "image"),
            Keys(r"^text_model\.encoder\.layers\.(\d+)\.self_attn", "text"),
        ),
        layers={"image": 3, "text": 3},
        residual={
            "image": "vision_model.encoder.layers.{}.layer_norm2:input",
            "text": "text_model.encoder.layers.{}.layer_norm2:input",
        },
        final={"image": "vision_model.post_layernorm", "text": "text_model.final_layer_norm"},
        norm={"image": "vision_model.post_layernorm", "text": "text_model.final_layer_norm"},
        protected=_siglip_protected,
        full={"vision_model_output.last_hidden_state": "image", "text_model_output.last_hidden_state": "text"},
        alone=("logits_per_image", "logits_per_text"),
        exact=spelling == "sdpa",
    )


def _first_tokens(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    batch, length = inputs["input_ids"].shape
    return {"image": marks(batch, 17, 0), "text": marks(batch, length, 0)}


def _blip(name: str) -> Case:
    return Case(
        name=name,
        build=lambda: _hf("BlipForImageTextRetrieval", "BlipConfig", "eager"),
        inputs=_hf_inputs,
        keys=(
            Keys(r"^vision_model\.encoder\.layers\.(\d+)\.self_attn", "image"),
            Keys(r"^text_encoder\.encoder\.layer\.(\d+)\.attention", "text"),
            Keys(r"^text_encoder\.encoder\.layer\.\d+\.crossattention", "image"),
        ),
        layers={"image": 3, "text": 3},
        residual={
            "image": "vision_model.encoder.layers.{}.layer_norm2:input",
            "text": "text_encoder.encoder.layer.{}.attention.output.LayerNorm:output",
        },
        final={"image": "vision_model.post_layernorm", "text": "text_encoder.encoder.layer.2.output"},
        norm={"image": "vision_model.post_layernorm", "text": None},
        protected=_first_tokens,
        full={"last_hidden_state": "image", "question_embeds": "text"},
        exact=False,
    )


# ---- the zoo


def _nlvr() -> nn.Module:
    from zoo.blip.config import NlvrConfig, TextConfig, VisionConfig
    from zoo.blip.nlvr import BlipNlvr

    config = NlvrConfig(
        vision=VisionConfig(image_size=PIXELS, patch_size=4, width=24, depth=3, heads=2, mlp_width=32),
        text=TextConfig(
            vocabulary=VOCABULARY, positions=20, width=WIDTH, depth=3, heads=2, mlp_width=32, merge_from_layer=1
        ),
    )
    return lively(BlipNlvr(config))


def _nlvr_protected(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    batch, length = inputs["input_ids"].shape
    return {"image": marks(2 * batch, 17, 0), "text": marks(batch, length, 0)}


NLVR = Case(
    name="blip_nlvr",
    build=_nlvr,
    inputs=lambda batch, length: {"images": images(batch, 2), **text(batch, length)},
    keys=(
        Keys(r"^visual_encoder\.blocks\.(\d+)\.attn", "image"),
        Keys(r"^text_encoder\.encoder\.layer\.(\d+)\.attention", "text"),
        Keys(r"^text_encoder\.encoder\.layer\.\d+\.crossattention\.self0", "image", 0),
        Keys(r"^text_encoder\.encoder\.layer\.\d+\.crossattention\.self1", "image", 1),
    ),
    layers={"image": 3, "text": 3},
    residual={
        "image": "visual_encoder.blocks.{}.norm2:input",
        "text": "text_encoder.encoder.layer.{}.attention.output:output",
    },
    final={"image": "visual_encoder", "text": "text_encoder"},
    norm={"image": "visual_encoder.norm", "text": None},
    protected=_nlvr_protected,
    images=2,
)


# ---- torch.nn.TransformerEncoder


class Tower(nn.Module):
    """A TransformerEncoder that runs batch first or sequence first; tokens [B, N, C] in and out."""

    def __init__(self, batch_first: bool, norm_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, 0.1, batch_first=batch_first, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        x = x if self.batch_first else x.transpose(0, 1)
        x = self.encoder(x, src_key_padding_mask=padding)
        return x if self.batch_first else x.transpose(0, 1)


class TwoTowers(nn.Module):
    """Image and text side by side; returns both features and their cosine for each sample."""

    def __init__(self, batch_first: bool, norm_first: bool, mean: bool) -> None:
        super().__init__()
        self.mean = mean
        self.patches = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.class_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.image_positions = nn.Parameter(torch.zeros(1, 17, WIDTH))
        self.image = Tower(batch_first, norm_first)
        self.words = nn.Embedding(VOCABULARY, WIDTH)
        self.text_positions = nn.Parameter(torch.zeros(20, WIDTH))
        self.text = Tower(batch_first, norm_first)

    def forward(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        x = self.patches(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], 1) + self.image_positions
        image = self.image(x)[:, 0]
        padding = attention_mask == 0
        words = self.words(input_ids) + self.text_positions[: input_ids.shape[1]]
        return self.compare(image, self.text(words, padding), attention_mask)

    def compare(self, image: Tensor, words: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        weight = attention_mask[:, :, None].to(words.dtype)
        said = (words * weight).sum(1) / weight.sum(1) if self.mean else words[:, 0]
        return {"image": image, "text": said, "score": nn.functional.cosine_similarity(image, said)}


def _repool_words(
    model: nn.Module, inputs: dict[str, Tensor], tokens: dict[str, Tensor], kept: dict[str, Tensor]
) -> dict[str, Tensor]:
    return model.compare(tokens["image"][:, 0], tokens["text"], inputs["attention_mask"])  # type: ignore[operator]


def _tower_case(name: str, batch_first: bool, norm_first: bool, mean: bool) -> Case:
    def protected(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        batch, length = inputs["input_ids"].shape
        return {"image": marks(batch, 17, 0), "text": marks(batch, length, *(() if mean else (0,)))}

    place = "{}.encoder.layers.[].norm2:input" if norm_first else "{}.encoder.layers.[].norm1:output"
    return Case(
        name=name,
        build=lambda: lively(TwoTowers(batch_first, norm_first, mean)),
        inputs=lambda batch, length: {"pixels": torch.randn(batch, 3, 32, 32), **text(batch, length)},
        keys=(
            Keys(r"^image\.encoder\.layers\.(\d+)\.self_attn", "image"),
            Keys(r"^text\.encoder\.layers\.(\d+)\.self_attn", "text"),
        ),
        layers={"image": 3, "text": 3},
        residual={s: place.format(s).replace("[]", "{}") for s in ("image", "text")},
        final={s: f"{s}.encoder" for s in ("image", "text")},
        norm={"image": None, "text": None},
        protected=protected,
        repool=_repool_words if mean else None,
        sequence_first=not batch_first,
    )


CASES: dict[str, Case] = {
    case.name: case
    for case in (
        _vit_case("vit", 1),
        _vit_case("vit_registers", 3, reg_tokens=2, init_values=0.5),
        _vit_case("vit_mean", 1, pool="avg"),
        _vit_case("vit_mean_no_class", 0, pool="avg", class_token=False),
        _vit_case("vit_attention_pool", 1, pool="map"),
        _clip("clip_sdpa", "sdpa"),
        _clip("clip_eager", "eager", eos_token_id=2),
        _siglip("siglip_sdpa", "sdpa"),
        _siglip("siglip_eager", "eager"),
        _blip("blip_itm"),
        NLVR,
        _tower_case("towers_batch_first_post", True, False, mean=True),
        _tower_case("towers_batch_first_pre", True, True, mean=False),
        _tower_case("towers_sequence_first_post", False, False, mean=False),
        _tower_case("towers_sequence_first_pre", False, True, mean=True),
    )
}
