"""Norms, feed-forwards, layer scale and drop path. Start at :func:`norm` and :func:`feed_forward`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from random_vlts.design import Blocks
from random_vlts.marks import WIDTH


class OwnRmsNorm(nn.Module):
    """RMSNorm spelled out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def norm(kind: str, width: int = WIDTH) -> nn.Module:
    """A norm over the last dimension."""
    makers = {"layer": nn.LayerNorm, "rms": nn.RMSNorm, "own_rms": OwnRmsNorm}
    return makers[kind](width)  # type: ignore[abstract]


class Plain(nn.Sequential):
    """Linear, GELU, Linear."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(WIDTH, 24), nn.GELU(), nn.Dropout(0.1), nn.Linear(24, WIDTH))


class Gated(nn.Module):
    """SwiGLU with a linear map for each part."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(WIDTH, 20, bias=False), nn.Linear(WIDTH, 20, bias=False)
        self.down = nn.Linear(20, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class GeluGated(nn.Module):
    """GEGLU: one map, split in two."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 40), nn.Linear(20, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.up(x).chunk(2, dim=-1)
        return self.down(value * F.gelu(gate))


class FusedGate(nn.Module):
    """SwiGLU whose two halves are read by index."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 40), nn.Linear(20, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        both = self.up(x).unflatten(-1, (2, 20))
        return self.down(F.silu(both[..., 0, :]) * both[..., 1, :])


def feed_forward(kind: str) -> nn.Module:
    """``[B, N, C]`` to the same."""
    makers = {"plain": Plain, "gated": Gated, "gelu_gated": GeluGated, "fused_gate": FusedGate}
    return makers[kind]()


class LayerScale(nn.Module):
    """A learned factor for each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class DropPath(nn.Module):
    """Skips the branch of whole samples in training. ``batch_dim``: where the samples are."""

    def __init__(self, batch_dim: int) -> None:
        super().__init__()
        self.batch_dim = batch_dim

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        shape = [1] * x.dim()
        shape[self.batch_dim] = x.shape[self.batch_dim]
        return x * (torch.rand(shape, device=x.device, dtype=x.dtype) < 0.8) / 0.8


def branch(blocks: Blocks) -> nn.Module:
    """What stands between a sublayer and its residual add."""
    steps: list[nn.Module] = [LayerScale()] if blocks.layer_scale else []
    if blocks.drop_path:
        steps.append(DropPath(1 if blocks.product == "sequence_first" else 0))
    return nn.Sequential(*steps) if steps else nn.Identity()
