"""Dense training of a BLIP-NLVR model on scenes: `madtp train zoo/recipes/blip_nlvr_mini.toml OUTPUT`.

From true-or-false labels alone a small model learns nothing in reasonable time. So the vision tokens also predict, by
linear heads that are thrown away afterwards, colour, shape and size of the object that their patch shows and whether its
centre lies there; for the first `patch_steps` steps that is the whole loss. Afterwards every pair is seen once and
asked about many times, vision being the expensive half; and the text's class token also predicts how often each picture
shows what the statement speaks of and where the things of a spatial relation are.

:func:`build` and :func:`finish` are what :mod:`madtp.training.run` calls.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import zoo
from madtp.errors import ConfigError
from madtp.training.batch_shares import Batch
from madtp.training.config import TrainingConfig, from_plain
from madtp.training.engine import Learner, TrainingResult
from zoo.blip.nlvr import BlipNlvr
from zoo.blip.text import TextLayer
from zoo.objectives.auxiliary_heads import PatchHeads, StatementHeads, faded, statement_losses
from zoo.objectives.scene_batches import make_batch
from zoo.recipes.model_card import measure, write_release
from zoo.scenes import draw_sample
from zoo.scenes.tokens import PAD, VOCABULARY

TEXT_PADDING = {"input_ids": VOCABULARY.index(PAD), "attention_mask": 0}
"""With what the statements of a batch are padded."""


@dataclass(frozen=True)
class Settings:
    """What the recipe can be told.

    Attributes:
        model: zoo name of a model with `encode_images` and `classify`.
        pairs_per_step: picture pairs in a batch.
        statements_per_pair: statements asked about each.
        patch_steps: steps at the start in which only patch labels are learned.
        patch_weight, count_weight, place_weight: weights of the auxiliary losses afterwards.
        fade_to: what these weights fall to by the end, by a cosine, as a fraction.
        kinds: kinds of statement to train on, one listed twice being twice as frequent; none stands for all alike.
        data_seed: edition of the training data.
        evaluation_pairs: held-out pairs (with 8 statements each) of each evaluation during training.
        test_items: held-out test items that the model card reports on.
    """

    model: str = "blip_nlvr_mini"
    pairs_per_step: int = 32
    statements_per_pair: int = 16
    patch_steps: int = 500
    patch_weight: float = 1.0
    count_weight: float = 1.0
    place_weight: float = 2.0
    fade_to: float = 0.1
    kinds: tuple[str, ...] = ()
    data_seed: int = 0
    evaluation_pairs: int = 128
    test_items: int = 8192


class Pupil(nn.Module):
    """The model with linear heads that read patch labels off its vision tokens."""

    def __init__(self, model: BlipNlvr) -> None:
        super().__init__()
        self.model = model
        self.patches = PatchHeads(model.config.vision.width)
        self.statements = StatementHeads(model.config.text.width)

    def read(self, ids: Tensor, mask: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """Statements [B, S, T], mask [B, S, T], encoded images [B, N, C] -> class tokens [B * S, C].

        Equal to what `model.classify` reads, on images repeated S times, without computing their keys and values S times: for
        cross-attention the statements of a pair are simply more queries.
        """
        encoder = self.model.text_encoder
        pairs, statements, length = ids.shape
        keep = mask.flatten(0, 1).bool()[:, None, None, :]
        x = encoder.embeddings(ids.flatten(0, 1))
        for layer in encoder.encoder.layer:
            assert isinstance(layer, TextLayer)
            x = layer.attention(x, keep)
            x = layer.crossattention(x.reshape(pairs, statements * length, -1), first, second)
            x = x.reshape(pairs * statements, length, -1)
            x = layer.output(layer.intermediate(x), x)
        return x[:, 0]


def _both(batch: Batch) -> Batch:
    """Annotations [B, 2, ...] of pairs as those of all first and then all second pictures, [2B, ...]."""
    return {name: batch[name].transpose(0, 1).flatten(0, 1) for name in ("labels_of_patches", "outline", "centre")}


def build(settings: Mapping[str, Any], training: TrainingConfig) -> Learner:
    """Return the learner that :func:`madtp.training.engine.fit` trains."""
    chosen = from_plain(Settings, settings, "settings")
    torch.manual_seed(training.seed)
    model = zoo.create(chosen.model)
    if not isinstance(model, BlipNlvr):
        raise ConfigError(f"the recipe trains models of the family BLIP-NLVR; {chosen.model} is another")
    pupil = Pupil(model)

    def batch(step: int, rows: range) -> Batch:
        asked = chosen.statements_per_pair if step >= chosen.patch_steps else 0
        start = step * chosen.pairs_per_step + rows.start
        return make_batch("train", chosen.data_seed, start, len(rows), asked, chosen.kinds)

    def loss(module: nn.Module, batch: Batch, step: int) -> tuple[Tensor, dict[str, float | Tensor]]:
        assert isinstance(module, Pupil)
        first, second = module.model.encode_images(batch["images"])
        patch, shape_accuracy = module.patches(torch.cat([first, second]), _both(batch))
        if "labels" not in batch:
            return patch, {"patch": patch.detach(), "shape": shape_accuracy}
        tokens = module.read(batch["input_ids"], batch["attention_mask"], first, second)
        logits = module.model.cls_head(tokens).float()
        found, accuracy = statement_losses(module.statements, logits, tokens, batch)
        task, count, place = found["task"], found["count"], found["place"]
        fade = faded((step - chosen.patch_steps) / max(1, training.steps - chosen.patch_steps), chosen.fade_to)
        total = task + fade * (chosen.patch_weight * patch + chosen.count_weight * count + chosen.place_weight * place)
        return total, {
            "task": task.detach(),
            "accuracy": accuracy,
            "count": count.detach(),
            "place": place.detach(),
            "patch": patch.detach(),
            "shape": shape_accuracy,
        }

    held_out: list[Batch] = []
    kinds: list[str] = []

    def evaluate(module: nn.Module) -> dict[str, float]:
        assert isinstance(module, Pupil)
        if not held_out:
            for start in range(0, chosen.evaluation_pairs, 32):
                pairs = min(32, chosen.evaluation_pairs - start)
                held_out.append(make_batch("val", chosen.data_seed, start, pairs, 8))
                kinds.extend(
                    statement.kind
                    for number in range(pairs)
                    for statement in draw_sample(chosen.data_seed, "val", start + number, 8).statements
                )
        right = []
        for group in held_out:
            first, second = module.model.encode_images(group["images"])
            logits = module.model.cls_head(module.read(group["input_ids"], group["attention_mask"], first, second))
            right += (logits.argmax(-1) == group["labels"].flatten()).tolist()
        by_kind = {
            kind: sum(r for r, k in zip(right, kinds, strict=True) if k == kind) / kinds.count(kind)
            for kind in sorted(set(kinds))
        }
        return {"accuracy": sum(right) / len(right), **by_kind}

    return Learner(
        module=pupil,
        batch=batch,
        loss=loss,
        evaluate=evaluate,
        card={
            "model": chosen.model,
            "data": "scenes",
            "settings": asdict(chosen),
            "training": training.to_dict(),
        },
        samples_per_step=chosen.pairs_per_step,
        sample_name="pairs",
        padding=TEXT_PADDING,
    )


def finish(learner: Learner, result: TrainingResult, output: Path) -> None:
    """Write `dense.safetensors` and its model card `dense.json` into the output folder."""
    assert isinstance(learner.module, Pupil)
    settings = from_plain(Settings, learner.card["settings"], "settings")
    test = measure(settings.model, settings.test_items, settings.data_seed)
    write_release(learner.module.model, output / "dense.safetensors", learner.card, test)
