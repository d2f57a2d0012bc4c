"""Which text fits which image? :class:`Retrieval` for BLIP compares features, then matches the most similar pairs.

:class:`ClipRetrieval` for CLIP compares features alone.

Axes: I images and J texts of the data set, B samples of a batch, T tokens of a text, N image tokens, E width of the features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from madtp.evaluation.compute_meter import CallRecord, count_calls, override_dense_macs, record_apart
from madtp.evaluation.task import Result
from madtp.pruned import PrunedModel
from zoo.blip.matching import LEFT_OUT, Matcher, match
from zoo.blip.retrieval import BlipRetrieval
from zoo.blip.surviving_tokens import surviving_mask, surviving_tokens
from zoo.datasets.records import CaptionedImage, DataSet
from zoo.metrics.recall import recalls
from zoo.tasks.encode_text import RETRIEVAL_TOKENS, spell
from zoo.tasks.vocabulary import Words
from zoo.transforms.texts import clean_caption

CANDIDATES = {"coco": 256, "flickr30k": 128, "scenes_captions": 16}
"""By data set, how many texts are matched for each image, and images for each text. Those of COCO and Flickr are published."""
FEATURES, MATCHING = "features", "matching"
TOWER = "visual_encoder"
_TOGETHER = 32
"""Images that are encoded in one call before pairs are matched."""


class CaptionedImages:
    """Images and captions of a data set; the base of both tasks."""

    name = "retrieval"

    def __init__(self, data: DataSet[CaptionedImage], device: torch.device) -> None:
        self.data = data
        self.device = device
        self.captions = [caption for record in data.records for caption in record.captions]
        self.owners = [place for place, record in enumerate(data.records) for _ in record.captions]

    @property
    def ids(self) -> Sequence[str]:
        return [record.id for record in self.data.records]

    def inputs(self, samples: range) -> dict[str, Tensor]:
        """Return images ``[B, 3, H, W]`` with the first caption of each, as :meth:`texts` has it."""
        texts = [self.data.records[index].captions[0] for index in samples]
        return {"images": self.images(samples), **self.texts(texts)}

    def images(self, positions: Sequence[int]) -> Tensor:
        """Return the images at these positions of the data set, ``[B, 3, H, W]``."""
        return torch.cat([self.data[position].images for position in positions]).to(self.device)

    def texts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Return texts as arguments of the model, ``[B, T]``."""
        raise NotImplementedError

    def captions_of(self, samples: range) -> list[int]:
        """Return the positions of these images' captions among all captions."""
        return [place for place, owner in enumerate(self.owners) if owner in samples]


class Retrieval(CaptionedImages):
    """The task of BLIP, in two stages.

    Args:
        data: Images with captions.
        words: Spells captions.
        device: Device of the model.
        model: The dense model; its special tokens are read.
        candidates: How many texts are matched for each image, and images for each text. None takes :data:`CANDIDATES`.
    """

    def __init__(
        self,
        data: DataSet[CaptionedImage],
        words: Words,
        device: torch.device,
        model: BlipRetrieval,
        candidates: int | None = None,
    ) -> None:
        super().__init__(data, device)
        self.words = words
        self.config = model.config
        self.candidates = candidates or CANDIDATES.get(data.name, max(CANDIDATES.values()))
        self._stages = (Features(self), Matching(self))

    @property
    def stages(self) -> Sequence[Features | Matching]:
        return self._stages

    def texts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Return ids and mask of texts, ``[B, T]``."""
        if self.words.cleaned:
            texts = [clean_caption(text) for text in texts]
        limit = min(RETRIEVAL_TOKENS, self.config.text.positions)
        ids, mask = spell(self.words, texts, first=self.config.class_id, end=self.config.end_id, limit=limit)
        return {"input_ids": ids.to(self.device), "attention_mask": mask.to(self.device)}

    def metrics(self, results: Mapping[str, Sequence[Result]]) -> dict[str, float]:
        """Return recalls, see :func:`zoo.metrics.recall.recalls`."""
        to_texts = torch.full((len(self.ids), len(self.captions)), LEFT_OUT)
        to_images = torch.full((len(self.captions), len(self.ids)), LEFT_OUT)
        for place, result in enumerate(results[MATCHING]):
            for text, score in result["texts"]:
                to_texts[place, text] = score
            for caption, found in zip(self.captions_of(range(place, place + 1)), result["images"], strict=True):
                for image, score in found:
                    to_images[caption, image] = score
        return recalls(to_texts, to_images, self.owners)


class ClipRetrieval(CaptionedImages):
    """The task of CLIP, where features decide.

    Args:
        data: Images with captions.
        device: Device of the model.
        encode: Turns texts into ids ``[B, T]``.
    """

    def __init__(
        self, data: DataSet[CaptionedImage], device: torch.device, encode: Callable[[Sequence[str]], Tensor]
    ) -> None:
        super().__init__(data, device)
        self.encode = encode

    @property
    def stages(self) -> Sequence[Features]:
        return (Features(self),)

    def texts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Return ids of texts, ``[B, T]``."""
        return {"input_ids": self.encode(texts).to(self.device)}

    def metrics(self, results: Mapping[str, Sequence[Result]]) -> dict[str, float]:
        """Return recalls, see :func:`zoo.metrics.recall.recalls`."""
        features = results[FEATURES]
        images = torch.tensor([result["image"] for result in features])
        texts = torch.tensor([feature for result in features for feature in result["texts"]])
        similar = images @ texts.T
        return recalls(similar, similar.T, self.owners)


