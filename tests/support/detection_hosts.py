"""Text-conditioned detectors, for the tests of how rewrites are judged: start at :class:`Detector` and :func:`detector`.

An image of two scales and a text read each other, and the best positions of the image become the queries. On images that
are nearly blank, rounding decides which positions these are.
"""

from __future__ import annotations

import torch
from model_case import VOCABULARY, WIDTH, Tensors, lively, text
from torch import Tensor, nn

QUERIES = 6
"""Of 20 positions."""
FAINT = 1e-6
"""How much the pixels of an image that is nearly blank differ."""


class Reader(nn.Module):
    """Attention spelled out, which a rewrite computes in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor, read: Tensor, hidden: Tensor | None = None) -> Tensor:
        query, key, value = (_heads(layer(y)) for layer, y in ((self.query, x), (self.key, read), (self.value, read)))
        scores = query @ key.mT / query.shape[-1] ** 0.5
        if hidden is not None:
            scores = scores.masked_fill(hidden[:, None, None], float("-inf"))
        return self.out((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))


def _heads(x: Tensor) -> Tensor:
    return x.unflatten(2, (2, -1)).transpose(1, 2)


class Layer(nn.Module):
    """Self-attention, attention to what ``forward`` is given to read, and a feed-forward."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))
        self.own, self.cross = Reader(), Reader()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))

    def forward(self, x: Tensor, read: Tensor, hidden: Tensor | None, read_hidden: Tensor | None) -> Tensor:
        y = self.norms[0](x)
        x = x + self.own(y, y, hidden)
        x = x + self.cross(self.norms[1](x), read, read_hidden)
        return x + self.mlp(self.norms[2](x))


class Fusion(nn.Module):
    """Image and text, each of which reads the other in every layer."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.image, self.text = (nn.ModuleList(Layer() for _ in range(depth)) for _ in range(2))

    def forward(self, image: Tensor, words: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        for image_layer, text_layer in zip(self.image, self.text, strict=True):
            image, words = image_layer(image, words, None, hidden), text_layer(words, image, hidden, None)
        return image, words


class Detector(nn.Module):
    """Ranks the positions of two scales of an image, and compares the best with a text. It exports whole."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse = nn.Conv2d(3, WIDTH, 8, 8), nn.Conv2d(3, WIDTH, 16, 16)
        self.words = nn.Embedding(VOCABULARY, WIDTH)
        self.fusion = Fusion()
        self.score, self.boxes = nn.Linear(WIDTH, 1), nn.Linear(WIDTH, 4)
        self.anchors = nn.Parameter(torch.zeros(20, 4))

    def forward(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensors:
        image = torch.cat([scale(pixels).flatten(2).mT for scale in (self.fine, self.coarse)], 1)
        return self.detected(*self.fused(image, self.words(input_ids), attention_mask == 0))

    def fused(self, image: Tensor, words: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        image, words = self.fusion(image, words, hidden)
        return image, words

    def detected(self, image: Tensor, words: Tensor) -> Tensors:
        best = self.best(self.score(image)[..., 0])
        queries = image.gather(1, best[..., None].expand(-1, -1, WIDTH))
        return {"logits": queries @ words.mT, "boxes": (self.boxes(queries) + self.anchors[best]).sigmoid()}

    def best(self, scores: Tensor) -> Tensor:
        return scores.topk(QUERIES, 1).indices


class CutDetector(Detector):
    """The text is cut to its longest sample by Python, so regions are rewritten."""

    def forward(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensors:
        longest = int(attention_mask.sum(1).max().item())
        return super().forward(pixels, input_ids[:, :longest], attention_mask[:, :longest])


class SortingDetector(CutDetector):
    def best(self, scores: Tensor) -> Tensor:
        return scores.sort(1, descending=True).indices[:, :QUERIES]


class SinglePositionDetector(CutDetector):
    """Finds one position at a time."""

    def best(self, scores: Tensor) -> Tensor:
        found: list[Tensor] = []
        for _ in range(QUERIES):
            found.append(scores.argmax(1, keepdim=True))
            scores = scores.scatter(1, found[-1], -1e9)
        return torch.cat(found, 1)


class ContrastDetector(Detector):
    """What little differs between positions is all that counts, and norms are in single precision whatever the weights are."""

    def detected(self, image: Tensor, words: Tensor) -> Tensors:
        contrast = (image.float() - image.float().mean(1, keepdim=True)) / FAINT
        return {"contrast": contrast.to(image.dtype), "words": words}


class CutContrastDetector(ContrastDetector, CutDetector):
    pass


class Storing(Layer):
    """Stores what it computes in an attribute."""

    def forward(self, x: Tensor, read: Tensor, hidden: Tensor | None, read_hidden: Tensor | None) -> Tensor:
        self.seen = super().forward(x, read, hidden, read_hidden)
        return self.seen


class StoringDetector(CutDetector):
    """Has a layer in front that stores what it computes."""

    def __init__(self, layer: type[Layer] = Storing) -> None:
        super().__init__()
        self.fusion, self.first = Fusion(1), layer()

    def fused(self, image: Tensor, words: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return super().fused(self.first(image, words, None, hidden), words, hidden)


class ReadingDetector(StoringDetector):
    """Reads what this layer has stored."""

    def detected(self, image: Tensor, words: Tensor) -> Tensors:
        return {**super().detected(image, words), "seen": self.first.seen.mean(1)}


class Appending(Layer):
    """Appends what it computes to a list."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor, read: Tensor, hidden: Tensor | None, read_hidden: Tensor | None) -> Tensor:
        self.seen.append(super().forward(x, read, hidden, read_hidden))
        return self.seen[-1]


class ListingDetector(StoringDetector):
    """Reads the last of what one of its layers has appended to a list."""

    def __init__(self) -> None:
        super().__init__(Appending)

    def detected(self, image: Tensor, words: Tensor) -> Tensors:
        return {**super().detected(image, words), "seen": self.first.seen[-1].mean(1)}


class RememberingDetector(CutDetector):
    """Tells how far the image has moved since the last call."""

    last: Tensor | None = None

    def detected(self, image: Tensor, words: Tensor) -> Tensors:
        before, self.last = self.last, image.mean(1)
        return {**super().detected(image, words), "moved": self.last if before is None else self.last - before}


def detector(kind: type[Detector], faint: float = FAINT) -> tuple[Detector, Tensors]:
    """A detector, and images whose pixels differ by ``faint`` with a text."""
    torch.manual_seed(0)
    return lively(kind()), {"pixels": 1.0 + faint * torch.randn(3, 3, 32, 32), **text(3, 7)}
