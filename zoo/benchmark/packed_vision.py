"""The floor of timm's vision transformers: :class:`PackedVisionTower`.

The layers of the tower itself run on packed rows ``[T, C]``. A pruning site lies behind the attention of a block, so attention
runs on the tokens of the site before, and the feed-forward on the survivors. Axes: B images, N tokens of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from madtp.errors import ConfigError
from zoo.benchmark.packed_rows import Lengths, attend, cut, first_rows

_PARTS = ("norm1", "attn", "ls1", "norm2", "mlp", "ls2")


class PackedVisionTower:
    """Runs a tower on fixed numbers of tokens.

    Args:
        tower: A ``VisionTransformer`` of timm with plain blocks.

    Raises:
        ConfigError: It is another tower, or has parts that are not known here.
    """

    def __init__(self, tower: nn.Module) -> None:
        from timm.models.vision_transformer import VisionTransformer

        if not isinstance(tower, VisionTransformer) or not all(map(_is_plain, tower.blocks)):
            raise ConfigError(f"{type(tower).__name__} is no plain VisionTransformer of timm; its floor is not known.")
        if getattr(tower, "attn_pool", None) is not None or tower.global_pool not in ("token", ""):
            raise ConfigError(f"the floor knows no pooling by {tower.global_pool!r}; it reads the class token.")
        self.tower: Any = tower

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.tower.blocks)

    def embed(self, images: Tensor) -> tuple[Tensor, Lengths]:
        """Images ``[B, 3, H, W]`` -> rows ``[B * N, C]`` and their lengths."""
        tower = self.tower
        tokens = tower.norm_pre(tower.patch_drop(tower._pos_embed(tower.patch_embed(images))))
        return tokens.flatten(0, 1), (tokens.shape[1],) * tokens.shape[0]

    def blocks(self, rows: Tensor, lengths: Lengths, kept: Sequence[Lengths]) -> tuple[Tensor, Lengths]:
        """Run all blocks; ``kept`` has the lengths behind the site of each."""
        for block, after in zip(self.tower.blocks, kept, strict=True):
            rows = run_block(block, rows, lengths, after)
            lengths = after
        return self.tower.norm(rows), lengths

    def head(self, rows: Tensor, lengths: Lengths) -> Tensor:
        """Normalised rows -> output ``[B, classes]`` of the head, which reads class tokens."""
        tower = self.tower
        output: Tensor = tower.head(tower.head_drop(tower.fc_norm(first_rows(rows, lengths))))
        return output


def run_block(block: Any, rows: Tensor, lengths: Lengths, kept: Lengths) -> Tensor:
    """Run one block.

    Args:
        block: A block of timm.
        rows: ``[T, C]``.
        lengths: Rows of each sample.
        kept: Rows of each sample from the feed-forward on.

    Returns:
        ``[T', C]``, with T' the sum of ``kept``.
    """
    attn = block.attn
    queries, keys, values = attn.qkv(block.norm1(rows)).unflatten(1, (3, attn.num_heads, -1)).unbind(1)
    mixed = attend(attn.q_norm(queries), attn.k_norm(keys), values, lengths, lengths)
    rows = cut(rows + block.ls1(attn.proj(attn.norm(mixed))), kept)
    output: Tensor = rows + block.ls2(block.mlp(block.norm2(rows)))
    return output


def _is_plain(block: Any) -> bool:
    attn = getattr(block, "attn", None)
    known = all(hasattr(block, part) for part in _PARTS) and all(hasattr(attn, n) for n in ("qkv", "proj", "norm"))
    return known and getattr(attn, "gate", None) is None
