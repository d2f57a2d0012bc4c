"""Transformer blocks, a class for each placement of the norms, and the stream made of them. Start at :class:`Stream`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from random_vlts.attention import cross_attention, self_attention
from random_vlts.design import Blocks
from random_vlts.layers import branch, feed_forward, norm
from random_vlts.marks import Reads, Tap
from random_vlts.masks import MaskMaker, Masks, with_positions
from random_vlts.positions import Relative


@dataclass(frozen=True)
class Memory:
    """What a block reads by cross-attention: tokens [B, K, C] and masks."""

    tokens: Tensor
    masks: Masks


@dataclass(frozen=True)
class CrossOptions:
    """How a cross-attention stands in its block: with a feed-forward of its own, behind a gate that starts at zero."""

    feed_forward: bool = False
    gate: bool = False


class Gate(nn.Module):
    """A learned share of a sublayer."""

    def __init__(self) -> None:
        super().__init__()
        self.share = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.share.tanh() * x


class Block(nn.Module):
    """Parts that all placements share. ``memory``: what the cross-attention reads, if there is one."""

    def __init__(self, blocks: Blocks, stream: str, layer: int, memory: Reads | None, options: CrossOptions) -> None:
        super().__init__()
        first = blocks.product == "sequence_first"
        self.norm1, self.norm2 = norm(blocks.norm), norm(blocks.norm)
        self.attention = self_attention(blocks, Reads(stream, layer))
        self.branch1, self.branch2 = branch(blocks), branch(blocks)
        self.mlp = feed_forward(blocks.feed_forward)
        self.tap, self.end = Tap(stream, layer, False, first), Tap(stream, layer, True, first)
        self.crosses = memory is not None
        if memory is not None:
            self.cross, self.cross_norm = cross_attention(blocks, memory), norm(blocks.norm)
            self.cross_gate = Gate() if options.gate else nn.Identity()
        self.cross_mlp = feed_forward(blocks.feed_forward) if memory is not None and options.feed_forward else None
        if self.cross_mlp is not None:
            self.cross_mlp_norm = norm(blocks.norm)


class PreNorm(Block):
    def forward(self, x: Tensor, masks: Masks, memory: Memory | None = None) -> Tensor:
        x = self.tap(x + self.branch1(self.attention(self.norm1(x), masks)))
        if self.crosses and memory is not None:
            x = x + self.cross_gate(self.cross(self.cross_norm(x), memory.tokens, memory.masks))
        if self.cross_mlp is not None:
            x = x + self.cross_mlp(self.cross_mlp_norm(x))
        return self.end(x + self.branch2(self.mlp(self.norm2(x))))


class PostNorm(Block):
    def forward(self, x: Tensor, masks: Masks, memory: Memory | None = None) -> Tensor:
        x = self.tap(self.norm1(x + self.branch1(self.attention(x, masks))))
        if self.crosses and memory is not None:
            x = self.cross_norm(self.cross_gate(self.cross(x, memory.tokens, memory.masks)) + x)
        if self.cross_mlp is not None:
            x = self.cross_mlp_norm(self.cross_mlp(x) + x)
        return self.end(self.norm2(self.branch2(self.mlp(x)) + x))


class Sandwich(Block):
    """A norm before and after each sublayer."""

    def __init__(self, blocks: Blocks, stream: str, layer: int, memory: Reads | None, options: CrossOptions) -> None:
        super().__init__(blocks, stream, layer, memory, options)
        self.after_norm1, self.after_norm2 = norm(blocks.norm), norm(blocks.norm)

    def forward(self, x: Tensor, masks: Masks, memory: Memory | None = None) -> Tensor:
        x = self.tap(x + self.branch1(self.after_norm1(self.attention(self.norm1(x), masks))))
        if self.crosses and memory is not None:
            x = x + self.cross_gate(self.cross(self.cross_norm(x), memory.tokens, memory.masks))
        if self.cross_mlp is not None:
            x = x + self.cross_mlp(self.cross_mlp_norm(x))
        return self.end(x + self.branch2(self.after_norm2(self.mlp(self.norm2(x)))))


class Parallel(Block):
    """Attention and feed-forward read the same tokens; each is added to the stream."""

    def forward(self, x: Tensor, masks: Masks, memory: Memory | None = None) -> Tensor:
        h = self.norm1(x)
        x = x + self.branch1(self.attention(h, masks)) + self.branch2(self.mlp(self.norm2(h)))
        x = self.tap(x)
        if self.crosses and memory is not None:
            x = x + self.cross_gate(self.cross(self.cross_norm(x), memory.tokens, memory.masks))
        if self.cross_mlp is not None:
            x = x + self.cross_mlp(self.cross_mlp_norm(x))
        return self.end(x)


class ParallelSum(Block):
    """Sublayers, cross-attention among them, read the same tokens and are summed before they are added."""

    def forward(self, x: Tensor, masks: Masks, memory: Memory | None = None) -> Tensor:
        h = self.norm1(x)
        total = self.branch1(self.attention(h, masks)) + self.branch2(self.mlp(self.norm2(h)))
        if self.crosses and memory is not None:
            total = total + self.cross_gate(self.cross(self.cross_norm(h), memory.tokens, memory.masks))
        if self.cross_mlp is not None:
            total = total + self.cross_mlp(self.cross_mlp_norm(h))
        return self.end(self.tap(x + total))


PLACEMENTS: dict[str, type[Block]] = {
    "pre": PreNorm,
    "post": PostNorm,
    "sandwich": Sandwich,
    "parallel": Parallel,
    "parallel_sum": ParallelSum,
}


class Stream(nn.Module):
    """Blocks over the tokens of one stream.

    name: of the stream. grid: (length, prefix) of image tokens. memory: what layers in ``crossing`` read.
    """

    def __init__(
        self,
        blocks: Blocks,
        name: str,
        grid: tuple[int, int] | None = None,
        causal: bool = False,
        memory: Reads | None = None,
        crossing: tuple[int, ...] = (),
        options: CrossOptions = CrossOptions(),
    ) -> None:
        super().__init__()
        kind = PLACEMENTS[blocks.placement]
        self.sequence_first = blocks.product == "sequence_first"
        self.masks, self.memory_masks = MaskMaker(blocks, causal), MaskMaker(blocks)
        self.relative = Relative(blocks, grid)
        self.layers = nn.ModuleList(
            kind(blocks, name, i, memory if i in crossing else None, options) for i in range(blocks.depth)
        )
        self.norm = nn.Identity() if blocks.placement == "post" else norm(blocks.norm)

    def enter(self, x: Tensor) -> Tensor:
        """[B, N, C] as the blocks want it."""
        return x.transpose(0, 1) if self.sequence_first else x

    def prepare(self, x: Tensor, seen: Tensor | None) -> Masks:
        """Masks, biases and rotations of tokens [B, N, C]."""
        return with_positions(self.masks(x, seen, x.shape[1]), *self.relative(x.shape[1], seen))

    def remember(self, x: Tensor, memory: Tensor | None, seen: Tensor | None) -> Memory | None:
        """The memory [B, K, C] for queries [B, N, C]."""
        if memory is None:
            return None
        return Memory(self.enter(memory), self.memory_masks(memory, seen, x.shape[1]))

    def forward(
        self, x: Tensor, seen: Tensor | None = None, memory: Tensor | None = None, memory_seen: Tensor | None = None
    ) -> Tensor:
        """Tokens [B, N, C], padding where ``seen`` [B, N] is 0; the same of the memory."""
        masks, remembered = self.prepare(x, seen), self.remember(x, memory, memory_seen)
        x = self.enter(x)
        for layer in self.layers:
            x = layer(x, masks, remembered)
        return self.enter(self.norm(x))
