"""Momentum contrast, matching and re-ranking: against plain computations, and with pruned models."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import small_blip as tasks
import small_clip
import torch
from hypothesis import given
from hypothesis import strategies as st
from process_group import run_workers
from reranking import rerank
from torch import Tensor, nn
from torch.nn import functional as F

import madtp
from madtp.errors import ConfigError, DataError
from madtp.processes import current
from zoo import load_checkpoint
from zoo.blip.matching import LEFT_OUT, matching_loss
from zoo.objectives.momentum_contrast import MomentumContrast, SampleFeatures

WIDTH = tasks.SMALL.embedding


def batch(seed: int, size: int = 3) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(seed)
    made = tasks.inputs("retrieval", batch=size)
    return made.pop("images"), made


def contrast(queue: int = 8, decay: float = 0.9, strength: float = 1.0) -> MomentumContrast:
    """Without dropout, so that what is computed twice is equal."""
    return MomentumContrast(tasks.small("retrieval", strength=strength), WIDTH, queue=queue, decay=decay).eval()


def test_loss_equals_a_plain_computation() -> None:
    trainer, (images, texts) = contrast(), batch(0)
    samples = torch.tensor([4, 4, 9])
    trainer.idx_queue[0, 3] = 9
    image_queue, text_queue, ids = trainer.image_queue.clone(), trainer.text_queue.clone(), trainer.idx_queue[0].clone()
    found = trainer.model(images=images, **texts)
    loss = trainer(found, images, texts, samples, alpha=0.4)
    teacher = trainer.follower(images=images, **texts)
    expected = 0.0
    for query, soft, keys, queue in (
        (found.image_features, teacher.image_features, teacher.text_features, text_queue),
        (found.text_features, teacher.text_features, teacher.image_features, image_queue),
    ):
        every = torch.cat([keys.T, queue], dim=1)
        for row, sample in enumerate(samples):
            matches = torch.cat([samples == sample, ids == sample]).float()
            target = 0.4 * (found.scale * soft[row] @ every).softmax(0) + 0.6 * matches / matches.sum()
            expected -= (target * (found.scale * query[row] @ every).log_softmax(0)).sum() / 6
    torch.testing.assert_close(loss, expected)
    loss.backward()
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.grad is not None}
    assert {"temp", "vision_proj.weight", "text_encoder.encoder.layer.0.attention.self.query.weight"} <= trained
    assert all(parameter.grad is None for parameter in trainer.follower.parameters())


def test_the_copy_follows() -> None:
    trainer, (images, texts) = contrast(decay=0.75), batch(0)
    start = [p.clone() for p in trainer.follower.parameters()]
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(1)
    trainer(trainer.model(images=images, **texts), images, texts, torch.arange(3), alpha=0.0)
    for before, after in zip(start, trainer.follower.parameters(), strict=True):
        torch.testing.assert_close(after, before + 0.25)
        assert not after.requires_grad


@given(sizes=st.lists(st.integers(1, 7), min_size=1, max_size=5))
def test_queues_hold_the_latest_features(sizes: list[int]) -> None:
    trainer = contrast(queue=5)
    seen: list[int] = []
    for size in sizes:
        samples = torch.arange(len(seen), len(seen) + size)
        features = samples[:, None].expand(-1, WIDTH).float()
        trainer._enqueue(SampleFeatures(features, -features, samples))
        seen += samples.tolist()
    held = trainer.idx_queue[0].tolist()
    assert sorted(i for i in held if i >= 0) == seen[-5:]
    for place, sample in enumerate(held):
        if sample >= 0:
            assert (trainer.image_queue[:, place] == sample).all()
            assert (trainer.text_queue[:, place] == -sample).all()


@pytest.mark.parametrize("family", ["BLIP", "CLIP"])
def test_published_training_state_is_read(tmp_path: Path, family: str) -> None:
    """Copies stand beside the weights in published files, with `_m` in their names."""
    if family == "BLIP":
        trainer, copied = contrast(), ("visual_encoder", "text_encoder", "vision_proj", "text_proj")
    else:
        trainer = MomentumContrast(small_clip.small(), small_clip.SMALL.embedding, queue=8)
        copied = ("visual", "transformer", "token_embedding", "ln_final", "text_projection", "positional_embedding")
    torch.manual_seed(3)
    own = {key: torch.rand_like(value) for key, value in trainer.model.state_dict().items()}
    published = dict(own)
    for key, value in own.items():
        name, dot, rest = key.partition(".")
        if name in copied:
            published[f"{name}_m{dot}{rest}"] = value + 1
    published |= {name: torch.rand_like(getattr(trainer, name)) for name in ("image_queue", "text_queue")}
    published |= {"idx_queue": torch.full((1, 8), 3), "ptr_queue": torch.tensor([5])}
    torch.save({"model": published}, tmp_path / "model_base_retrieval_coco.pth")
    report = load_checkpoint(trainer, tmp_path / "model_base_retrieval_coco.pth")
    assert (report.format, report.unused) == (f"{family}, with momentum", ())
    assert set(report.absent) <= {
        "follower.itm_head.weight",
        "follower.itm_head.bias",
        "follower.temp",
        "follower.logit_scale",
    }
    for key, value in own.items():
        assert torch.equal(trainer.model.state_dict()[key], value)
        if key.partition(".")[0] in copied:
            assert torch.equal(trainer.follower.state_dict()[key], value + 1)
    assert torch.equal(trainer.image_queue, published["image_queue"])
    assert int(trainer.ptr_queue) == 5


def test_impossible_settings_are_refused() -> None:
    model = tasks.small("retrieval")
    with pytest.raises(ConfigError, match="queue 0"):
        MomentumContrast(model, WIDTH, queue=0)
    with pytest.raises(ConfigError, match="another model of the same architecture"):
        MomentumContrast(model, WIDTH, follower=model)
    with pytest.raises(ConfigError, match="another model of the same architecture"):
        MomentumContrast(model, WIDTH, follower=nn.Linear(2, 2))


def test_matching_loss_draws_wrong_pairs_of_other_images() -> None:
    model, (images, texts) = tasks.small("retrieval"), batch(1, size=4)
    samples = torch.tensor([0, 0, 1, 1])
    found = model(images=images, **texts)
    calls: list[dict[str, Tensor]] = []

    class Recorded:
        def __call__(self, **given: Tensor) -> Any:
            calls.append(given)
            return model(**given)

    loss = matching_loss(Recorded(), found, texts["input_ids"], texts["attention_mask"], samples)
    wrong = calls[0]
    assert len(wrong["input_ids"]) == 8

    def owner(rows: Tensor, row: Tensor) -> int:
        return int(samples[next(i for i, own in enumerate(rows) if torch.equal(own, row))])

    for pair in range(4):
        assert torch.equal(wrong["input_ids"][pair], texts["input_ids"][pair])
        assert owner(found.image_tokens, wrong["image_tokens"][pair]) != samples[pair]
        assert torch.equal(wrong["image_tokens"][4 + pair], found.image_tokens[pair])
        assert owner(texts["input_ids"], wrong["input_ids"][4 + pair]) != samples[pair]
    logits = torch.cat([found.match_logits, model(**wrong).match_logits])
    torch.testing.assert_close(loss, F.cross_entropy(logits, torch.tensor([1] * 4 + [0] * 8)))
    loss.backward()
    assert model.itm_head.weight.grad is not None


def test_matching_needs_pairs_of_several_images() -> None:
    model, (images, texts) = tasks.small("retrieval"), batch(1)
    mask = texts["attention_mask"]
    with pytest.raises(DataError, match="all 3 pairs of the batch are of one image"):
        matching_loss(model, model(images=images, **texts), texts["input_ids"], mask, torch.zeros(3))
    with pytest.raises(DataError, match="needs a call of the model with images and texts"):
        matching_loss(model, model(images=images), texts["input_ids"], mask, torch.arange(3))


@torch.no_grad()
def test_reranking_equals_matching_every_candidate() -> None:
    model = tasks.small("retrieval")
    (images, _), (_, texts) = batch(2, size=3), batch(3, size=5)
    encoded, described = model(images=images), model(**texts)
    similar = encoded.image_features @ described.text_features.T
    to_texts, to_images = rerank(
        model, similar, encoded.image_tokens, texts["input_ids"], texts["attention_mask"], candidates=2, batch=3
    )
    for scores, products, images_first in ((to_texts, similar, True), (to_images, similar.T, False)):
        for row in range(len(products)):
            best = products[row].topk(2).indices.tolist()
            for column in range(products.shape[1]):
                image, text = (row, column) if images_first else (column, row)
                pair = {name: value[text, None] for name, value in texts.items()}
                logits = model(image_tokens=encoded.image_tokens[image, None], **pair).match_logits
                expected = products[row, column] + logits[0, 1] if column in best else torch.tensor(LEFT_OUT)
                torch.testing.assert_close(scores[row, column], expected, atol=1e-4, rtol=1e-4)


def test_training_a_pruned_model() -> None:
    images, texts = batch(4)
    example = {"images": images, **texts}
    config = madtp.PruningConfig(alignment_tokens=5, temperature=2.0)
    pruned: Any = madtp.rewrite(tasks.small("retrieval"), example, config=config)
    follower = copy.deepcopy(pruned)
    follower.load_state_dict(tasks.small("retrieval", seed=1).state_dict(), strict=False)
    trainer = MomentumContrast(pruned, WIDTH, follower=follower, queue=8)
    found = trainer.model(**example)
    alignment = pruned.alignment_loss()
    samples = torch.arange(3)
    matched = matching_loss(pruned, found, texts["input_ids"], texts["attention_mask"], samples)
    loss = trainer(found, images, texts, samples, alpha=0.4) + matched + 0.1 * alignment
    loss.backward()
    assert all(parameter.grad is not None for parameter in pruned.parameters())
    assert torch.isfinite(loss)


def shared_steps(folder: Path, samples: list[int]) -> dict[str, Any]:
    """In workers, and alone: two steps on this process's part of a batch; gradients as DistributedDataParallel averages."""
    own = current()
    images, texts = batch(0, len(samples))
    share = slice(len(samples) * own.rank // own.size, len(samples) * (own.rank + 1) // own.size)
    torch.manual_seed(1)
    trainer, losses = contrast(queue=5), []
    for _ in range(2):
        trainer.zero_grad()
        part = {name: value[share] for name, value in texts.items()}
        found = trainer.model(images=images[share], **part)
        loss = trainer(found, images[share], part, torch.tensor(samples)[share], alpha=0.4)
        loss.backward()
        losses.append(own.mean(loss.detach()))
    trained = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    gradients = {f"gradient of {name}": own.mean(gradient) for name, gradient in trained.items()}
    return {"losses": torch.stack(losses), **dict(trainer.named_buffers()), **gradients}


@pytest.mark.slow
def test_two_processes_compare_and_fill_the_queues_as_one_does(tmp_path: Path) -> None:
    samples = [4, 9, 4, 7]
    alone = shared_steps(tmp_path, samples)
    for found in run_workers(shared_steps, tmp_path, samples=samples):
        assert set(found) == set(alone)
        for name, value in alone.items():
            torch.testing.assert_close(found[name], value, msg=lambda text, name=name: f"{name}: {text}")
    assert alone["ptr_queue"] == 3
    assert alone["idx_queue"].tolist() == [[9, 4, 7, 7, 4]]
