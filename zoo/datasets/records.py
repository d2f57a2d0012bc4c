"""What data sets hold: a record for each sample, with plain text and names of images. Start with the three records.

A :class:`DataSet` joins records with a function that opens their images and a transform; its items are of class
:class:`Sample`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeVar

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from madtp.errors import DataError


class Record(Protocol):
    """What all records have: a name that is unique in the data set, and names of images."""

    @property
    def id(self) -> str: ...

    @property
    def images(self) -> tuple[str, ...]: ...


R = TypeVar("R", bound=Record)
ImageSource = Callable[[str], Image.Image]
"""Opens an image of a data set by its name, in RGB."""

Transform = Callable[[Image.Image], Tensor]
"""Makes the tensor ``[3, H, W]`` that models take from an image."""


@dataclass(frozen=True)
class PairStatement:
    """A statement about a left and a right image.

    Attributes:
        id: Its name.
        images: Names of the left and the right image.
        statement: The text.
        label: 1 if the statement is true, else 0.
        kind: Groups statements; "" where no groups are known.
    """

    id: str
    images: tuple[str, str]
    statement: str
    label: int
    kind: str = ""


@dataclass(frozen=True)
class CaptionedImage:
    """An image with all its captions; of use for captioning and for retrieval."""

    id: str
    images: tuple[str]
    captions: tuple[str, ...]


@dataclass(frozen=True)
class Question:
    """A question about an image.

    Attributes:
        id: Its name.
        images: The name of the image.
        question: The text.
        answers: The answers of everyone who was asked; none where they are secret.
        kind: Groups questions.
        weight: What all answers together count in training.
    """

    id: str
    images: tuple[str]
    question: str
    answers: tuple[str, ...] = ()
    kind: str = ""
    weight: float = 1.0

    def weighted_answers(self) -> dict[str, float]:
        """Each different answer with its share, as the training loss weighs it."""
        return {answer: self.weight * count / len(self.answers) for answer, count in Counter(self.answers).items()}


@dataclass(frozen=True)
class Sample(Generic[R]):
    """A record and its transformed images, ``[I, 3, H, W]`` in the order of the record."""

    record: R
    images: Tensor


class DataSet(Dataset[Sample[R]], Generic[R]):
    """Records of one split with their images, opened when asked for.

    Attributes:
        name: Of the data set.
        split: Of the data set.
        records: Of all samples, in the order of the file.
        transform: Applied to each image; None gives pixels, uint8.
    """

    def __init__(
        self, name: str, split: str, records: Sequence[R], source: ImageSource, transform: Transform | None = None
    ) -> None:
        if not records:
            raise DataError(f"{name}, split {split!r}, holds no samples.")
        twice = [name for name, count in Counter(record.id for record in records).items() if count > 1]
        if twice:
            raise DataError(f"{name}, split {split!r}, holds {twice[0]!r} more than once; its file is damaged.")
        self.name = name
        self.split = split
        self.records = tuple(records)
        self.transform = transform
        self._source = source

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample[R]:
        if not 0 <= index < len(self.records):
            raise IndexError(f"sample {index} of {len(self.records)} of {self.name}")
        record = self.records[index]
        transform = to_pixels if self.transform is None else self.transform
        return Sample(record, torch.stack([transform(self._source(name)) for name in record.images]))

    @property
    def source(self) -> ImageSource:
        """Opens an image by its name."""
        return self._source

    def with_records(self, records: Sequence[Any]) -> DataSet[Any]:
        """Return the same images with other records."""
        return DataSet(self.name, self.split, records, self._source, self.transform)


def one_caption_each(data: DataSet[CaptionedImage]) -> DataSet[CaptionedImage]:
    """Return a data set in which every caption is a sample of its own, as training needs it."""
    return data.with_records(
        [
            replace(record, id=f"{record.id}#{number}", captions=(caption,))
            for record in data.records
            for number, caption in enumerate(record.captions)
        ]
    )


def to_pixels(image: Image.Image) -> Tensor:
    """Return an RGB image as uint8, ``[3, H, W]``."""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 3).permute(2, 0, 1).contiguous()
