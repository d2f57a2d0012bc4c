"""What a pruned random model must compute: the original, run eagerly, in which dropped tokens are hidden and stand still.

Start at :func:`masked_outputs`. It knows nothing of graphs. From the place where a token is dropped on (the marks of
``marks.py`` say where it can be) no attention sees it, pooling leaves it out, and its own value stays as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from masked_oracle import hidden_keys, leaves
from torch import Tensor, nn

from random_vlts.marks import Pooling, Reads, Tap


@dataclass(frozen=True)
class Kept:
    """Which tokens [B, N] are left, by stream, after each place where it may be pruned (all of them where it is not).

    parts: which joint stream lies where: name of a part to its stream and slice. starts: tokens that a stream starts with.
    pooled: whether pooling of a part leaves dropped tokens out, too; else they take part as they last were.
    given_back: whether what reads a stream behind its last block sees dropped tokens as they last were: regions return them.
    """

    after: dict[str, list[Tensor]]
    parts: dict[str, tuple[str, slice]]
    starts: dict[str, Tensor]
    pooled: bool = True
    given_back: bool = False

    def of(self, stream: str, places: int = -1) -> Tensor | None:
        """Tokens left after the first ``places`` places, None if the stream is never pruned."""
        if stream in self.parts:
            whole, part = self.parts[stream]
            found = self.of(whole, places)
            return None if found is None else found[:, part]
        if stream not in self.after:
            return self.starts.get(stream)
        if places == 0:
            return self.starts.get(stream)
        return self.after[stream][places - 1 if places > 0 else -1]


def masked_outputs(model: nn.Module, inputs: dict[str, Tensor], kept: Kept) -> dict[str, Tensor]:
    """Outputs by path."""
    reading: list[Reads] = []

    def visible() -> Tensor | None:
        behind = bool(reading) and kept.given_back and reading[-1].sites == -1
        found = kept.of(reading[-1].stream, reading[-1].sites) if reading and not behind else None
        return None if found is None or bool(found.all()) else found

    with _standing_still(model, kept), _reading(model, reading), _pooling(model, kept), hidden_keys(visible):
        return leaves(model(**inputs))


@contextmanager
def _standing_still(model: nn.Module, kept: Kept) -> Iterator[None]:
    """Dropped tokens carry the last state they had."""
    still: dict[str, Tensor] = {}

    def hook(tap: Tap, arguments: Any, value: Tensor) -> Tensor | None:
        if tap.stream not in kept.after:
            return None
        x = value.transpose(0, 1) if tap.sequence_first else value
        if tap.end:
            x = torch.where(kept.after[tap.stream][tap.layer][:, :, None], x, still[tap.stream])
        else:
            before = kept.after[tap.stream][tap.layer - 1] if tap.layer else kept.starts.get(tap.stream)
            last = still.get(tap.stream)
            x = x if before is None or last is None else torch.where(before[:, :, None], x, last)
            still[tap.stream] = x
        return x.transpose(0, 1) if tap.sequence_first else x

    def enter(block: nn.Module, arguments: Any) -> None:
        if block.tap.layer == 0 and block.tap.stream in kept.starts:
            x = arguments[0]
            still[block.tap.stream] = x.transpose(0, 1) if block.tap.sequence_first else x

    handles = [m.register_forward_hook(hook) for m in model.modules() if isinstance(m, Tap)]
    handles += [m.register_forward_pre_hook(enter) for m in model.modules() if isinstance(getattr(m, "tap", None), Tap)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _reading(model: nn.Module, reading: list[Reads]) -> Iterator[None]:
    """Keep ``reading`` at what the running attention reads."""
    handles: list[Any] = []
    for module in model.modules():
        reads = getattr(module, "reads", None)
        if isinstance(reads, Reads):
            handles.append(module.register_forward_pre_hook(lambda m, a, r=reads: reading.append(r)))
            handles.append(module.register_forward_hook(lambda m, a, o: _leave(reading)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _leave(reading: list[Reads]) -> None:
    reading.pop()


@contextmanager
def _pooling(model: nn.Module, kept: Kept) -> Iterator[None]:
    """Pooling runs over what is left."""
    pools = [m for m in model.modules() if isinstance(m, Pooling)]
    for module in pools:
        pooled = not kept.given_back and (kept.pooled or module.stream not in kept.parts)
        left = kept.of(module.stream) if pooled else None
        if left is not None:
            module.forward = _over(module, left)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in pools:
            module.__dict__.pop("forward", None)


def _over(module: Pooling, left: Tensor) -> Callable[..., Tensor]:
    return lambda *arguments: module.surviving(left, *arguments)
