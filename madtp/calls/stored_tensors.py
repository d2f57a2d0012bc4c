"""Tensors that modules store as they run, in attributes and plain containers: :class:`StoredTensors`.

A program of a region stores nothing. A model that reads later what a module inside the region has stored would find what an
earlier run has left there, most likely one with the same inputs, and the two would look alike.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from madtp.calls.held_containers import containers_in

# What torch keeps in every module. Buffers are looked at by themselves.
TORCHS_OWN = frozenset(vars(nn.Module()))
ABSENT = object()


@dataclass(frozen=True)
class Entry:
    """An attribute, or an entry of a dict; the whole content of a list, where there is no key.

    Attributes:
        holder: holds it.
        key: its name there.
        before: what it was.
    """

    holder: Any
    key: Any
    before: Any

    def now(self) -> Any:
        return list(self.holder) if self.key is None else self.holder.get(self.key, ABSENT)

    def put(self, value: Any) -> None:
        if self.key is None:
            self.holder.clear()
            self.holder.extend(value)
        elif value is ABSENT:
            self.holder.pop(self.key, None)
        else:
            self.holder[self.key] = value


class StoredTensors:
    """What modules have stored, as it is now."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._holders: list[tuple[Any, Any]] = []
        seen: set[int] = set()
        for module in modules:
            own = {name: value for name, value in vars(module).items() if name not in TORCHS_OWN}
            self._holders += [(vars(module), own), (module._buffers, dict(module._buffers))]
            inside = containers_in(own.values(), seen)
            self._holders += [(held, held.copy()) for held in inside if not isinstance(held, set)]

    def changed(self) -> list[Entry]:
        """All entries that are others now, such as the size of a mask that is kept with it; none if no tensors are."""
        entries = [entry for holder, before in self._holders for entry in _entries(holder, before)]
        changed = [one for one in entries if _identities(one.now()) != _identities(one.before)]
        return changed if any(_holds_tensors(one.now()) or _holds_tensors(one.before) for one in changed) else []


def put_others(entries: Iterable[Entry]) -> None:
    """Put other numbers in the place of those that were stored, of the same shapes."""
    for one in entries:
        one.put(pytree.tree_map_only(Tensor, _other, one.before))


def _entries(holder: Any, before: Any) -> list[Entry]:
    if not isinstance(before, dict):
        return [Entry(holder, None, list(before))]
    names = [name for name in {**before, **holder} if name in before or name not in TORCHS_OWN]
    return [Entry(holder, name, before.get(name, ABSENT)) for name in names]


def _identities(value: Any) -> list[int]:
    """Of the objects at the leaves; those of different objects differ while both live."""
    return [id(leaf) for leaf in pytree.tree_leaves(value)]


def _holds_tensors(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))


def _other(tensor: Tensor) -> Tensor:
    return 1 - 2 * tensor.detach() if tensor.dtype.is_floating_point else tensor
