"""What objectives on scenes share: :class:`SceneObjective`, and :class:`DenseSceneObjective` for training from scratch.

Axes: B pictures (pairs of pictures, of statements), S texts about each, T tokens of a text, N vision tokens, C their width.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from madtp.pruned import PrunedModel
from madtp.training.batch_shares import Batch
from zoo.blip.surviving_tokens import surviving_mask
from zoo.objectives.auxiliary_heads import PatchHeads, faded
from zoo.objectives.base import FEATURE_WEIGHT, Metrics, ModelT, Objective, OutputT
from zoo.objectives.scene_batches import Picture, draw_batch
from zoo.scenes.objects import draws_for
from zoo.scenes.single import captions

PADDING = {"input_ids": 0, "attention_mask": 0, "answer_ids": 0, "answer_mask": 0}
"""With what the texts of a batch are padded."""

_CAPTION_STREAM = 2
"""Random stream of the captions of a left picture; the right one has the next. Scenes draw from the streams before."""

QUESTION_STREAM = 4
"""Random stream of the questions about a left picture; the right one has the next."""

_HELD_OUT_BATCH = 64


class SceneObjective(Objective[ModelT, OutputT]):
    """What a model learns from scenes.

    Attributes:
        data: Name of the data set that the model is tested on.
        samples: Plural noun for the B samples of a batch.
        auxiliary_weight: Weight of the losses of :attr:`heads`, where there are any. It falls along a cosine to ``fade_to`` of
            it at the end of the run.
        fade_to: Fraction of ``auxiliary_weight`` that is left at the end.
    """

    data: ClassVar[str]
    samples: ClassVar[str] = "pictures"
    auxiliary_weight: float = 1.0
    fade_to: float = 0.1

    @abstractmethod
    def batch(self, seed: int, split: str, first_pair: int, start: int, rows: range) -> Batch:
        """Return the samples ``start + rows``, counted from the pair ``first_pair`` on, with texts about them."""

    @abstractmethod
    def scores(self, outputs: Sequence[OutputT], batches: Sequence[Batch]) -> dict[str, float]:
        """Return how good outputs on held-out batches are: a quick check during training, other than ``madtp eval``."""

    def held_out(self, seed: int, items: int) -> list[Batch]:
        """Return batches of held-out samples, ``items`` rounded up to whole batches."""
        starts = range(0, items, _HELD_OUT_BATCH)
        return [self.batch(seed, "val", 0, start, range(_HELD_OUT_BATCH)) for start in starts]

    def auxiliary(self, progress: float) -> float:
        """Return the weight of auxiliary losses after this fraction of a run, 0 to 1."""
        return self.auxiliary_weight * faded(progress, self.fade_to)


class DenseSceneObjective(SceneObjective[ModelT, OutputT]):
    """An objective by which a model can be trained from scratch.

    Labels of the task alone teach a small model nothing in reasonable time. So :attr:`patches`, heads that are discarded
    afterwards, read off each vision token what its patch shows.
    """

    patches: PatchHeads

    @abstractmethod
    def add_patch_heads(self) -> None:
        """Set :attr:`patches`, with random weights."""

    @abstractmethod
    def patch_batch(self, seed: int, split: str, first_pair: int, start: int, rows: range) -> Batch:
        """Return the same samples as :meth:`batch`, with annotations of patches but without texts."""

    @abstractmethod
    def patch_losses(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Return the loss of :attr:`patches` alone, running as little as possible of the model, and metrics."""

    @abstractmethod
    def dense_losses(self, batch: Batch, progress: float, patch_weight: float) -> tuple[Tensor, Metrics]:
        """Return the loss of the task, the heads and :attr:`patches`, and metrics.

        Args:
            batch: The whole batch.
            progress: Fraction of the run that is done, 0 to 1.
            patch_weight: Weight of the patch loss at the start; it falls as other auxiliary losses do.
        """

    def trained(self) -> nn.ModuleDict:
        """Return all modules that dense training trains."""
        return nn.ModuleDict({"module": self.module, "heads": self.heads, "patches": self.patches})


