"""Hosts that call their blocks one by one, and cannot be captured; start at :class:`Loop`. No submodule runs all blocks."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from model_case import PATCH, VOCABULARY, WIDTH, Tensors, text
from torch import Tensor, nn

IMAGE_TOKENS = 16


class Block(nn.Module):
    """Pre-norm self-attention and feed-forward; True in ``padding`` hides a token."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y, y, key_padding_mask=padding, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class TupleBlock(Block):
    def forward(self, x: Tensor, padding: Tensor | None = None) -> Any:
        return super().forward(x, padding), None


class DictBlock(Block):
    def forward(self, x: Tensor, padding: Tensor | None = None) -> Any:
        return {"layer": 1, "hidden": super().forward(x, padding)}


class PairBlock(Block):
    """Returns two tensors that the next block is given."""

    def forward(self, x: Tensor, padding: Tensor) -> Any:
        return super().forward(x, padding), padding & True


class BiasedBlock(nn.Module):
    """Takes positions for queries and keys, and a bias on its attention."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))

    def forward(self, x: Tensor, positions: Tensor, *, bias: Tensor, scale: float = 1.0) -> Tensor:
        y = self.norm1(x + positions)
        query, key, value = (layer(y).unflatten(2, (2, -1)).transpose(1, 2) for layer in self.layers[:3])
        seen = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        x = x + self.layers[3](seen.transpose(1, 2).flatten(2))
        return x + scale * self.mlp(self.norm2(x))


class AttentionLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(WIDTH), nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.attention(y, y, y, key_padding_mask=padding, need_weights=False)[0]


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(WIDTH), nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


class Loop(nn.Module):
    """Words and patches in one sequence; the text is cut to its longest sample, which no capture follows.

    Subclasses say in :meth:`run` how the blocks are called. ``mode`` changes that after the rewrite.
    """

    mode = ""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.patches, self.words = nn.Conv2d(3, WIDTH, PATCH, PATCH), nn.Embedding(VOCABULARY, WIDTH)
        self.make_blocks(depth)
        self.head = nn.Linear(WIDTH, 10)

    def make_blocks(self, depth: int) -> None:
        self.blocks = nn.ModuleList(Block() for _ in range(depth))

    def forward(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x, padding = self.embed(pixels, input_ids, attention_mask)
        return self.head(self.run(x, padding)[:, 0])

    def embed(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        longest = int(attention_mask.sum(1).max().item())
        image = self.patches(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.words(input_ids[:, :longest]), image], 1)
        return x, torch.cat([attention_mask[:, :longest] == 0, torch.zeros(len(x), IMAGE_TOKENS, dtype=torch.bool)], 1)

    def run(self, x: Tensor, padding: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, padding)
        return x


class Attributes(Loop):
    def make_blocks(self, depth: int) -> None:
        self.block1, self.block2, self.final = Block(), Block(), Block()

    def run(self, x: Tensor, padding: Tensor) -> Tensor:
        return self.final(self.block2(self.block1(x, padding), padding), padding=padding)


class Named(Loop):
    """Blocks by name. Python looks at the shape between them."""

    def make_blocks(self, depth: int) -> None:
        self.blocks = nn.ModuleDict({name: Block() for name in "abc"})

    def run(self, x: Tensor, padding: Tensor) -> Tensor:
        for block in self.blocks.values():
            x = block(x, padding)
            assert x.dim() == 3
            assert x.shape[:2] == padding.shape
        return x


class Sliced(Loop):
    """A Sequential in two halves, with a function between them."""

    def make_blocks(self, depth: int) -> None:
        self.blocks = nn.Sequential(*(Block() for _ in range(4)))

    def run(self, x: Tensor, padding: Tensor) -> Tensor:
        for block in self.blocks[:2]:
            x = block(x)
        x = 2 * x
        for block in self.blocks[2:]:
            x = block(x)
        return x


class Tuples(Loop):
    def make_blocks(self, depth: int) -> None:
        self.blocks = nn.ModuleList(TupleBlock() for _ in range(depth))

    def run(self, x: Tensor, padding: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, padding=padding)[0]
        return x


class Dicts(Loop):
    def make_blocks(self, depth: int) -> None:
        self.blocks = nn.ModuleList(DictBlock() for _ in range(depth))

    def run(self, x: Tensor, padding: Tensor) -> Tensor:
        for number, block in enumerate(self.blocks):
            found = block(x, padding)
            assert found["layer"] == 1, number
            x = found["hidden"]
        return x


class Biased(Loop):
    """Every block has a bias of its own and the positions of all."""

    def make_blocks(self, depth: int) -> None:
        self.blocks = nn.ModuleList(BiasedBlock() for _ in range(depth))
        self.biases = nn.ParameterList(nn.Parameter(torch.randn(1, 2, 1, 1)) for _ in range(depth))

    def run(self, x: Tensor, padding: Tensor) -> Tensor:
        hidden = torch.zeros(padding.shape).masked_fill(padding, -1e9)[:, None, None]
        positions = torch.arange(x.shape[1]).sin()[None, :, None].expand_as(x)
        for block, bias in zip(self.blocks, self.biases, strict=True):
            x = block(x, positions, bias=hidden + bias)
        return x


class Alternating(Loop):
    """Attention and feed-forward are modules of their own."""

    def make_blocks(self, depth: int) -> None:
        self.blocks = nn.ModuleList(nn.ModuleList([AttentionLayer(), FeedForward()]) for _ in range(depth))

    def run(self, x: Tensor, padding: Tensor) -> Tensor:
        for attention, mlp in self.blocks:
            x = mlp(attention(x, padding))
        return x


class Inside(nn.Module):
    """The loop lies in a submodule that cannot be captured, either."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Loop()

    def forward(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return 2 * self.inner(pixels, input_ids, attention_mask)


class SideBySide(Loop):
    """A tower of image blocks and one of text blocks, layer by layer."""

    def make_blocks(self, depth: int) -> None:
        self.image = nn.ModuleList(Block() for _ in range(2))
        self.text = nn.ModuleList(Block() for _ in range(2))

    def forward(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        longest = int(attention_mask.sum(1).max().item())
        x, words = self.patches(pixels).flatten(2).transpose(1, 2), self.words(input_ids[:, :longest])
        for image, said in zip(self.image, self.text, strict=True):
            x, words = image(x), said(words, attention_mask[:, :longest] == 0)
        return self.head(x[:, 0] * words[:, 0])


class CausalBlock(BiasedBlock):
    """Returns a model output in place of a tensor."""

    def forward(self, x: Tensor, positions: Tensor, *, bias: Tensor, scale: float = 1.0) -> Any:
        return OrderedDict(hidden=super().forward(x, positions, bias=bias, scale=scale))


class Decoding(Loop):
    """A causal language model among whose words the image stands, which the root writes there."""

    def make_blocks(self, depth: int) -> None:
        self.blocks = nn.ModuleList(CausalBlock() for _ in range(depth))

    def forward(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        longest = int(attention_mask.sum(1).max().item())
        slots = input_ids.new_full((len(input_ids), IMAGE_TOKENS), 1)
        ids = torch.cat([input_ids[:, :1], slots, input_ids[:, 1:longest]], 1)
        image = self.patches(pixels).flatten(2).transpose(1, 2)
        x = self.words(ids).masked_scatter((ids == 1)[..., None], image)
        bias = torch.full((x.shape[1], x.shape[1]), -1e9).triu(1)[None, None]
        positions = torch.arange(x.shape[1]).sin()[None, :, None].expand_as(x)
        for block in self.blocks:
            x = block(x, positions, bias=bias)["hidden"]
        return self.head(x)


class Reading(Loop):
    """Text blocks read the image; each has two attentions, and could be a region by itself."""

    def make_blocks(self, depth: int) -> None:
        self.image = nn.ModuleList(Block() for _ in range(2))
        self.text = nn.ModuleList(nn.TransformerDecoderLayer(WIDTH, 2, 32, 0.0, batch_first=True) for _ in range(2))

    def forward(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        longest = int(attention_mask.sum(1).max().item())
        x, words = self.patches(pixels).flatten(2).transpose(1, 2), self.words(input_ids[:, :longest])
        for block in self.image:
            x = block(x)
        for block in self.text:
            words = block(words, x, tgt_key_padding_mask=attention_mask[:, :longest] == 0)
        return self.head(words[:, 0])


class Wayward(Loop):
    """Goes other ways by ``mode``."""

    def run(self, x: Tensor, padding: Tensor) -> Tensor:
        seen: list[Tensor] = []
        for number, block in enumerate(self.blocks):
            if self.mode == "skip a block" and number == 1:
                continue
            if self.mode == "leave early" and number == 2:
                break
            if self.mode == "freeze the first block" and number == 0:
                with torch.no_grad():
                    x = block(x, padding)
            elif self.mode == "write into a mask":
                own = padding.clone()
                x = block(x, own)
                own.fill_(True)
            elif self.mode.endswith("checkpoint"):
                reentrant = self.mode.startswith("reentrant")
                x = torch.utils.checkpoint.checkpoint(block, x, padding, use_reentrant=reentrant)
            elif self.mode == "give no mask":
                x = block(x)
            else:
                x = block(x, padding)
            if self.mode == "write into the result":
                x += 1
            if self.mode == "collect":
                seen.append(x)
        return x + torch.stack(seen).mean(0) if seen else x


class Collecting(Wayward):
    mode = "collect"


class Pairs(Loop):
    def make_blocks(self, depth: int) -> None:
        self.blocks = nn.ModuleList(PairBlock() for _ in range(depth))

    def run(self, x: Tensor, padding: Tensor) -> Tensor:
        for block in self.blocks:
            x, padding = block(x, padding)
        return x


class Twice(Loop):
    """Runs its blocks two times."""

    def run(self, x: Tensor, padding: Tensor) -> Tensor:
        return super().run(super().run(x, padding), padding)


class Uneven(Loop):
    """Runs its last block two times."""

    def make_blocks(self, depth: int) -> None:
        super().make_blocks(2)

    def run(self, x: Tensor, padding: Tensor) -> Tensor:
        return self.blocks[1](super().run(x, padding), padding)


class Notebook:
    """What blocks note down; an object that no capture knows."""

    def __init__(self) -> None:
        self.sums: list[Tensor] = []


class NotingBlock(Block):
    def forward(self, x: Tensor, padding: Tensor, notebook: Notebook) -> Tensor:  # type: ignore[override]
        notebook.sums.append(x.sum())
        return super().forward(x, padding)


class Noting(Loop):
    """Blocks share an object."""

    def make_blocks(self, depth: int) -> None:
        self.blocks = nn.ModuleList(NotingBlock() for _ in range(depth))

    def run(self, x: Tensor, padding: Tensor) -> Tensor:
        notebook = Notebook()
        for block in self.blocks:
            x = block(x, padding, notebook)
        return x + torch.stack(notebook.sums).mean()


class Alone(Loop):
    """Has a single block."""

    def make_blocks(self, depth: int) -> None:
        self.blocks = nn.ModuleList([Block()])


def loop_inputs(batch: int = 3, length: int = 9) -> Tensors:
    return {"pixels": torch.randn(batch, 3, 32, 32), **text(batch, length)}
