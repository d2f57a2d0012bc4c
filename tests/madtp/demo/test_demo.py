"""The demonstration, with models that stand in for the trained ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import zoo
from madtp.demo import measure, models, run
from madtp.errors import CheckpointError, DataError
from zoo.scenes import SceneDataset, collate

PATCHES = 144


@dataclass(frozen=True)
class FakeSite:
    name: str
    modality: str


@dataclass(frozen=True)
class FakeReport:
    sites: tuple[FakeSite, ...]


class FakePruned(nn.Module):
    """Answers "true", keeps the class token and the first patches of a first image, the last ones of a second."""

    report = FakeReport((FakeSite("v0", "image"), FakeSite("v1", "image"), FakeSite("t0", "text")))

    def __init__(self, kept: tuple[int, int], cost: float) -> None:
        super().__init__()
        self.kept = kept
        self.cost = cost
        self.pruning = True
        self.samples = 0

    @property
    def madtp(self) -> FakePruned:
        """What a pruned model has in its child of that name."""
        return self

    @contextmanager
    def dense(self) -> Iterator[None]:
        self.pruning = False
        yield
        self.pruning = True

    def macs(self) -> float:
        return self.cost if self.pruning else 100e6

    def forward(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        self.samples = len(images)
        return torch.tensor([[0.0, 1.0]]).expand(len(images), 2)

    def token_counts(self) -> dict[str, Tensor]:
        counts = {f"v{i}": torch.full((2 * self.samples,), k + 1) for i, k in enumerate(self.kept)}
        return {**counts, "t0": torch.full((self.samples,), 5)}

    def kept_tokens(self) -> dict[str, Tensor]:
        masks = {}
        for i, count in enumerate(self.kept):
            patch = torch.arange(PATCHES).expand(2 * self.samples, PATCHES)
            first = torch.arange(2 * self.samples).unsqueeze(1) < self.samples
            kept = torch.where(first, patch < count, patch >= PATCHES - count)
            masks[f"v{i}"] = torch.cat([torch.ones(2 * self.samples, 1, dtype=torch.bool), kept], dim=1)
        return masks


@pytest.fixture
def entries(monkeypatch: pytest.MonkeyPatch) -> list[models.Entry]:
    fakes = [
        models.DenseEntry("dense", zoo.create("blip_nlvr_mini")),
        models.PrunedEntry("pruned −50%", FakePruned((PATCHES // 2, PATCHES // 4), 50e6)),
        models.PrunedEntry("pruned −80%", FakePruned((9, 3), 20e6)),
    ]
    monkeypatch.setattr(measure, "TIMING_ROUNDS", 2)
    monkeypatch.setattr(run, "load_models", lambda folder: fakes)
    return fakes


def test_the_demo_measures_prints_and_draws(entries: list[models.Entry], tmp_path: Path) -> None:
    console = Console(record=True, width=130)
    result = run.run_demo(tmp_path, samples=40, seed=0, console=console)
    printed = console.export_text()
    assert "pruned −80%" in printed
    assert "−80.0%" in printed
    assert "MACs" in printed
    assert result.picture.read_bytes().startswith(b"\x89PNG")
    assert "pruned −80%" in result.page.read_text(encoding="utf-8")
    dense, _, strong = result.measurements
    true_share = sum(SceneDataset("test", 40)[i]["label"] for i in range(40)) / 40
    assert strong.accuracy == pytest.approx(true_share)
    assert strong.reduction == pytest.approx(0.8)
    assert strong.image_tokens == (10.0, 4.0)
    assert strong.text_tokens == (5.0,)
    assert dense.image_tokens == (PATCHES + 1.0,) * 6
    assert dense.milliseconds > 0


def test_progress_advances_as_often_as_announced(entries: list[models.Entry]) -> None:
    batches = [collate([SceneDataset("test", 4)[i] for i in pair]) for pair in ((0, 1), (2, 3))]
    calls = []
    measure.measure(entries, batches, lambda: calls.append(1))
    assert len(calls) == measure.steps(len(entries), len(batches))


def test_kept_patches_belong_to_the_image_they_are_shown_with(entries: list[models.Entry]) -> None:
    items = [SceneDataset("test", 3)[i] for i in range(3)]
    examples = run.explain(entries, items, collate(items))
    for example in examples:
        first, second = example.kept_patches[0].kept[0]
        assert first[: PATCHES // 2].all()
        assert not first[PATCHES // 2 :].any()
        assert second[PATCHES // 2 :].all()
        assert not second[: PATCHES // 2].any()


def test_examples_cover_the_kinds_of_statement_and_depend_on_the_seed_alone() -> None:
    items = [SceneDataset("test", 60)[i] for i in range(60)]
    chosen = run.choose_examples(items, 4, seed=1)
    assert len({item["kind"] for item in chosen}) == min(4, len({item["kind"] for item in items}))
    assert [item["id"] for item in chosen] == [item["id"] for item in run.choose_examples(items, 4, seed=1)]


def test_no_samples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="at least 1"):
        run.run_demo(tmp_path, samples=0, seed=0, console=Console(quiet=True))


def test_missing_weights_say_how_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"dense\.safetensors.*madtp train"):
        models.load_models(tmp_path)
    (tmp_path / "dense.safetensors").touch()
    with pytest.raises(CheckpointError, match="pruned models"):
        models.load_models(tmp_path)


@pytest.mark.slow
def test_the_shipped_models_keep_what_their_names_promise(tmp_path: Path) -> None:
    result = run.run_demo(tmp_path, samples=128, seed=0, console=Console(quiet=True))
    dense, *pruned = result.measurements
    assert dense.accuracy > 0.85
    assert [m.model for m in pruned] == ["pruned −50%", "pruned −80%"]
    # What the shipped weights lose, with room for 128 samples: README, "Weak points".
    for measurement, reduction, loss in zip(pruned, (0.5, 0.8), (0.05, 0.2), strict=True):
        assert measurement.reduction == pytest.approx(reduction, abs=0.03)
        assert measurement.accuracy > dense.accuracy - loss
        assert all(a >= b for a, b in pairwise(measurement.image_tokens))
