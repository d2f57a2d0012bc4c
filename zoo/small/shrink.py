"""Turns a configuration of the published size into one of a few thousand parameters, by the names of its fields.

Start with :func:`shrink`. It knows names of fields ("hidden_size", "num_attention_heads", ...), not the models they belong to;
``overrides.py`` holds what names cannot tell.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

WIDTH = 64
HEADS = 4
HEAD_WIDTH = WIDTH // HEADS
LAYERS = 2
IMAGE = 64
PATCH = 8
VOCABULARY = 128
POSITIONS = 192
QUERIES = 16
CODES = 32

# Special tokens from this id on move to the end of the smaller vocabulary.
SPECIAL_FROM = 96


@dataclass
class _Context:
    """What a rule may look at: the other fields of the configuration, and the special ids assigned so far."""

    fields: Mapping[str, Any]
    special: dict[int, int] = field(default_factory=dict)

    @property
    def last(self) -> int:
        """The layer that is kept with the first: the last of another type, where layers have types."""
        for name in ("layer_types", "mlp_layer_types"):
            types = self.fields.get(name) or []
            others = [number for number, kind in enumerate(types) if kind != types[0]]
            if others:
                return others[-1]
        return -1


Rule = Callable[[int, _Context], int]


def _constant(size: int) -> Rule:
    """At most ``size``."""
    return lambda value, _: min(value, size)


def _key_heads(value: int, context: _Context) -> int:
    heads = context.fields.get("num_attention_heads")
    return HEADS if value == heads or not isinstance(heads, int) else min(2, value)


def _patch(value: int, _: _Context) -> int:
    return value if value <= 4 else PATCH


# Field name -> how its number shrinks; the first pattern that matches the whole name decides.
_WIDE = (
    r"(.*_)?(intermediate|ffn|mlp|feed_?forward|inner|expert)_?(size|dim|hidden_size|hidden_dim|size_mlp)s?"
    r"|d_ff|n_inner|(.*_)?dim_feedforward"
)
_NUMBERS: tuple[tuple[str, Rule], ...] = (
    (r".*(key_value|kv)_heads", _key_heads),
    (r".*(heads|n_head|num_head)", _constant(HEADS)),
    (r".*lora_rank", _constant(32)),
    (r".*(head_dim|head_size|d_kv|kv_channels|qk_rope_dim)", _constant(HEAD_WIDTH)),
    (r"index_topk", _constant(QUERIES)),
    (r".*(experts_per_tok|experts_top_k|top_k_experts|moe_topk|moe_k|topk)", _constant(2)),
    (r".*num.*experts|n_routed_experts", _constant(4)),
    (r".*kv_shared_layers", _constant(0)),  # two layers of two types have nothing to share
    (r".*(layers|n_layer|depth|num_blocks|num_block)", _constant(LAYERS)),
    (_WIDE, _constant(2 * WIDTH)),
    (r"num_(object_)?queries|num_query_tokens", _constant(QUERIES)),
    (r"num_embeddings|codebook_size|base_channels|latent_channels", _constant(CODES)),  # of images as codes
    (r"(.*_)?(image_size|img_size|image_resolution|resolution|input_size)", _constant(IMAGE)),
    (r"(.*_)?patch_size", _patch),
    (r"(.*_)?vocab_size.*", _constant(VOCABULARY)),
    (
        r"(.*_)?(max_.*position_embeddings|n_positions|n_ctx|max_seq_len.*|max_.*_positions|max_target_len.*)",
        _constant(POSITIONS),
    ),
    (
        r"(.*_)?(hidden_size|hidden_dim|d_model|n_embd|embed_dim|embedding_size|emb_dim|projection_dim|project_dim|width"
        r"|projection_size|output_dim|text_dim|vision_dim|hidden_size_per_layer_input|conv_dim|hidden_channels"
        r"|embed_width|fusion_hidden_size|attention_dim|dim)",
        _constant(WIDTH),
    ),
)

# Fields that are derived from others and would contradict the smaller ones.
_DERIVED = frozenset({"stage_names", "per_layer_config", "image_embedding_size"})

# Field name -> how a list of one number a stage shrinks: stages double in width and in heads.
_STAGES: tuple[tuple[str, Callable[[int], int]], ...] = (
    (r"(.*_)?(depths|num_blocks|num_layers)", lambda _: LAYERS),
    (r"(.*_)?layers", lambda _: 1),  # of one stage each, or the numbers of those that are read
    (r"(.*_)?(num_heads|num_attention_heads|heads)", lambda stage: 2**stage),
    (r"(.*_)?(hidden_sizes|embed_dims?|channels|widths|encoder_hidden_size)", lambda stage: HEAD_WIDTH * 2**stage),
    (r"(.*_)?neck_hidden_sizes|(.*_)?reassemble.*sizes", lambda _: 2 * HEAD_WIDTH),
)


def shrink(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration, nested ones included, with every size made small.

    Lists with an entry for each layer keep the first and the last. Special token ids that the smaller vocabulary does not
    hold move to its end, equal ones to equal ones.
    """
    return _shrink(config, {})