class Features:
    """The first stage: features of images and of their captions, of length 1."""

    name = FEATURES

    def __init__(self, task: CaptionedImages) -> None:
        self.task = task

    def run(self, model: nn.Module, samples: range, earlier: Mapping[str, Sequence[Result]]) -> list[Result]:
        """Return the features of each image, ``image``, and of its captions, ``texts``.

        In a model that prunes, ``left`` is how many tokens of the image survive.
        """
        del earlier
        captions = self.task.captions_of(samples)
        images = model(images=self.task.images(samples)).image_features.tolist()
        left = surviving_mask(model, TOWER)
        counts = [{}] * len(images) if left is None else [{"left": count} for count in left.sum(dim=1).tolist()]
        texts = model(**self.task.texts([self.task.captions[place] for place in captions])).text_features.tolist()
        owned = [[t for t, place in zip(texts, captions, strict=True) if self.task.owners[place] == i] for i in samples]
        return [
            {"image": image, "texts": own, **count} for image, own, count in zip(images, owned, counts, strict=True)
        ]


class Matching:
    """The second stage: the most similar pairs are matched.

    Encoded images are kept in memory, as the captions of any image may need them: 1.8 MB each of BLIP base, less in a pruned
    model, whose dropped tokens are left out. Images of a call are padded to the length of the image with most tokens.
    """

    name = MATCHING

    def __init__(self, task: Retrieval) -> None:
        self.task = task
        self.encoded: dict[int, Tensor] = {}
        self.records: dict[int, list[CallRecord]] = {}
        self.whole: Tensor | None = None
        self.dense_macs: dict[int, float] = {}

    def run(self, model: nn.Module, samples: range, earlier: Mapping[str, Sequence[Result]]) -> list[Result]:
        """Return the candidates of each image, ``texts``, as [caption, score].

        ``images`` holds the candidates of each of its captions as [image, score].
        """
        features = earlier[FEATURES]
        images = torch.tensor([result["image"] for result in features])
        texts = torch.tensor([feature for result in features for feature in result["texts"]])
        fullest = max(result.get("left", 0) for result in features)
        results = []
        for image in samples:
            best, captions = self._candidates(images[image] @ texts.T)
            found = self._match(model, [(image, caption) for caption in captions], best, fullest)
            of_captions = []
            for caption in self.task.captions_of(range(image, image + 1)):
                best, others = self._candidates(texts[caption] @ images.T)
                scores = self._match(model, [(other, caption) for other in others], best, fullest)
                of_captions.append([list(pair) for pair in zip(others, scores, strict=True)])
            results.append({"texts": [list(pair) for pair in zip(captions, found, strict=True)], "images": of_captions})
            if (
                image % _TOGETHER == 0
            ):  # what encoding costs is counted once, by whatever batch has the first of the images
                self._encode(model, [image])
                count_calls(self.records[image // _TOGETHER])
        return results

    def _candidates(self, similar: Tensor) -> tuple[Tensor, list[int]]:
        """Return the highest similarities of a row ``[J]`` or ``[I]``, and their places in it."""
        best, places = similar.topk(min(self.task.candidates, len(similar)))
        return best, places.tolist()

    def _match(self, model: nn.Module, pairs: Sequence[tuple[int, int]], similar: Tensor, fullest: int) -> list[float]:
        """Return the scores of pairs of an image and a caption: similarity ``[B]`` plus the logit of a match."""
        self._encode(model, [image for image, _ in pairs])
        tokens, mask = _padded([self.encoded[image] for image, _ in pairs], fullest)
        texts = self.task.texts([self.task.captions[caption] for _, caption in pairs])
        with override_dense_macs(self._dense_macs(model, texts)):
            logits = match(
                cast(Matcher, model), tokens.to(self.task.device), **texts, image_mask=mask.to(self.task.device)
            )
        scores: list[float] = (similar + logits[:, 1].cpu()).tolist()
        return scores

    def _encode(self, model: nn.Module, images: Sequence[int]) -> None:
        # Always the same images together: products of other sizes round differently, and a run may resume in the middle.
        for block in sorted({image // _TOGETHER for image in images if image not in self.encoded}):
            part = range(block * _TOGETHER, min((block + 1) * _TOGETHER, len(self.task.ids)))
            with record_apart() as self.records[block]:
                whole = model(images=self.task.images(part)).image_tokens
            self.whole = whole[:1]
            tokens, mask = surviving_tokens(model, TOWER, whole)
            counts = [tokens.shape[1]] * len(part) if mask is None else mask.sum(dim=1).tolist()
            self.encoded |= {image: own[:count].cpu() for image, own, count in zip(part, tokens, counts, strict=True)}

    def _dense_macs(self, model: nn.Module, texts: Mapping[str, Tensor]) -> float | None:
        """Return the MACs of matching a text of this length with all tokens of an image; None for a dense model."""
        if not isinstance(model, PrunedModel):
            return None
        length = texts["input_ids"].shape[1]
        if length not in self.dense_macs:
            one = {name: text[:1] for name, text in texts.items()}
            self.dense_macs[length] = model.dense_macs(image_tokens=self.whole, **one)
        return self.dense_macs[length]


def _padded(images: list[Tensor], length: int) -> tuple[Tensor, Tensor]:
    """Return images ``[K, V]`` padded with zeros, ``[B, N, V]`` with N at least ``length``, and their mask ``[B, N]``."""
    tokens, mask = (
        pad_sequence(rows, batch_first=True)
        for rows in (images, [torch.ones(len(image), dtype=torch.long) for image in images])
    )
    more = max(0, length - tokens.shape[1])
    return F.pad(tokens, (0, 0, 0, more)), F.pad(mask, (0, more))
