"""Queries, keys and values [B, H, N, D] from tokens [B, N, C]. Start at :func:`projection`."""

from __future__ import annotations

from torch import Tensor, nn

from random_vlts.marks import WIDTH

Triple = tuple[Tensor, Tensor, Tensor]


class Projection(nn.Module):
    """Base of all: H heads of D = C / H."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads, self.head = heads, WIDTH // heads

    def split(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, H, N, D]."""
        batch, length, _ = x.shape
        return x.view(batch, length, self.heads, self.head).transpose(1, 2)


class Separate(Projection):
    """A linear map each; keys and values may come from other tokens."""

    def __init__(self, heads: int) -> None:
        super().__init__(heads)
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Triple:
        memory = x if memory is None else memory
        return self.split(self.query(x)), self.split(self.key(memory)), self.split(self.value(memory))


class SharedMemory(Projection):
    """Queries by one map, keys and values of other tokens by another."""

    def __init__(self, heads: int) -> None:
        super().__init__(heads)
        self.query, self.both = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH, bias=False)

    def forward(self, x: Tensor, memory: Tensor) -> Triple:
        batch, length, _ = memory.shape
        keys, values = self.both(memory).reshape(batch, length, 2, self.heads, self.head).permute(2, 0, 3, 1, 4)
        return self.split(self.query(x)), keys, values


class Fused(Projection):
    """One map for all three."""

    def __init__(self, heads: int) -> None:
        super().__init__(heads)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def stacked(self, x: Tensor) -> Tensor:
        """[3, B, H, N, D]."""
        batch, length, _ = x.shape
        return self.qkv(x).reshape(batch, length, 3, self.heads, self.head).permute(2, 0, 3, 1, 4)


class Unbind(Fused):
    def forward(self, x: Tensor) -> Triple:
        query, key, value = self.stacked(x).unbind(0)
        return query, key, value


class Select(Fused):
    def forward(self, x: Tensor) -> Triple:
        qkv = self.stacked(x)
        return qkv[0], qkv[1], qkv[2]


class Chunk(Fused):
    def forward(self, x: Tensor) -> Triple:
        query, key, value = (self.split(t) for t in self.qkv(x).chunk(3, dim=-1))
        return query, key, value


class Split(Fused):
    def forward(self, x: Tensor) -> Triple:
        parts = self.qkv(x).split(WIDTH, dim=2)
        query, key, value = (t.unflatten(-1, (self.heads, self.head)).transpose(1, 2) for t in parts)
        return query, key, value


class ByHead(Fused):
    """Each head's query, key and value lie side by side."""

    def forward(self, x: Tensor) -> Triple:
        batch, length, _ = x.shape
        packed = self.qkv(x).view(batch, length, self.heads, 3, self.head).transpose(1, 2)
        return packed[..., 0, :], packed[..., 1, :], packed[..., 2, :]


class Grouped(Projection):
    """Half as many heads for keys and values."""

    def __init__(self, heads: int) -> None:
        super().__init__(heads)
        self.groups = heads // 2
        self.query = nn.Linear(WIDTH, WIDTH, bias=False)
        self.key, self.value = (nn.Linear(WIDTH, self.groups * self.head, bias=False) for _ in range(2))

    def few(self, x: Tensor) -> Triple:
        """Keys and values [B, G, N, D]."""
        batch, length, _ = x.shape
        key, value = (f(x).view(batch, length, self.groups, self.head).transpose(1, 2) for f in (self.key, self.value))
        return self.split(self.query(x)), key, value

    def forward(self, x: Tensor) -> Triple:
        return self.few(x)


class GroupedExpand(Grouped):
    def forward(self, x: Tensor) -> Triple:
        query, key, value = self.few(x)
        return query, self._again(key), self._again(value)

    def _again(self, x: Tensor) -> Tensor:
        batch, groups, length, head = x.shape
        return x[:, :, None].expand(batch, groups, 2, length, head).reshape(batch, 2 * groups, length, head)


class GroupedRepeat(Grouped):
    def forward(self, x: Tensor) -> Triple:
        query, key, value = self.few(x)
        return query, key.repeat_interleave(2, dim=1), value.repeat_interleave(2, dim=1)


class GroupedFused(Projection):
    """One map for all queries and half as many keys and values."""

    def __init__(self, heads: int) -> None:
        super().__init__(heads)
        self.sizes = [WIDTH, WIDTH // 2, WIDTH // 2]
        self.qkv = nn.Linear(WIDTH, 2 * WIDTH, bias=False)

    def forward(self, x: Tensor) -> Triple:
        query, key, value = (
            t.unflatten(-1, (-1, self.head)).transpose(1, 2) for t in self.qkv(x).split(self.sizes, -1)
        )
        return query, key.repeat_interleave(2, dim=1), value.repeat_interleave(2, dim=1)


def projection(kind: str, heads: int) -> nn.Module:
    """The projection of a self-attention."""
    makers: dict[str, type[Projection]] = {
        "separate": Separate,
        "unbind": Unbind,
        "select": Select,
        "chunk": Chunk,
        "split": Split,
        "by_head": ByHead,
        "grouped_expand": GroupedExpand,
        "grouped_repeat": GroupedRepeat,
        "grouped_flag": Grouped,
        "grouped_fused": GroupedFused,
    }
    return makers[kind](heads)
