"""Attention written in the many ways that models write it. Start at :data:`SPELLINGS`.

Each spelling is a function of its module, the normalised tokens [B, N, C] and a mask [B, N] (True at tokens), and returns
[B, N, C]. :class:`Speller` is a small pre-norm transformer around one of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from model_case import Case, Keys, Tensors, lively, positions_mask
from torch import Tensor, nn

HEADS, HEAD, LENGTH = 2, 4, 9
WIDTH = HEADS * HEAD
LOW = torch.finfo(torch.float32).min
Spelling = Callable[["SpelledAttention", Tensor, Tensor], Tensor]


class SpelledAttention(nn.Module):
    """Weights that any spelling may use."""

    def __init__(self, spelling: Spelling) -> None:
        super().__init__()
        self.spelling = spelling
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.fused = nn.Linear(WIDTH, 3 * WIDTH)
        self.fewer = nn.Linear(WIDTH, 2 * HEAD)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.heads = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.bias = nn.Parameter(torch.randn(HEADS, LENGTH, LENGTH))
        self.table = nn.Parameter(torch.randn(2 * LENGTH - 1, HEADS))
        self.strength = nn.Parameter(torch.full((HEADS, 1, 1), 0.7))
        distance = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)[None] + LENGTH - 1
        self.register_buffer("distance", distance, persistent=False)
        angle = torch.arange(LENGTH)[:, None] * torch.tensor([1.0, 0.3])
        self.register_buffer("cos", angle.repeat(1, 2).cos(), persistent=False)
        self.register_buffer("sin", angle.repeat(1, 2).sin(), persistent=False)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.spelling(self, x, mask)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, H, N, D]."""
        batch, length, _ = x.shape
        q, k, v = (f(x).view(batch, length, HEADS, HEAD).transpose(1, 2) for f in (self.query, self.key, self.value))
        return q, k, v

    def join(self, x: Tensor) -> Tensor:
        """[B, H, N, D] -> [B, N, C], projected."""
        return self.out(x.transpose(1, 2).flatten(2))


def sdpa(m: SpelledAttention, x: Tensor, mask: Tensor) -> Tensor:
    q, k, v = m.split(x)
    return m.join(F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :]))


def sdpa_causal(m: SpelledAttention, x: Tensor, mask: Tensor) -> Tensor:
    q, k, v = m.split(x)
    return m.join(F.scaled_dot_product_attention(q, k, v, is_causal=True))


def sdpa_square_mask(m: SpelledAttention, x: Tensor, mask: Tensor) -> Tensor:
    q, k, v = m.split(x)
    square = mask[:, None, None, :].expand(-1, 1, x.shape[1], -1)
    return m.join(F.scaled_dot_product_attention(q, k, v, attn_mask=square, scale=0.4))


def sdpa_one_head(m: SpelledAttention, x: Tensor, mask: Tensor) -> Tensor:
    return m.out(F.scaled_dot_product_attention(m.query(x), m.key(x), m.value(x), attn_mask=mask[:, None, :]))


def times_scale(m: SpelledAttention, x: Tensor, mask: Tensor) -> Tensor:
    q, k, v = m.split(x)
    scores = torch.matmul(q, k.transpose(-2, -1)) * HEAD**-0.5
    scores = scores + (~mask)[:, None, None, :].float() * LOW
    return m.join(torch.matmul(scores.softmax(-1), v))


def divided_by_scale(m: SpelledAttention, x: Tensor, mask: Tensor) -> Tensor:
    q, k, v = m.split(x)
    scores = (q @ k.transpose(2, 3)) / math.sqrt(HEAD)
    additive = (1.0 - mask[:, None, None, :].float()) * -10000.0
    return m.join(torch.softmax(additive + scores, dim=-1) @ v)


def scaled_queries(m: SpelledAttention, x: Tensor, mask: Tensor) -> Tensor:
    q, k, v = m.split(x)
    scores = (q * HEAD**-0.5) @ k.transpose(-1, -2)
    scores = scores.masked_fill(~mask[:, None, None, :], float("-inf"))
    return m.join(F.dropout(F.softmax(scores, dim=-1), 0.1, m.training) @ v)


def where_mask(m: SpelledAttention, x: Tensor, mask: Tensor) -> Tensor:
    q, k, v = m.split(x)
    scores = torch.where(mask[:, None, None, :], q @ k.mT, torch.tensor(LOW)) * 0.5
    return m.join(F.softmax(scores, dim=-1, dtype=torch.float32).to(v.dtype) @ v)


