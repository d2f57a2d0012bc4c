"""Leaf modules are called again only where their forward is that of the operation."""

from __future__ import annotations

import torch
from rewritten_models import gap
from torch import Tensor, nn

import madtp


class Places(nn.Embedding):
    """Positions, looked up by the sizes of ids or as they are given."""

    def forward(self, sizes: Tensor | torch.Size, positions: Tensor | None = None) -> Tensor:
        return super().forward(torch.arange(sizes[1]) if positions is None else positions)


class Same(nn.Embedding):
    """A subclass that changes nothing."""


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = Same(20, 16), Places(12, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True)
        self.trunk = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, ids: Tensor) -> Tensor:
        positions = torch.arange(ids.shape[1]) + 2
        return self.trunk(self.words(ids) + self.places(ids.shape, positions))[:, 0]


@torch.no_grad()
def test_a_forward_of_its_own_is_not_called_with_the_operands_of_its_operation() -> None:
    torch.manual_seed(0)
    model = Reader().eval()
    ids = torch.randint(0, 20, (3, 9))
    pruned = madtp.rewrite(model, {"ids": ids})
    assert pruned.report.capture == "whole"
    called: list[str] = []
    pruned.words.register_forward_hook(lambda *_: called.append("words"))
    with pruned.dense():
        assert gap(model(ids), pruned(ids)) < 1e-5
    assert called == ["words"]
    assert not pruned.madtp.report.notes
    pruned.places.register_forward_hook(lambda *_: called.append("places"))
    with pruned.dense():
        assert gap(model(ids), pruned(ids)) < 1e-5
    assert called == ["words", "words", "places"]
