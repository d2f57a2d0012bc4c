"""Attention sublayers. Start at :func:`self_attention` and :func:`cross_attention`; the products are below :data:`PRODUCTS`."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from random_vlts.design import Blocks
from random_vlts.layers import norm
from random_vlts.marks import WIDTH, Reads
from random_vlts.masks import Masks
from random_vlts.projections import Separate, SharedMemory, projection

Product = Callable[[Tensor, Tensor, Tensor, Masks], Tensor]


def join(x: Tensor) -> Tensor:
    """[B, H, N, D] -> [B, N, C]."""
    return x.transpose(1, 2).flatten(2)


def hide(scores: Tensor, masks: Masks) -> Tensor:
    """Scores [B, H, N, K] with what may not be seen made small."""
    if masks.bias is not None:
        scores = scores + masks.bias
    if masks.mask is None:
        return scores
    if masks.mask.dtype == torch.bool:
        return scores.masked_fill(~masks.mask, torch.finfo(scores.dtype).min)
    return scores + masks.mask


def sdpa(query: Tensor, key: Tensor, value: Tensor, masks: Masks) -> Tensor:
    grouped = key.shape[1] != query.shape[1]
    if masks.causal:
        return join(F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped))
    return join(F.scaled_dot_product_attention(query, key, value, attn_mask=masks.joined(query), enable_gqa=grouped))


def matmul(query: Tensor, key: Tensor, value: Tensor, masks: Masks) -> Tensor:
    batch, _, length, head = query.shape
    scores = hide(torch.matmul(query, key.transpose(-2, -1)) * head**-0.5, masks)
    mixed = torch.matmul(F.dropout(scores.softmax(-1), 0.0), value)
    return mixed.permute(0, 2, 1, 3).contiguous().view(batch, length, WIDTH)


def divided(query: Tensor, key: Tensor, value: Tensor, masks: Masks) -> Tensor:
    scores = query @ key.transpose(2, 3) / math.sqrt(query.shape[-1])
    if masks.bias is None and masks.mask is not None and masks.mask.dtype == torch.bool:
        lowest = torch.full([], torch.finfo(scores.dtype).min, dtype=scores.dtype, device=scores.device)
        scores = torch.where(masks.mask, scores, lowest)
    else:
        scores = hide(scores, masks)
    return join(F.softmax(scores, dim=-1) @ value)


def scaled_query(query: Tensor, key: Tensor, value: Tensor, masks: Masks) -> Tensor:
    scores = hide((query * query.shape[-1] ** -0.5) @ key.mT, masks)
    return join(torch.softmax(scores, dim=-1) @ value)


def scaled_both(query: Tensor, key: Tensor, value: Tensor, masks: Masks) -> Tensor:
    share = query.shape[-1] ** -0.25
    scores = hide((query * share) @ (key * share).transpose(-1, -2), masks)
    return join(scores.softmax(dim=-1) @ value)


def upcast(query: Tensor, key: Tensor, value: Tensor, masks: Masks) -> Tensor:
    scores = hide(torch.matmul(query, key.transpose(2, 3)) * query.shape[-1] ** -0.5, masks)
    return join(torch.matmul(F.softmax(scores, dim=-1, dtype=torch.float64).to(query.dtype), value).contiguous())


def folded(query: Tensor, key: Tensor, value: Tensor, masks: Masks) -> Tensor:
    batch, heads, length, head = query.shape
    keys = key.shape[2]
    q, k, v = (t.reshape(batch * heads, -1, head) for t in (query * head**-0.5, key, value))
    scores = torch.bmm(q, k.transpose(1, 2))
    scores = hide(scores.view(batch, heads, length, keys), masks).view(batch * heads, length, keys)
    return join(torch.bmm(scores.softmax(-1), v).view(batch, heads, length, head))


def folded_added(query: Tensor, key: Tensor, value: Tensor, masks: Masks) -> Tensor:
    batch, heads, length, head = query.shape
    q, k, v = (t.reshape(batch * heads, -1, head) for t in (query, key, value))
    added = masks.added(query, key).expand(batch, heads, length, key.shape[2]).reshape(batch * heads, length, -1)
    scores = torch.baddbmm(added, q, k.transpose(1, 2), beta=1.0, alpha=head**-0.5)
    return join(torch.bmm(scores.softmax(-1), v).view(batch, heads, length, head))


def einsum(query: Tensor, key: Tensor, value: Tensor, masks: Masks) -> Tensor:
    scores = torch.einsum("bhid,bhjd->bhij", query, key) * query.shape[-1] ** -0.5
    mixed = torch.einsum("bhij,bhjd->bihd", hide(scores, masks).softmax(-1), value)
    return mixed.flatten(2)


PRODUCTS: dict[str, Product] = {
    f.__name__: f for f in (sdpa, matmul, divided, scaled_query, scaled_both, upcast, folded, folded_added, einsum)
}


class Cosine(nn.Module):
    """Queries and keys of length one; a learned factor for each head."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.zeros(heads, 1, 1))

    def forward(self, query: Tensor, key: Tensor, value: Tensor, masks: Masks) -> Tensor:
        scores = F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).transpose(-2, -1)
        scores = hide(scores * self.logit_scale.clamp(max=4.0).exp(), masks)
        return join(scores.softmax(dim=-1) @ value)


