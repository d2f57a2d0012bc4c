"""How published BLIP-NLVR files map to :class:`zoo.blip.nlvr.BlipNlvr`: same names, with these exceptions."""

from __future__ import annotations

from zoo.checkpoint import KeyTable

NLVR_TABLE = KeyTable(
    # Constants that older transformers saved with the weights.
    ignored=("text_encoder.embeddings.position_ids",),
    position_grids=("visual_encoder.pos_embed",),
)