def sections(small: Mapping[str, Any]) -> list[int]:
    """Return how many rotary frequencies of a head encode time, row and column; together, all of them."""
    rotary = (small.get("head_dim") or HEAD_WIDTH) * (small.get("rope_parameters") or {}).get(
        "partial_rotary_factor", 1.0
    )
    half = int(rotary) // 2
    return [half - 2 * (half // 4), half // 4, half // 4]


def _shrink(config: Mapping[str, Any], special: dict[int, int]) -> dict[str, Any]:
    context = _Context(config, special)
    layers = {
        value for name, value in config.items() if isinstance(value, int) and re.fullmatch(r".*layers|depth", str(name))
    }
    small = {name: _field(str(name), value, context, layers) for name, value in config.items() if name not in _DERIVED}
    return small | _stages_read(small)


def _stages_read(small: Mapping[str, Any]) -> dict[str, Any]:
    """Give a backbone that is read after several layers as many layers, and read it after each of them."""
    read = small.get("out_features") or small.get("out_indices")
    layers = small.get("num_hidden_layers")
    if not isinstance(read, list) or not isinstance(layers, int):
        return {}
    count = max(len(read), LAYERS)
    last = range(count - len(read) + 1, count + 1)
    return {"num_hidden_layers": count, "out_features": [f"stage{n}" for n in last], "out_indices": list(last)}


def _field(name: str, value: Any, context: _Context, layers: set[int]) -> Any:
    if isinstance(value, Mapping):
        return _shrink(value, context.special)
    if isinstance(value, list | tuple):
        return _list(name, list(value), context, layers)
    if isinstance(value, int) and not isinstance(value, bool):
        return _number(name, value, context)
    return value


def _number(name: str, value: int, context: _Context) -> int:
    if re.search(r"token_(id|index)|_token$|_id$", name):
        return _special(value, context)
    for pattern, rule in _NUMBERS:
        if re.fullmatch(pattern, name):
            return rule(value, context)
    return value


def _special(value: int, context: _Context) -> int:
    if value < SPECIAL_FROM:
        return value
    known = context.special
    if value not in known:
        known[value] = VOCABULARY - 1 - len(known) % (VOCABULARY - SPECIAL_FROM)
    return known[value]


def _list(name: str, values: list[Any], context: _Context, layers: set[int]) -> list[Any]:
    if values and all(isinstance(v, int) and not isinstance(v, bool) for v in values):
        if len(values) in (2, 3) and re.fullmatch(r".*(image_size|img_size|patch_size|resolution)", name):
            return [_number(name, v, context) for v in values]
        for pattern, rule in _STAGES:
            if re.fullmatch(pattern, name) and len(values) <= 8:
                return [rule(stage) for stage in range(len(values))]
        if re.search(r"token_id|token_index", name):
            return [_special(v, context) for v in values]
        if re.fullmatch(r"vision_feature_layers?", name):
            return [v if v < 0 else v % LAYERS for v in values]
        if re.fullmatch(r"(global_attn|fullatt_block)_indexes", name):
            return [LAYERS - 1]
        if name == "deepstack_visual_indexes":
            return list(range(LAYERS))
        if re.fullmatch(_WIDE, name):
            values = [_number(name, v, context) for v in values]
    if len(values) in layers and len(values) > LAYERS:
        return [values[0], values[context.last]]
    return values