def two_masks(m: SpelledAttention, x: Tensor, mask: Tensor) -> Tensor:
    q, k, v = m.split(x)
    order = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
    scores = (q @ k.mT * 0.5).masked_fill(~order, LOW) + torch.where(mask, 0.0, LOW)[:, None, None, :]
    return m.join(scores.softmax(-1) @ v)


def folded_heads(m: SpelledAttention, x: Tensor, mask: Tensor) -> Tensor:
    batch, length, _ = x.shape
    q, k, v = (t.reshape(batch * HEADS, length, HEAD) for t in m.split(x))
    scores = torch.bmm(q, k.transpose(1, 2)).view(batch, HEADS, length, length) * 0.5
    scores = scores + (~mask)[:, None, None, :] * LOW
    weights = scores.view(batch * HEADS, length, length).softmax(-1)
    return m.join(torch.bmm(weights, v).view(batch, HEADS, length, HEAD))


def added_product(m: SpelledAttention, x: Tensor, mask: Tensor) -> Tensor:
    batch, length, _ = x.shape
    q, k, v = (t.reshape(batch * HEADS, length, HEAD) for t in m.split(x))
    hide = ((~mask).float() * -10000.0)[:, None, None, :].expand(batch, HEADS, length, length)
    scores = torch.baddbmm(hide.reshape(batch * HEADS, length, length), q, k.transpose(1, 2), beta=1.0, alpha=0.5)
    return m.join(torch.bmm(scores.softmax(-1), v).view(batch, HEADS, length, HEAD))


def fused_chunk(m: SpelledAttention, x: Tensor, mask: Tensor) -> Tensor:
    q, k, v = (t.unflatten(-1, (HEADS, HEAD)).transpose(1, 2) for t in m.fused(x).chunk(3, dim=-1))
    return m.join(F.scaled_dot_product_attention(q, k, v, mask[:, None, None, :]))


def fused_split(m: SpelledAttention, x: Tensor, mask: Tensor) -> Tensor:
    q, k, v = (t.unflatten(-1, (HEADS, HEAD)).transpose(1, 2) for t in m.fused(x).split(WIDTH, dim=2))
    return m.join(F.scaled_dot_product_attention(q, k, v, mask[:, None, None, :]))


def fused_unbind(m: SpelledAttention, x: Tensor, mask: Tensor) -> Tensor:
    batch, length, _ = x.shape
    q, k, v = m.fused(x).reshape(batch, length, 3, HEADS, HEAD).permute(2, 0, 3, 1, 4).unbind(0)
    return m.join(F.scaled_dot_product_attention(q, k, v, mask[:, None, None, :]))


def fused_select(m: SpelledAttention, x: Tensor, mask: Tensor) -> Tensor:
    batch, length, _ = x.shape
    packed = m.fused(x).view(batch, length, HEADS, 3, HEAD).transpose(1, 2)
    q, k, v = packed[..., 0, :], packed[..., 1, :], packed[..., 2, :]
    return m.join(F.scaled_dot_product_attention(q, k, v, mask[:, None, None, :]))


def multihead(m: SpelledAttention, x: Tensor, mask: Tensor) -> Tensor:
    return m.heads(x, x, x, key_padding_mask=~mask, need_weights=False)[0]


def multihead_weights(m: SpelledAttention, x: Tensor, mask: Tensor) -> Tensor:
    return m.heads(x, x, x, key_padding_mask=~mask, need_weights=True)[0]


def grouped_keys(m: SpelledAttention, x: Tensor, mask: Tensor) -> Tensor:
    batch, length, _ = x.shape
    q, _, _ = m.split(x)
    few = m.fewer(x).view(batch, length, 2, 1, HEAD).permute(2, 0, 3, 1, 4)
    k, v = (
        t[:, :, None].expand(batch, 1, HEADS, length, HEAD).reshape(batch, HEADS, length, HEAD) for t in few.unbind(0)
    )
    return m.join(F.scaled_dot_product_attention(q, k, v, mask[:, None, None, :]))


def grouped_flag(m: SpelledAttention, x: Tensor, mask: Tensor) -> Tensor:
    batch, length, _ = x.shape
    q, _, _ = m.split(x)
    k, v = m.fewer(x).view(batch, length, 2, 1, HEAD).permute(2, 0, 3, 1, 4).unbind(0)
    return m.join(F.scaled_dot_product_attention(q, k, v, mask[:, None, None, :], enable_gqa=True))


