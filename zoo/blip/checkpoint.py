"""How the files of BLIP map to the models here, by format. Published names are the models' own, so their rows are few.

Formats: the published ``.pth``, those of the MADTP authors' code, and transformers' safetensors. The authors' files also hold
the alignment tokens, which ``zoo/checkpoints/official.py`` reads.
"""

from __future__ import annotations

from zoo.checkpoints.key_table import KeyTable, Row

VISION_POSITIONS = "visual_encoder.pos_embed"
# Constants that older transformers saved with the weights.
_CONSTANTS = ("*embeddings.position_ids",)
# The authors' alignment tokens, which the dense model does not use.
ALIGNMENT_TOKENS = "space_dict"
# Copies and queues of retrieval's training.
_COPIED = ("visual_encoder", "text_encoder", "vision_proj", "text_proj")
_QUEUES = ("image_queue", "text_queue", "idx_queue", "ptr_queue")
_TRAINING = (*(f"{name}_m.*" for name in _COPIED), *_QUEUES)
_VISION_ROWS = (
    Row("vision_model.embeddings.class_embedding", "visual_encoder.cls_token"),
    Row("vision_model.embeddings.position_embedding", VISION_POSITIONS),
    Row("vision_model.embeddings.patch_embedding.*", "visual_encoder.patch_embed.proj.*"),
    Row("vision_model.encoder.layers.*.self_attn.qkv.*", "visual_encoder.blocks.*.attn.qkv.*"),
    Row("vision_model.encoder.layers.*.self_attn.projection.*", "visual_encoder.blocks.*.attn.proj.*"),
    Row("vision_model.encoder.layers.*.layer_norm1.*", "visual_encoder.blocks.*.norm1.*"),
    Row("vision_model.encoder.layers.*.layer_norm2.*", "visual_encoder.blocks.*.norm2.*"),
    Row("vision_model.encoder.layers.*.mlp.*", "visual_encoder.blocks.*.mlp.*"),
    Row("vision_model.post_layernorm.*", "visual_encoder.norm.*"),
)


def _tables(ignored: tuple[str, ...] = (), optional: tuple[str, ...] = ()) -> tuple[KeyTable, ...]:
    """Return the formats of one task.

    Args:
        ignored: Keys of published files that the model does not use.
        optional: Keys of the model that transformers' files lack.
    """
    grids, constants = (VISION_POSITIONS,), (*_CONSTANTS, *ignored)
    may_lack = KeyTable().optional
    return (
        KeyTable("transformers", "vision_model.*", _VISION_ROWS, _CONSTANTS, (*may_lack, *optional), grids),
        KeyTable("MADTP", ALIGNMENT_TOKENS, (), (*constants, ALIGNMENT_TOKENS), may_lack, grids),
        KeyTable("BLIP", "*", (), constants, may_lack, grids),
    )


NLVR_TABLES = tuple(table for table in _tables() if table.name != "transformers")  # which has no such model
RETRIEVAL_TABLES = _tables(ignored=_TRAINING, optional=("temp",))
CAPTION_TABLES = _tables()
VQA_TABLES = _tables()

# Training of retrieval (`zoo/objectives/momentum_contrast.py`): the copies become its follower, without
# what only matching needs.
MOMENTUM_TABLE = KeyTable(
    "BLIP, with momentum",
    "image_queue",
    (
        *(Row(f"{name}_m.*", f"follower.{name}.*") for name in _COPIED),
        *(Row(name, name) for name in _QUEUES),
        Row("*", "model.*"),
    ),
    (*_CONSTANTS, ALIGNMENT_TOKENS),
    ("model.madtp.*", "follower.madtp.*", "follower.itm_head.*", "follower.temp"),
    (f"model.{VISION_POSITIONS}", f"follower.{VISION_POSITIONS}"),
)

# What the authors add to their models, under the names of a pruned model.
PRUNING_ROWS = (Row(ALIGNMENT_TOKENS, "madtp.alignment.tokens"),)
