"""How the files of CLIP map to :class:`zoo.clip.model.Clip`, by format. OpenAI's names are the model's own.

Formats: OpenAI's archives and their state dicts, those of the MADTP authors' code, and transformers' safetensors.
"""

from __future__ import annotations

from zoo.checkpoints.key_table import KeyTable, Row

ALIGNMENT_TOKENS = "space_dict"
VISION_POSITIONS = "visual.positional_embedding"
# Sizes that OpenAI saves with the weights, and masks.
_CONSTANTS = ("input_resolution", "context_length", "vocab_size", "*attn_mask", "*.position_ids")
# Copies and queues of retrieval's training.
_COPIED = (
    "visual_m.*",
    "transformer_m.*",
    "token_embedding_m.*",
    "ln_final_m.*",
    "text_projection_m",
    "positional_embedding_m",
)
_QUEUES = ("image_queue", "text_queue", "idx_queue", "ptr_queue")
_TRAINING = (*_COPIED, *_QUEUES)


def _tower_rows(theirs: str, ours: str) -> tuple[Row, ...]:
    """transformers' encoder layers ``theirs`` as the blocks ``ours``."""
    attention = tuple(f"{theirs}.*.self_attn.{part}_proj" for part in "qkv")
    return (
        Row(tuple(f"{key}.weight" for key in attention), f"{ours}.*.attn.in_proj_weight"),
        Row(tuple(f"{key}.bias" for key in attention), f"{ours}.*.attn.in_proj_bias"),
        Row(f"{theirs}.*.self_attn.out_proj.*", f"{ours}.*.attn.out_proj.*"),
        Row(f"{theirs}.*.layer_norm1.*", f"{ours}.*.ln_1.*"),
        Row(f"{theirs}.*.layer_norm2.*", f"{ours}.*.ln_2.*"),
        Row(f"{theirs}.*.mlp.fc1.*", f"{ours}.*.mlp.c_fc.*"),
        Row(f"{theirs}.*.mlp.fc2.*", f"{ours}.*.mlp.c_proj.*"),
    )


_TRANSFORMERS_ROWS = (
    Row("vision_model.embeddings.class_embedding", "visual.class_embedding"),
    Row("vision_model.embeddings.patch_embedding.weight", "visual.conv1.weight"),
    Row("vision_model.embeddings.position_embedding.weight", VISION_POSITIONS),
    Row("vision_model.pre_layrnorm.*", "visual.ln_pre.*"),
    Row("vision_model.post_layernorm.*", "visual.ln_post.*"),
    Row("visual_projection.weight", "visual.proj", transpose=True),
    Row("text_model.embeddings.token_embedding.weight", "token_embedding.weight"),
    Row("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    Row("text_model.final_layer_norm.*", "ln_final.*"),
    Row("text_projection.weight", "text_projection", transpose=True),
    *_tower_rows("vision_model.encoder.layers", "visual.transformer.resblocks"),
    *_tower_rows("text_model.encoder.layers", "transformer.resblocks"),
)
_GRIDS = (VISION_POSITIONS,)
_PROJECTIONS = "*.query_model.q_map.0.*"
# What the authors add to the model, under the names of a pruned one.
PRUNING_ROWS = (
    Row(ALIGNMENT_TOKENS, "madtp.alignment.tokens"),
    Row("visual.transformer.resblocks.*.query_model.q_map.0.*", "madtp.sites.visual_transformer_resblocks_*.query.*"),
    Row("transformer.resblocks.*.query_model.q_map.0.*", "madtp.sites.transformer_resblocks_*.query.*"),
)
TABLES = (
    KeyTable("transformers", "vision_model.*", _TRANSFORMERS_ROWS, ("*.position_ids",), position_grids=_GRIDS),
    KeyTable(
        "MADTP",
        ALIGNMENT_TOKENS,
        ignored=(*_CONSTANTS, *_TRAINING, ALIGNMENT_TOKENS, _PROJECTIONS),
        position_grids=_GRIDS,
    ),
    KeyTable("OpenAI", "*", ignored=(*_CONSTANTS, *_TRAINING), position_grids=_GRIDS),
)
# Training of retrieval (`zoo/objectives/momentum_contrast.py`): the copies become its follower.
MOMENTUM_TABLE = KeyTable(
    "CLIP, with momentum",
    "image_queue",
    (
        *(Row(name, f"follower.{name.replace('_m', '', 1)}") for name in _COPIED),
        *(Row(name, name) for name in _QUEUES),
        Row("*", "model.*"),
    ),
    (*_CONSTANTS, ALIGNMENT_TOKENS, _PROJECTIONS),
    ("model.madtp.*", "follower.madtp.*", "follower.logit_scale"),
    (f"model.{VISION_POSITIONS}", f"follower.{VISION_POSITIONS}"),
)
