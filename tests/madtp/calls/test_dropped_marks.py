"""Marks of image tokens that a vision tower has dropped: they go where the tokens go, and no further."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from madtp.calls.modality_tracking import Tracker

PATCHES, LENGTH, AT = 8, 12, 2
Way = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Takes features ``[2, 8, 4]`` of which the first half is dropped, words ``[2, 12, 4]`` and other image values."""
HALF = [0] * AT + [1] * (PATCHES // 2) + [0] * (LENGTH - AT - PATCHES // 2)
STAY: dict[str, Way] = {
    "as they are": lambda f, w, p: f,
    "each by itself": lambda f, w, p: torch.nn.functional.gelu(f * 2 + 1).to(torch.float32).contiguous(),
    "normalised": lambda f, w, p: torch.nn.functional.layer_norm(f, (4,)),
    "moved and back": lambda f, w, p: f.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    "in place, by a number": lambda f, w, p: (f * 1).mul_(3),
    "one feature is overwritten by a number": lambda f, w, p: _set(f * 1, (slice(None), 6), 2),
}
GO: dict[str, Way] = {
    "sum over tokens": lambda f, w, p: f + f.cumsum(1),
    "sum over tokens, in place": lambda f, w, p: (f * 1).add_(f.cumsum(1)),
    "sum with words": lambda f, w, p: f + w[:, :PATCHES],
    "sum with another sample": lambda f, w, p: f + f[1:].flip(1),
    "norm over tokens": lambda f, w, p: torch.nn.functional.layer_norm(f, (PATCHES, 4)),
    "overwritten": lambda f, w, p: _set(f * 1, slice(None), p),
    "overwritten through a view": lambda f, w, p: _through_view(f * 1, p),
    "emptied and filled": lambda f, w, p: (f * 1).zero_().add_(p),
    "drawn": lambda f, w, p: (f * 1).normal_(),
    "written elsewhere": lambda f, w, p: torch.cat([f, p], 1, out=torch.empty(2, 16, 4))[:, :PATCHES],
    "bits read anew": lambda f, w, p: f.view(torch.int32).view(torch.float32),
    "added up at indices": lambda f, w, p: torch.zeros(2, PATCHES, 4).index_put(
        (torch.arange(2)[:, None], torch.arange(PATCHES)[None]), f, accumulate=True
    ),
}


def _set(f: Tensor, place: object, value: object) -> Tensor:
    f[place] = value  # type: ignore[index, assignment]
    return f


def _through_view(f: Tensor, other: Tensor) -> Tensor:
    f[0][:4] = other[0, 4:]
    f[1][:4] = other[1, 4:]
    return f


def dropped(way: Way) -> Tensor | None:
    """At which tokens of the finished sequence the tracker says that a tower has dropped them."""
    torch.manual_seed(0)
    pixels, ids, words = torch.randn(2, PATCHES, 4), torch.randint(3, 9, (2, LENGTH)), nn.Embedding(20, 4)
    tracker = Tracker([pixels, ids])
    with torch.no_grad(), tracker:
        features = pixels * 1.0
        with tracker.set_aside():
            gone = torch.zeros(2, PATCHES, dtype=torch.bool)
            gone[:, : PATCHES // 2] = True
            places = torch.zeros(2, LENGTH, 1, dtype=torch.bool)
            places[:, AT : AT + PATCHES] = True
        tracker.mark_dropped(features, gone)
        embedded = words(ids)
        out = embedded.masked_scatter(places, way(features, embedded, pixels))
    return tracker.dropped_positions(out)


@pytest.mark.parametrize("way", STAY.values(), ids=STAY)
def test_marks_follow_tokens(way: Way) -> None:
    found = dropped(way)
    assert found is not None
    assert found.int().tolist() == [HALF, HALF]


@pytest.mark.parametrize("way", GO.values(), ids=GO)
def test_marks_go_where_tokens_become_others(way: Way) -> None:
    assert dropped(way) is None


@pytest.mark.parametrize("number", [1, 2, -10_000, 300])
def test_numbers_are_no_marks(number: int) -> None:
    words = torch.zeros(2, LENGTH, 1, dtype=torch.bool)
    words[:, 0] = True
    torch.manual_seed(0)
    tracker = Tracker([])
    x = torch.randn(2, LENGTH, 4)
    with tracker:
        tracker.mark_dropped(x, torch.zeros(2, LENGTH, dtype=torch.bool))
        for filled in (x.masked_fill(words, number), torch.where(words, number, x)):
            assert tracker.dropped_positions(filled) is None
            positions = tracker.image_positions(filled)
            assert positions is not None
            assert positions[:, 0].sum() == 0
