"""One sample, given to models whose batch size export freezes: it runs twice, side by side."""

from __future__ import annotations

import pytest
import torch
from rewritten_models import gap
from small_vit import images, vit
from torch import Tensor, nn

import madtp


class Looping(nn.Module):
    """Position embeddings of each sample in a loop over the batch; similarities of all pairs of samples."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = vit(depth=2)
        self.table = nn.Parameter(torch.randn(65, 32))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.vit._pos_embed(self.vit.patch_embed(x))  # type: ignore[operator]
        tokens = tokens + torch.stack([self.table * image.mean() for image in x])
        found = self.vit.norm(self.vit.blocks(tokens))[:, 0]
        return found, found @ found.t()


class Contrasting(Looping):
    """Returns what depends on the samples that share the batch."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        found, pairs = super().forward(x)
        return found, pairs.softmax(1).sum()

    def __init__(self) -> None:
        super().__init__()
        self.vision = nn.Sequential(Looping())  # type: ignore[assignment]


@torch.no_grad()
def test_one_sample_of_a_frozen_batch() -> None:
    model = Looping().eval()
    pruned = madtp.rewrite(model, (images(2, 0),))
    both, counts, amount = pruned(images(2, 0)), pruned.token_counts(), []
    for row in range(2):
        alone = images(2, 0)[row : row + 1]
        with pruned.dense():
            assert all(gap(want, have) < 1e-5 for want, have in zip(model(alone), pruned(alone), strict=True))
        features, pairs = pruned(alone)
        assert gap(both[0][row : row + 1], features) < 1e-4
        assert pairs.shape == (1, 1)
        assert {n: int(c[row]) for n, c in counts.items()} == {n: int(c) for n, c in pruned.token_counts().items()}
        amount.append(pruned.macs())
    pruned(images(2, 0))
    assert sum(amount) / 2 == pytest.approx(pruned.macs(), rel=1e-6)


def test_one_sample_trains() -> None:
    pruned = madtp.rewrite(Looping().train(), (images(2, 0),))
    features, _ = pruned(images(1, 0))
    features.sum().backward()
    assert pruned.get_parameter("table").grad is not None


def runs_as_the_original(pruned: madtp.PrunedModel) -> None:
    """A call of one sample does, and a note says why."""
    with torch.no_grad(), pruned.dense():
        found = pruned(images(1, 0))
    with pytest.raises(madtp.MadtpError, match="no forward has run"):
        pruned.token_counts()
    (note,) = pruned.report.unpruned
    assert "froze its batch size" in str(note)
    assert found is not None


def test_what_couples_the_samples_runs_as_the_original() -> None:
    pruned = madtp.rewrite(Contrasting().eval(), (images(2, 0),))
    runs_as_the_original(pruned)


class Kept:
    """An object that is returned beside the features."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens


class Listing(Looping):
    """Returns a list with an entry for each sample, in a dict, and beside an object if it remembers."""

    def __init__(self, remembers: bool) -> None:
        super().__init__()
        self.remembers = remembers

    def forward(self, x: Tensor) -> dict[str, object]:  # type: ignore[override]
        found, pairs = super().forward(x)
        result = {"features": [*found], "nested": ({"rows": tuple(row * 2 for row in found)}, pairs)}
        return {"kept": Kept(found + 1), **result} if self.remembers else result


class Sorting(Looping):
    """Lists first the features of all samples, then their negatives."""

    def forward(self, x: Tensor) -> list[Tensor]:  # type: ignore[override]
        found, _ = super().forward(x)
        return [*found, *(-found)]


@pytest.mark.parametrize("remembers", [False, True])
@torch.no_grad()
def test_lists_with_an_entry_for_each_sample(remembers: bool) -> None:
    model = Listing(remembers).eval()
    pruned = madtp.rewrite(model, (images(2, 0),))
    alone = images(2, 0)[1:]
    with pruned.dense():
        wanted, found = model(alone), pruned(alone)
    assert list(found) == list(wanted)
    assert len(found["features"]) == 1
    assert gap(wanted["features"][0], found["features"][0]) < 1e-5
    assert isinstance(found["nested"][0]["rows"], tuple)
    assert gap(wanted["nested"][0]["rows"][0], found["nested"][0]["rows"][0]) < 1e-5
    assert found["nested"][1].shape == (1, 1)
    if remembers:
        assert gap(wanted["kept"].tokens, found["kept"].tokens) < 1e-5
    both = pruned(images(2, 0))
    assert gap(both["features"][1], pruned(alone)["features"][0]) < 1e-4
    assert not pruned.report.unpruned


def test_lists_in_another_order_run_as_the_original() -> None:
    pruned = madtp.rewrite(Sorting().eval(), (images(2, 0),))
    runs_as_the_original(pruned)