class PictureObjective(DenseSceneObjective[ModelT, OutputT]):
    """What a model learns from single pictures.

    Args:
        model: The model, from the zoo.
        texts: S, how many texts a call has for each picture.
        vision_width: C, the width of vision tokens.
    """

    def __init__(self, model: ModelT, texts: int, vision_width: int) -> None:
        super().__init__(model, texts)
        self.vision_width = vision_width

    @property
    def tower(self) -> nn.Module:
        """The module that returns vision tokens ``[B, N, C]``, class token first."""
        return self.model.get_submodule("visual_encoder")

    def encode_images(self, images: Tensor) -> None:
        """Run :attr:`tower` on images ``[B, 3, H, W]``, and as little else as possible."""
        self.tower(images)

    def batch(self, seed: int, split: str, first_pair: int, start: int, rows: range) -> Batch:
        pictures, tensors = draw_batch(seed, split, 2 * first_pair + start + rows.start, len(rows))
        return {**tensors, **self.encode_texts(pictures)}

    @abstractmethod
    def encode_texts(self, pictures: Sequence[Picture]) -> dict[str, Tensor]:
        """Return texts about B pictures, as tensors of a batch."""

    def pick_captions(self, pictures: Sequence[Picture], texts: int) -> list[str]:
        """Return ``texts`` captions of each picture, all of different orders."""
        chosen = []
        for picture in pictures:
            of_picture = captions(picture.things)
            draws = draws_for(picture.seed, picture.split, picture.index, _CAPTION_STREAM + picture.side)
            chosen += [of_picture[place] for place in draws.some(len(of_picture), texts)]
        return chosen

    def add_patch_heads(self) -> None:
        self.patches = PatchHeads(self.vision_width)

    def patch_batch(self, seed: int, split: str, first_pair: int, start: int, rows: range) -> Batch:
        return draw_batch(seed, split, 2 * first_pair + start + rows.start, len(rows))[1]

    def patch_losses(self, batch: Batch) -> tuple[Tensor, Metrics]:
        with _outputs_of(self.tower) as tokens:
            self.encode_images(batch["images"])
        loss, shape_accuracy = self.patches(tokens[0], batch)
        return loss, {"patch": loss.detach(), "shape": shape_accuracy}

    def dense_losses(self, batch: Batch, progress: float, patch_weight: float) -> tuple[Tensor, Metrics]:
        with _outputs_of(self.tower) as tokens:
            output: OutputT = self.module(**self.inputs(batch))
        loss, metrics = self.losses(self.module, batch, output, progress)
        patch, shape_accuracy = self.patches(tokens[0], batch)
        weight = patch_weight * faded(progress, self.fade_to)
        return loss + weight * patch, {**metrics, "patch": patch.detach(), "shape": shape_accuracy}

    def image_token_distance(self, student: nn.Module, tokens: Tensor, target: Tensor) -> Tensor:
        """Return one minus the cosine between vision tokens and the teacher's, ``[B, N, C]``, averaged over survivors.

        Only tokens of a pruned student that survive are compared. Tokens of a smaller image, or merged ones, correspond to none
        of the teacher's: their distance is 0.
        """
        if not isinstance(student, PrunedModel):
            return tokens.new_zeros(())
        path = next(path for path, inner in self.module.named_modules() if inner is self.tower)
        return FEATURE_WEIGHT * _token_distance(tokens, target, surviving_mask(student, path))


def _token_distance(tokens: Tensor, target: Tensor, kept: Tensor | None) -> Tensor:
    """Average over the tokens that are kept, ``[B, N]``; None keeps all."""
    distance = 1 - F.cosine_similarity(tokens, target, dim=-1)
    return distance.mean() if kept is None else (distance * kept).sum() / kept.sum()


@contextmanager
def _outputs_of(tower: nn.Module) -> Iterator[list[Tensor]]:
    """Collect what a module returns inside the ``with`` block."""
    outputs: list[Tensor] = []
    handle = tower.register_forward_hook(lambda module, arguments, output: outputs.append(output))
    try:
        yield outputs
    finally:
        handle.remove()


def text_inputs(batch: Batch) -> dict[str, Tensor]:
    """Return images, texts and their mask of a batch."""
    return {name: batch[name] for name in ("images", "input_ids", "attention_mask")}
