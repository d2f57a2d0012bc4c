"""Scenes, drawn by rule, in the interface of the data sets that lie in files: `scenes`."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from PIL import Image

from zoo.datasets.records import ImageSource, PairStatement
from zoo.datasets.registry import DataEntry, Request, register_data
from zoo.scenes.dataset import Sample, draw_sample
from zoo.scenes.objects import SPLITS

SIZE = 2048
"""Samples of a split where no limit says otherwise."""


def open_scenes(request: Request) -> tuple[list[Any], ImageSource]:
    """Statements about pairs of pictures, the same as :class:`zoo.scenes.SceneDataset`."""
    records = []
    for index in range(request.limit or SIZE):
        statement = draw_sample(request.seed, request.split, index).statements[0]
        name = f"scenes-{request.seed}-{request.split}-{index}"
        images = (f"{name}-left", f"{name}-right")
        records.append(PairStatement(name, images, statement.text, int(statement.label), statement.kind))
    return records, picture


def picture(name: str) -> Image.Image:
    """Draw the picture of a name such as "scenes-0-test-17-left"."""
    _, seed, split, index, side = name.split("-")
    pixels = _drawn(int(seed), split, int(index)).images[("left", "right").index(side)]
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


@lru_cache(maxsize=8)
def _drawn(seed: int, split: str, index: int) -> Sample:
    """The two pictures of a pair are asked for one after the other, and drawn together."""
    return draw_sample(seed, split, index)


register_data(
    DataEntry(
        "scenes",
        open_scenes,
        "true or false statements about two drawn pictures",
        tasks=("reasoning",),
        splits=tuple(SPLITS),
        made_by_rule=True,
    )
)
