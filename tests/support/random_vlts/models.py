"""Whole models, a class for each arrangement of streams. Start at :func:`build` and :func:`inputs`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from model_case import lively
from torch import Tensor, nn

from random_vlts.blocks import CrossOptions, Stream
from random_vlts.design import Blocks, Design
from random_vlts.marks import END, GRID, LONGEST, PATCH, PATCHES, PICTURE, VOCABULARY, WIDTH, Reads
from random_vlts.positions import absolute
from random_vlts.readouts import image_readout, text_readout

Tensors = dict[str, Tensor]


class Pixels(nn.Module):
    """Patches [B, P, C] of pixels [B, 3, H, W], learned tokens in front."""

    def __init__(self, design: Design, blocks: Blocks) -> None:
        super().__init__()
        self.by_convolution = design.patches == "convolution"
        if self.by_convolution:
            self.patches: nn.Module = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        else:
            self.patches = nn.Linear(3 * PATCH * PATCH, WIDTH)
        if "class" in design.special:
            self.class_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        if "registers" in design.special:
            self.register_tokens = nn.Parameter(torch.zeros(1, 2, WIDTH))
        self.special = design.special
        self.positions = absolute(blocks, PATCHES + design.prefix)

    def forward(self, pixels: Tensor) -> Tensor:
        if self.by_convolution:
            x = self.patches(pixels).flatten(2).transpose(1, 2)
        else:
            x = pixels.reshape(pixels.shape[0], 3, GRID[0], PATCH, GRID[1], PATCH).permute(0, 2, 4, 1, 3, 5)
            x = self.patches(x.reshape(pixels.shape[0], PATCHES, -1))
        if "registers" in self.special:
            x = torch.cat([self.register_tokens.expand(x.shape[0], -1, -1), x], dim=1)
        if "class" in self.special:
            x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], dim=1)
        return self.positions(x, None)


class Words(nn.Module):
    """Tokens [B, T, C] of ids [B, T]."""

    def __init__(self, blocks: Blocks) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = absolute(blocks, LONGEST)

    def forward(self, ids: Tensor, seen: Tensor | None) -> Tensor:
        return self.positions(self.embed(ids), seen)


class Tower(nn.Module):
    """An image tower alone."""

    def __init__(self, design: Design) -> None:
        super().__init__()
        self.embed = Pixels(design, design.image)
        self.stream = Stream(design.image, "image", (PATCHES + design.prefix, design.prefix))
        self.readout = image_readout(design.image_readout, "image", design.prefix)

    def forward(self, pixels: Tensor) -> Tensors:
        return {"image": self.readout(self.stream(self.embed(pixels)))}


class Towers(nn.Module):
    """Image and text side by side; in ``Encoder`` the text also reads the image."""

    reads_image = False

    def __init__(self, design: Design) -> None:
        super().__init__()
        self.image = Tower(design)
        self.words = Words(design.text)
        crossing = crossing_layers(design, design.text) if self.reads_image else ()
        self.text = Stream(
            design.text,
            "text",
            causal=design.causal,
            memory=Reads("image"),
            crossing=crossing,
            options=CrossOptions(design.cross_feed_forward, design.cross_gate),
        )
        self.readout = text_readout(design.text_readout, "text")

    def forward(self, pixels: Tensor, ids: Tensor, attention_mask: Tensor | None = None) -> Tensors:
        tokens = self.image.stream(self.image.embed(pixels))
        words = self.words(ids, attention_mask)
        memory = tokens if self.reads_image else None
        text = self.readout(self.text(words, attention_mask, memory), ids, attention_mask)
        found = {"image": self.image.readout(tokens), "text": text}
        if found["image"].shape == text.shape:
            found["score"] = F.cosine_similarity(found["image"], text)
        return found


class Encoder(Towers):
    reads_image = True


def crossing_layers(design: Design, blocks: Blocks) -> tuple[int, ...]:
    """The layers that read the other stream."""
    layers = range(blocks.depth)
    return {"all": tuple(layers), "last": (blocks.depth - 1,), "some": tuple(layers[1::2])}[design.cross]


class CoAttention(nn.Module):
    """Two streams, layer by layer; each reads what the other was before the layer."""

    def __init__(self, design: Design) -> None:
        super().__init__()
        self.embed, self.words = Pixels(design, design.image), Words(design.text)
        depth = min(design.image.depth, design.text.depth)
        options = CrossOptions(design.cross_feed_forward, design.cross_gate)
        self.image, self.text = nn.ModuleList(), nn.ModuleList()
        grid = (PATCHES + design.prefix, design.prefix)
        for layer in range(depth):
            image = Stream(
                _one(design.image), "image", grid, memory=Reads("text", layer), crossing=(0,), options=options
            )
            text = Stream(
                _one(design.text),
                "text",
                causal=design.causal,
                memory=Reads("image", layer),
                crossing=(0,),
                options=options,
            )
            for stream in (image, text):
                _renumber(stream, layer)
                if layer < depth - 1:
                    stream.norm = nn.Identity()
            self.image.append(image)
            self.text.append(text)
        self.image_readout = image_readout(design.image_readout, "image", design.prefix)
        self.text_readout = text_readout(design.text_readout, "text")

    def forward(self, pixels: Tensor, ids: Tensor, attention_mask: Tensor | None = None) -> Tensors:
        x, y = self.embed(pixels), self.words(ids, attention_mask)
        for image, text in zip(self.image, self.text, strict=True):
            x, y = image(x, None, y, attention_mask), text(y, attention_mask, x, None)
        return {"image": self.image_readout(x), "text": self.text_readout(y, ids, attention_mask)}


def _one(blocks: Blocks) -> Blocks:
    from dataclasses import replace

    return replace(blocks, depth=1)  # type: ignore[arg-type]


def _renumber(stream: Stream, layer: int) -> None:
    for block in stream.layers:
        block.tap.layer = block.end.layer = layer
        block.attention.reads = Reads(block.attention.reads.stream, layer)


class Queries(nn.Module):
    """Learned query tokens read an image; text may be read beside it."""

    def __init__(self, design: Design) -> None:
        super().__init__()
        self.image = Tower(design)
        self.query_tokens = nn.Parameter(torch.zeros(1, 6, WIDTH))
        self.stream = Stream(
            design.fusion,
            "query",
            memory=Reads("image"),
            crossing=crossing_layers(design, design.fusion),
            options=CrossOptions(design.cross_feed_forward, design.cross_gate),
        )
        self.readout = image_readout("sequence" if design.image_readout in ("grid", "first") else "mean", "query", 0)

    def forward(self, pixels: Tensor) -> Tensors:
        tokens = self.image.stream(self.image.embed(pixels))
        queries = self.stream(self.query_tokens.expand(pixels.shape[0], -1, -1), None, tokens)
        return {"image": self.image.readout(tokens), "query": self.readout(queries)}


class Joint(nn.Module):
    """One stream over text and image; ``JointAfterTowers`` runs towers first."""

    after_towers = False

    def __init__(self, design: Design) -> None:
        super().__init__()
        self.embed, self.words = Pixels(design, design.image), Words(design.text)
        if self.after_towers:
            self.image = Stream(design.image, "image", (PATCHES + design.prefix, design.prefix))
            self.text = Stream(design.text, "text", causal=design.causal)
        self.type_embed = nn.Embedding(2, WIDTH) if design.type_embeddings else None
        self.text_first = design.order == "text_first"
        self.stream = Stream(design.fusion, "joint")
        self.image_readout = image_readout(design.image_readout, "joint_image", design.prefix)
        self.text_readout = text_readout(design.text_readout, "joint_text")

    def forward(self, pixels: Tensor, ids: Tensor, attention_mask: Tensor | None = None) -> Tensors:
        x, y = self.embed(pixels), self.words(ids, attention_mask)
        if self.after_towers:
            x, y = self.image(x), self.text(y, attention_mask)
        length, seen = y.shape[1], None
        if self.type_embed is not None:
            x = x + self.type_embed(torch.ones(x.shape[:2], dtype=torch.long, device=x.device))
            y = y + self.type_embed(torch.zeros_like(ids))
        if attention_mask is not None:
            image_mask = torch.ones(x.shape[:2], dtype=attention_mask.dtype, device=x.device)
            seen = torch.cat([attention_mask, image_mask] if self.text_first else [image_mask, attention_mask], dim=1)
        both = self.stream(torch.cat([y, x] if self.text_first else [x, y], dim=1), seen)
        if self.text_first:
            y, x = both[:, :length], both[:, length:]
        else:
            x, y = both[:, : x.shape[1]], both[:, x.shape[1] :]
        return {"image": self.image_readout(x), "text": self.text_readout(y, ids, attention_mask)}


class JointAfterTowers(Joint):
    after_towers = True


class Scattered(nn.Module):
    """Image features take the places of picture tokens in a text stream."""

    def __init__(self, design: Design) -> None:
        super().__init__()
        self.image = Tower(design)
        self.project = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
        self.prefix, self.scatter = design.prefix, design.scatter
        self.words = Words(design.text)
        self.text = Stream(design.text, "text", causal=design.causal)
        self.readout = text_readout(design.text_readout, "text")

    def forward(self, pixels: Tensor, ids: Tensor, attention_mask: Tensor | None = None) -> Tensors:
        features = self.project(self.image.stream(self.image.embed(pixels))[:, self.prefix :])
        words = self.words(ids, attention_mask)
        place = ids == PICTURE
        if self.scatter == "masked_scatter":
            words = words.masked_scatter(place.unsqueeze(-1).expand_as(words), features.to(words.dtype))
        elif self.scatter == "where":
            source = (place.long().cumsum(1) - 1).clamp(min=0)
            spread = features.gather(1, source.unsqueeze(-1).expand(-1, -1, WIDTH))
            words = torch.where(place.unsqueeze(-1), spread, words)
        else:
            words = words.clone()
            words[place] = features.reshape(-1, WIDTH)
        return {"text": self.readout(self.text(words, attention_mask), ids, attention_mask)}


ARRANGEMENTS: dict[str, type[nn.Module]] = {
    "image": Tower,
    "towers": Towers,
    "encoder": Encoder,
    "co_attention": CoAttention,
    "queries": Queries,
    "joint": Joint,
    "joint_after_towers": JointAfterTowers,
    "scattered": Scattered,
}


def build(design: Design) -> nn.Module:
    """The model in eval mode, in float64 so that every difference is an error, with weights that make every token matter."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        model = ARRANGEMENTS[design.arrangement](design)
        return lively(model, seed=design.weights)
    finally:
        torch.set_default_dtype(before)


