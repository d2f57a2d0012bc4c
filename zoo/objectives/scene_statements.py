"""Objectives on statements about pairs of pictures: :class:`StatementObjective`, and :class:`DenseStatementObjective`.

Axes: B pairs, S statements about each, T tokens of a statement, N vision tokens of a picture, C width of a tower.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from madtp.training.batch_shares import Batch
from zoo.blip.nlvr import BlipNlvr
from zoo.metrics import accuracy, accuracy_by_kind
from zoo.objectives.auxiliary_heads import PatchHeads, StatementHeads, faded, statement_losses
from zoo.objectives.base import Metrics
from zoo.objectives.multi_text import JointStatements, ManyStatements, StatementOutput
from zoo.objectives.scene_base import DenseSceneObjective, SceneObjective, text_inputs
from zoo.objectives.scene_batches import KIND_NAMES, make_batch

_HELD_OUT_PAIRS, _HELD_OUT_STATEMENTS = 32, 8


class StatementObjective(SceneObjective[BlipNlvr, StatementOutput]):
    """Whether statements about pairs of pictures are true. Heads read off the class token what a statement is about.

    Attributes:
        kinds: Kinds of statement to train on; one that is listed twice is drawn twice as often. Empty for all kinds.
        count_weight: Weight of reading off how often each picture shows what the statement names.
        place_weight: Weight of reading off where the two things are that decide a spatial relation.
    """

    data, samples = "scenes", "pairs"
    kinds: tuple[str, ...] = ()
    count_weight: float = 1.0
    place_weight: float = 2.0

    def __init__(self, model: BlipNlvr, texts: int) -> None:
        super().__init__(model, texts)
        self.module = ManyStatements(model)
        self.statements = StatementHeads(model.config.text.width)
        self.heads["statements"] = self.statements

    def batch(self, seed: int, split: str, first_pair: int, start: int, rows: range) -> Batch:
        return make_batch(
            split, seed, first_pair + start + rows.start, len(rows), statements=self.texts, kinds=self.kinds
        )

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        return text_inputs(batch)

    def losses(
        self, module: nn.Module, batch: Batch, output: StatementOutput, progress: float
    ) -> tuple[Tensor, Metrics]:
        found, share = statement_losses(self.statements, output.logits.float(), output.class_tokens, batch)
        metrics: Metrics = {"accuracy": share, **{name: loss.detach() for name, loss in found.items()}}
        heads = self.count_weight * found["count"] + self.place_weight * found["place"]
        return found["task"] + self.auxiliary(progress) * heads, metrics

    def scores(self, outputs: Sequence[StatementOutput], batches: Sequence[Batch]) -> dict[str, float]:
        right = [o.logits.argmax(-1) == batch["labels"].flatten() for o, batch in zip(outputs, batches, strict=True)]
        return {"accuracy": float(torch.cat(right).float().mean())}

    def logits(self, output: StatementOutput) -> Tensor:
        return output.logits


class DenseStatementObjective(StatementObjective, DenseSceneObjective[BlipNlvr, StatementOutput]):
    """Statements about pairs in training from scratch: all statements about a pair read its vision tokens together.

    Heads are drawn, and losses summed, in the order in which the shipped weights were trained, so that a run can be repeated
    bit for bit.
    """

    def __init__(self, model: BlipNlvr, texts: int) -> None:
        self.patches = PatchHeads(model.config.vision.width)
        super().__init__(model, texts)
        self.joint = JointStatements(model)
        self.module = self.joint

    def add_patch_heads(self) -> None:
        """Do nothing: patch heads were drawn before the other heads."""

    def trained(self) -> nn.ModuleDict:
        return nn.ModuleDict({"module": self.module, "patches": self.patches, "heads": self.heads})

    def patch_batch(self, seed: int, split: str, first_pair: int, start: int, rows: range) -> Batch:
        return make_batch(split, seed, first_pair + start + rows.start, len(rows))

    def patch_losses(self, batch: Batch) -> tuple[Tensor, Metrics]:
        first, second = self.model.encode_images(batch["images"])
        patch, shape_accuracy = self.patches(torch.cat([first, second]), _annotation_of_pictures(batch))
        return patch, {"patch": patch.detach(), "shape": shape_accuracy}

    def dense_losses(self, batch: Batch, progress: float, patch_weight: float) -> tuple[Tensor, Metrics]:
        first, second = self.model.encode_images(batch["images"])
        patch, shape_accuracy = self.patches(torch.cat([first, second]), _annotation_of_pictures(batch))
        output = self.joint.read(batch["input_ids"], batch["attention_mask"], first, second)
        found, share = statement_losses(self.statements, output.logits.float(), output.class_tokens, batch)
        count_weight = self.auxiliary_weight * self.count_weight
        place_weight = self.auxiliary_weight * self.place_weight
        auxiliary = patch_weight * patch + count_weight * found["count"] + place_weight * found["place"]
        metrics: Metrics = {"accuracy": share, **{name: loss.detach() for name, loss in found.items()}}
        metrics |= {"patch": patch.detach(), "shape": shape_accuracy}
        return found["task"] + faded(progress, self.fade_to) * auxiliary, metrics

    def held_out(self, seed: int, items: int) -> list[Batch]:
        """Return ``items`` held-out pairs with the same number of statements each, whatever training has."""
        return [
            make_batch("val", seed, start, min(_HELD_OUT_PAIRS, items - start), statements=_HELD_OUT_STATEMENTS)
            for start in range(0, items, _HELD_OUT_PAIRS)
        ]

    def scores(self, outputs: Sequence[StatementOutput], batches: Sequence[Batch]) -> dict[str, float]:
        """Return the accuracy, and that of each kind of statement by its name."""
        answers = torch.cat([output.logits.argmax(-1) for output in outputs]).tolist()
        labels = torch.cat([batch["labels"].flatten() for batch in batches]).tolist()
        kinds = [KIND_NAMES[number] for batch in batches for number in batch["kinds"].flatten().tolist()]
        return {"accuracy": accuracy(answers, labels), **accuracy_by_kind(answers, labels, kinds)}


def _annotation_of_pictures(batch: Batch) -> Batch:
    """Return annotations ``[B, 2, ...]`` of pairs as those of all first and then all second pictures, ``[2 * B, ...]``."""
    return {name: batch[name].transpose(0, 1).flatten(0, 1) for name in ("labels_of_patches", "outline", "centre")}
