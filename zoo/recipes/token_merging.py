"""A control: similar tokens of a vision tower merge, as in "Token Merging" (Bolya et al., 2023): :func:`merge_tokens`.

After each self-attention, a fixed number of tokens of every sample merge with the token whose key is most similar. Later
attention counts a merged token as often as it has parts. Axes: B samples, N tokens (class token first), C width, H heads, D
width of a head.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from madtp.errors import ConfigError
from zoo.clip.model import Clip


class MergingBlock(nn.Module):
    """A block of a vision tower that merges tokens between attention and feed-forward; one subclass for each kind of block.

    Args:
        block: The block whose parameters are used.
        merged: Number of tokens to merge.
        first: Whether it is the first block of the tower.
        parts: Number of parts of each token after the block before, a list of one tensor that all blocks of the tower share.
    """

    def __init__(self, block: Any, merged: int, first: bool, parts: list[Tensor]) -> None:
        super().__init__()
        self.block = block
        self.merged = merged
        self.first = first
        self._parts = parts

    def forward(self, x: Tensor, *unused: object, **options: object) -> Tensor:
        """Take ``[B, N, C]``, return ``[B, N - merged, C]``."""
        parts = x.new_ones(x.shape[:2]) if self.first else self._parts.pop().to(x.dtype)
        mask = None if self.first else parts.log()[:, None, None].expand(-1, 1, x.shape[1], -1)
        attended, keys = self._attend(x, mask)
        x, parts = merge(x + attended, parts, keys, self.merged)
        self._parts[:] = [parts]
        return x + self._feed(x)

    @abstractmethod
    def _attend(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return what attention adds to ``x``, and keys ``[B, N, D]``; ``mask`` ``[B, 1, N, N]`` is added to the scores."""

    @abstractmethod
    def _feed(self, x: Tensor) -> Tensor:
        """Return what feed-forward adds to ``x``."""


class _TimmBlock(MergingBlock):
    def _attend(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        block, heard = self.block, list[Tensor]()
        handle = block.attn.qkv.register_forward_hook(lambda module, given, output: heard.append(output))
        try:
            added = block.drop_path1(block.ls1(block.attn(block.norm1(x), attn_mask=mask)))
        finally:
            handle.remove()
        return added, _by_head(heard[0], block.attn.num_heads)[:, :, 1].mean(2)

    def _feed(self, x: Tensor) -> Tensor:
        block = self.block
        return cast(Tensor, block.drop_path2(block.ls2(block.mlp(block.norm2(x)))))


class _ClipBlock(MergingBlock):
    def _attend(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        block = self.block
        attn = block.attn
        projected = F.linear(block.ln_1(x), attn.in_proj_weight, attn.in_proj_bias)
        queries, keys, values = _by_head(projected, attn.num_heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        return attn.out_proj(mixed.transpose(1, 2).flatten(2)), keys.mean(1)

    def _feed(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.block.mlp(self.block.ln_2(x)))


def _by_head(projected: Tensor, heads: int) -> Tensor:
    """Return queries, keys and values ``[B, N, 3 * C]`` as ``[B, N, 3, H, C / H]``."""
    return projected.reshape(*projected.shape[:2], 3, heads, -1)


def merge(x: Tensor, parts: Tensor, keys: Tensor, merged: int) -> tuple[Tensor, Tensor]:
    """Merge tokens at even positions into the most similar tokens at odd positions.

    Args:
        x: Tokens, ``[B, N, C]``. The first one is never merged away.
        parts: Number of parts of each token, ``[B, N]``.
        keys: ``[B, N, D]``; similarity is the cosine of keys.
        merged: Number of tokens to merge; at most every other one.

    Returns:
        Tokens ``[B, N - merged, C]``, means of their parts, and their numbers of parts.
    """
    merged = min(merged, (x.shape[1] - 1) // 2)
    if merged < 1:
        return x, parts
    with torch.no_grad():
        keys = F.normalize(keys.float(), dim=-1)
        alike = keys[:, ::2] @ keys[:, 1::2].transpose(1, 2)
        alike[:, 0] = -torch.inf
        best, partner = alike.max(-1)
        order = best.argsort(dim=1, descending=True)
        gone, kept = order[:, :merged], order[:, merged:].sort(dim=1).values
        partner = partner.gather(1, gone)
    weighted = torch.cat([x * parts[..., None], parts[..., None]], dim=-1)
    first, second = weighted[:, ::2], weighted[:, 1::2]

    def rows(index: Tensor) -> Tensor:
        return index[..., None].expand(-1, -1, weighted.shape[-1])

    second = second.scatter_add(1, rows(partner), first.gather(1, rows(gone)))
    joined = torch.cat([first.gather(1, rows(kept)), second], dim=1)
    return joined[..., :-1] / joined[..., -1:], joined[..., -1].detach()


def merge_tokens(model: nn.Module, merged: int | Sequence[int]) -> None:
    """Let the vision tower of BLIP or CLIP, or a tower of timm, merge ``merged`` tokens in each block.

    The model is changed in place and keeps its parameters.

    Args:
        model: A model whose vision tower has blocks of timm or CLIP.
        merged: Number of tokens, one for all blocks or one for each.

    Raises:
        ConfigError: The model has no such tower, or the numbers are not as many as its blocks.
    """
    blocks, kind = _blocks_of(model)
    numbers = [merged] * len(blocks) if isinstance(merged, int) else list(merged)
    if len(numbers) != len(blocks):
        raise ConfigError(f"merged has {len(numbers)} numbers, and the vision tower has {len(blocks)} blocks.")
    parts: list[Tensor] = []
    for place, number in enumerate(numbers):
        block = blocks[place]
        plain = block.block if isinstance(block, MergingBlock) else block
        blocks[place] = kind(plain, number, place == 0, parts)


def blocks_that_merge(model: nn.Module) -> int:
    """Return how many blocks :func:`merge_tokens` changes.

    Raises:
        ConfigError: The model has no such tower.
    """
    return len(_blocks_of(model)[0])


def plain_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights of a model, merging or not, by the names that they have without merging."""
    inside = [name for name, module in model.named_modules() if isinstance(module, MergingBlock)]
    weights = {}
    for name, value in model.state_dict().items():
        owner = next((path for path in inside if name.startswith(f"{path}.block.")), None)
        weights[name if owner is None else owner + name.removeprefix(f"{owner}.block")] = value
    return weights


def _blocks_of(model: Any) -> tuple[nn.ModuleList | nn.Sequential, type[MergingBlock]]:
    if isinstance(model, Clip):
        return model.visual.transformer.resblocks, _ClipBlock
    tower = getattr(model, "visual_encoder", model)
    blocks = getattr(tower, "blocks", None)
    if not isinstance(blocks, nn.ModuleList | nn.Sequential) or not all(map(_fits, blocks)):
        raise ConfigError(
            f"{type(model).__name__} has no vision tower of timm's or CLIP's blocks, which the merging control is for."
        )
    return blocks, _TimmBlock


def _fits(block: nn.Module) -> bool:
    plain = block.block if isinstance(block, MergingBlock) else block
    return all(hasattr(plain, part) for part in ("norm1", "attn", "ls1", "norm2", "mlp", "ls2")) and hasattr(
        plain.attn, "qkv"
    )