def rotary(m: SpelledAttention, x: Tensor, mask: Tensor) -> Tensor:
    q, k, v = m.split(x)
    cos, sin = m.cos[: x.shape[1]], m.sin[: x.shape[1]]

    def turn(t: Tensor) -> Tensor:
        first, second = t.chunk(2, -1)
        return t * cos + torch.cat((-second, first), -1) * sin

    return m.join(F.scaled_dot_product_attention(turn(q), turn(k), v, mask[:, None, None, :]))


def rotary_pairs(m: SpelledAttention, x: Tensor, mask: Tensor) -> Tensor:
    q, k, v = m.split(x)
    cos, sin = m.cos[: x.shape[1]], m.sin[: x.shape[1]]

    def turn(t: Tensor) -> Tensor:
        other = torch.stack((-t[..., 1::2], t[..., ::2]), -1).flatten(-2)
        return t * cos + other * sin

    return m.join(F.scaled_dot_product_attention(turn(q), turn(k), v, mask[:, None, None, :]))


def learned_bias(m: SpelledAttention, x: Tensor, mask: Tensor) -> Tensor:
    q, k, v = m.split(x)
    scores = (q @ k.mT) * 0.5 + m.bias + torch.where(mask, 0.0, LOW)[:, None, None, :]
    return m.join(scores.softmax(-1) @ v)


def relative_bias(m: SpelledAttention, x: Tensor, mask: Tensor) -> Tensor:
    q, k, v = m.split(x)
    bias = m.table[m.distance.view(-1)].view(LENGTH, LENGTH, HEADS).permute(2, 0, 1)
    return m.join(F.scaled_dot_product_attention(q, k, v, bias[None] + torch.where(mask, 0.0, LOW)[:, None, None, :]))


def cosine(m: SpelledAttention, x: Tensor, mask: Tensor) -> Tensor:
    q, k, v = m.split(x)
    scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
    scores = scores * m.strength.clamp(max=4.6).exp()
    return m.join((scores + torch.where(mask, 0.0, LOW)[:, None, None, :]).softmax(-1) @ v)


def shifted_scores(m: SpelledAttention, x: Tensor, mask: Tensor) -> Tensor:
    q, k, v = m.split(x)
    scores = ((q / 2) @ k.mT + torch.where(mask, 0.0, LOW)[:, None, None, :]) / 32 + 1
    return m.join((((scores - scores.amax(-1).unsqueeze(-1)) * 32).softmax(-1)) @ v)


def subtracted_mask(m: SpelledAttention, x: Tensor, mask: Tensor) -> Tensor:
    q, k, v = m.split(x)
    scores = (0 + q @ k.mT) - 1e6 * (1 - mask[:, None, None].float())
    return m.join(scores.softmax(-1) @ v)


def mask_like_the_scores(m: SpelledAttention, x: Tensor, mask: Tensor) -> Tensor:
    q, k, v = m.split(x)
    scores = q @ k.mT * 0.5
    hide = (mask == 0)[:, None, None, :].expand_as(scores)
    return m.join(scores.masked_fill(hide, LOW).softmax(-1) @ v)


def disentangled(m: SpelledAttention, x: Tensor, mask: Tensor) -> Tensor:
    """Each query looks up a number by distance, and so does each key."""
    q, k, v = m.split(x)
    table = m.table.view(-1, HEADS, 1).expand(-1, -1, HEAD).transpose(0, 1)
    place = m.distance.expand(x.shape[0], HEADS, -1, -1)
    bias = (q @ table.mT).gather(-1, place) + (k @ table.mT).gather(-1, place).transpose(-1, -2)
    return m.join(((q @ k.mT) * 0.5 + bias + torch.where(mask, 0.0, LOW)[:, None, None, :]).softmax(-1) @ v)