def product(blocks: Blocks) -> Product:
    """How these blocks compute attention from queries, keys and values."""
    return Cosine(blocks.heads) if blocks.product == "cosine" else PRODUCTS[blocks.product]


class SelfAttention(nn.Module):
    """[B, N, C] to the same; ``masks`` carries what hides keys, biases and rotations."""

    def __init__(self, blocks: Blocks, reads: Reads) -> None:
        super().__init__()
        self.reads = reads
        self.project = projection(blocks.projection, blocks.heads)
        self.head_norm = blocks.head_norm
        if blocks.head_norm:
            self.query_norm, self.key_norm = (norm(blocks.norm, WIDTH // blocks.heads) for _ in range(2))
        self.product = product(blocks)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, masks: Masks) -> Tensor:
        query, key, value = self.project(x)
        if self.head_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        if masks.rotate is not None:
            query, key = masks.rotate(query), masks.rotate(key)
        return self.out(self.product(query, key, value, masks))


class CrossAttention(nn.Module):
    """Tokens [B, N, C] read others [B, K, C]."""

    def __init__(self, blocks: Blocks, reads: Reads) -> None:
        super().__init__()
        self.reads = reads
        plain = blocks.projection in ("separate", "grouped_flag", "grouped_expand")
        self.project = Separate(blocks.heads) if plain else SharedMemory(blocks.heads)
        self.product = product(blocks)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, memory: Tensor, masks: Masks) -> Tensor:
        query, key, value = self.project(x, memory)
        return self.out(self.product(query, key, value, masks))


class Multihead(nn.Module):
    """torch.nn.MultiheadAttention over the tokens themselves, or over others."""

    def __init__(self, blocks: Blocks, reads: Reads) -> None:
        super().__init__()
        self.reads = reads
        self.weights = blocks.product == "multihead_weights"
        self.attention = nn.MultiheadAttention(
            WIDTH, blocks.heads, batch_first=blocks.product != "sequence_first", dropout=0.1
        )

    def attend(self, x: Tensor, memory: Tensor, masks: Masks) -> Tensor:
        """Tokens that have read ``memory``."""
        return self.attention(
            x,
            memory,
            memory,
            key_padding_mask=None if masks.keys is None else ~masks.keys,
            need_weights=self.weights,
            attn_mask=masks.later,
        )[0]


class MultiheadSelf(Multihead):
    def forward(self, x: Tensor, masks: Masks) -> Tensor:
        return self.attend(x, x, masks)


class MultiheadCross(Multihead):
    def forward(self, x: Tensor, memory: Tensor, masks: Masks) -> Tensor:
        return self.attend(x, memory, masks)


def self_attention(blocks: Blocks, reads: Reads) -> nn.Module:
    """The self-attention of these blocks."""
    return MultiheadSelf(blocks, reads) if blocks.multihead else SelfAttention(blocks, reads)


def cross_attention(blocks: Blocks, reads: Reads) -> nn.Module:
    """The cross-attention of these blocks."""
    return MultiheadCross(blocks, reads) if blocks.multihead else CrossAttention(blocks, reads)
