"""Two towers of torch.nn.TransformerEncoder, as a person would write them; start at :func:`tower_case`."""

from __future__ import annotations

import torch
from model_case import DEPTH, PATCH, VOCABULARY, WIDTH, Case, Keys, Tensors, lively, positions_mask, text
from torch import Tensor, nn


class Tower(nn.Module):
    """A TransformerEncoder that runs batch first or sequence first; tokens [B, N, C] in and out."""

    def __init__(self, batch_first: bool, norm_first: bool, depth: int = DEPTH) -> None:
        super().__init__()
        self.batch_first = batch_first
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, 0.1, batch_first=batch_first, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        x = x if self.batch_first else x.transpose(0, 1)
        x = self.encoder(x, src_key_padding_mask=padding)
        return x if self.batch_first else x.transpose(0, 1)


class TwoTowers(nn.Module):
    """Image and text side by side; returns both features and their cosine for each sample."""

    def __init__(self, batch_first: bool, norm_first: bool, mean: bool, depth: int = DEPTH) -> None:
        super().__init__()
        self.mean = mean
        self.patches = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.class_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.image_positions = nn.Parameter(torch.zeros(1, 17, WIDTH))
        self.image = Tower(batch_first, norm_first, depth)
        self.words = nn.Embedding(VOCABULARY, WIDTH)
        self.text_positions = nn.Parameter(torch.zeros(20, WIDTH))
        self.text = Tower(batch_first, norm_first, depth)

    def forward(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensors:
        x = self.patches(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], 1) + self.image_positions
        image = self.image(x)[:, 0]
        padding = attention_mask == 0
        words = self.words(input_ids) + self.text_positions[: input_ids.shape[1]]
        return self.compare(image, self.text(words, padding), attention_mask)

    def compare(self, image: Tensor, words: Tensor, attention_mask: Tensor) -> Tensors:
        weight = attention_mask[:, :, None].to(words.dtype)
        said = (words * weight).sum(1) / weight.sum(1) if self.mean else words[:, 0]
        return {"image": image, "text": said, "score": nn.functional.cosine_similarity(image, said)}


def _repool_words(model: nn.Module, inputs: Tensors, tokens: Tensors, kept: Tensors) -> Tensors:
    weight = inputs["attention_mask"] * kept["text"]
    return model.compare(tokens["image"][:, 0], tokens["text"], weight)  # type: ignore[operator]


def tower_case(name: str, batch_first: bool, norm_first: bool, mean: bool) -> Case:
    def protected(inputs: Tensors) -> Tensors:
        batch, length = inputs["input_ids"].shape
        return {"image": positions_mask(batch, 17, 0), "text": positions_mask(batch, length, *(() if mean else (0,)))}

    place = "{}.encoder.layers.[].norm2:input" if norm_first else "{}.encoder.layers.[].norm1:output"
    return Case(
        name=name,
        build=lambda: lively(TwoTowers(batch_first, norm_first, mean)),
        inputs=lambda batch, length: {"pixels": torch.randn(batch, 3, 32, 32), **text(batch, length)},
        keys=(
            Keys(r"^image\.encoder\.layers\.(\d+)\.self_attn", "image"),
            Keys(r"^text\.encoder\.layers\.(\d+)\.self_attn", "text"),
        ),
        layers={"image": DEPTH, "text": DEPTH},
        residual={s: place.format(s).replace("[]", "{}") for s in ("image", "text")},
        final={s: f"{s}.encoder" for s in ("image", "text")},
        norm={"image": None, "text": None},
        protected=protected,
        repool=_repool_words if mean else None,
        sequence_first=not batch_first,
    )