def disentangled_folded(m: SpelledAttention, x: Tensor, mask: Tensor) -> Tensor:
    batch, length, _ = x.shape
    q, k, v = (t.reshape(batch * HEADS, length, HEAD) for t in m.split(x))
    table = m.table.view(1, -1, HEADS).repeat(batch * HEADS, 1, HEAD // HEADS)
    place = m.distance[None].expand(batch * HEADS, length, -1)
    bias = torch.bmm(k, table.mT).gather(-1, place).transpose(-1, -2) / 3 + torch.bmm(q, table.mT).gather(-1, place)
    scores = (torch.bmm(q, k.mT / 2) + bias).view(-1, HEADS, length, length)
    scores = scores.masked_fill(~mask[:, None, None, :], LOW)
    return m.join(torch.bmm(scores.softmax(-1).view(-1, length, length), v).view(batch, HEADS, length, HEAD))


def soft_capped(m: SpelledAttention, x: Tensor, mask: Tensor) -> Tensor:
    q, k, v = m.split(x)
    scores = ((q @ k.mT * 0.5) / 0.8).tanh() * 0.8
    scores = scores + torch.where(mask, 0.0, LOW)[:, None, None, :]
    return m.join(F.dropout(scores.softmax(-1), 0.1, m.training) @ v)


def soft_capped_folded(m: SpelledAttention, x: Tensor, mask: Tensor) -> Tensor:
    batch, length, _ = x.shape
    q, k, v = (t.reshape(batch * HEADS, length, HEAD) for t in m.split(x))
    scores = -2 * torch.tanh(torch.bmm(q, k.mT) / -2).view(batch, HEADS, length, length) * 0.6
    weights = scores.masked_fill(~mask[:, None, None, :], LOW).softmax(-1)
    return m.join(torch.bmm(weights.view(batch * HEADS, length, length), v).view(batch, HEADS, length, HEAD))


def soft_capped_grouped(m: SpelledAttention, x: Tensor, mask: Tensor) -> Tensor:
    batch, length, _ = x.shape
    q, _, _ = m.split(x)
    few = m.fewer(x).view(batch, length, 2, 1, HEAD).permute(2, 0, 3, 1, 4)
    k, v = (
        t[:, :, None].expand(batch, 1, HEADS, length, HEAD).reshape(batch, HEADS, length, HEAD) for t in few.unbind(0)
    )
    order = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
    scores = (5 * torch.tanh(q @ k.mT / 5)).masked_fill(~(order & mask[:, None, None, :]), LOW)
    return m.join(scores.softmax(-1) @ v)


SPELLINGS: dict[str, Spelling] = {
    f.__name__: f
    for f in (
        sdpa,
        sdpa_causal,
        sdpa_square_mask,
        sdpa_one_head,
        times_scale,
        divided_by_scale,
        scaled_queries,
        where_mask,
        two_masks,
        folded_heads,
        added_product,
        fused_chunk,
        fused_split,
        fused_unbind,
        fused_select,
        multihead,
        multihead_weights,
        grouped_keys,
        grouped_flag,
        rotary,
        rotary_pairs,
        learned_bias,
        relative_bias,
        cosine,
        shifted_scores,
        subtracted_mask,
        mask_like_the_scores,
        disentangled,
        disentangled_folded,
        soft_capped,
        soft_capped_folded,
        soft_capped_grouped,
    )
}


class Block(nn.Module):
    """Pre-norm block."""

    def __init__(self, spelling: Spelling) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = SpelledAttention(spelling)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 12), nn.GELU(), nn.Linear(12, WIDTH))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))


class Speller(nn.Module):
    """Blocks over given features [B, LENGTH, C]; reads the first token."""

    def __init__(self, *spellings: Spelling) -> None:
        super().__init__()
        self.embed = nn.Linear(5, WIDTH)
        self.positions = nn.Parameter(torch.zeros(LENGTH, WIDTH))
        self.blocks = nn.ModuleList(Block(s) for s in spellings)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.embed(x) + self.positions
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x)[:, 0]


def inputs(batch: int, length: int) -> Tensors:
    """Features and a mask whose rows end in different padding."""
    lengths = torch.tensor([LENGTH - row % 3 for row in range(batch)])
    return {"x": torch.randn(batch, LENGTH, 5), "mask": torch.arange(LENGTH) < lengths[:, None]}


def spelled_case(name: str, *spellings: Spelling) -> Case:
    """A case of blocks with these spellings; masks of `sdpa_causal` are by order alone."""
    return Case(
        name=name,
        build=lambda: lively(Speller(*spellings)),
        inputs=inputs,
        keys=(Keys(r"^blocks\.(\d+)\.attn", "image"),),
        layers={"image": len(spellings)},
        residual={"image": "blocks.{}.norm2:input"},
        final={"image": "norm"},
        norm={"image": "norm"},
        protected=lambda x: {"image": positions_mask(len(x["x"]), LENGTH, 0)},
    )