def inputs(design: Design, batch: int, length: int, seed: int) -> Tensors:
    """Keyword arguments for a batch; texts of ``length`` end in END and in different amounts of padding."""
    chance = torch.Generator().manual_seed(seed)
    pixels = torch.randn(batch, 3, GRID[0] * PATCH, GRID[1] * PATCH, generator=chance, dtype=torch.float64)
    if design.arrangement in ("image", "queries"):
        return {"pixels": pixels}
    pictures = PATCHES if design.arrangement == "scattered" else 0
    lengths = torch.tensor([max(3, length - (row + seed) % 3) for row in range(batch)]) + pictures
    seen = torch.arange(length + pictures) < lengths[:, None]
    ids = torch.randint(4, PICTURE, seen.shape, generator=chance)
    ids[torch.arange(batch), lengths - 1] = END
    for row in range(batch):
        start = 1 + row % 2
        ids[row, start : start + pictures] = PICTURE
    found = {"pixels": pixels, "ids": ids.masked_fill(~seen, 0)}
    if design.padding == "none":
        return found
    found["attention_mask"] = seen.long()
    if design.padding == "left":
        for name in ("ids", "attention_mask"):
            found[name] = torch.stack([r.roll(len(r) - int(n)) for r, n in zip(found[name], lengths, strict=True)])
    return found


def lengths(design: Design, inputs: Tensors) -> dict[str, int]:
    """Tokens of each stream."""
    image = PATCHES + design.prefix
    text = inputs["ids"].shape[1] if "ids" in inputs else 0
    return {"image": image, "text": text, "query": 6, "joint": image + text}
