"""Follow tensors through one real run: which modality they carry, and where attention is computed.

Start at :class:`Tracker`. Integers that are inputs, or computed from them, are *ids*; what an embedding looks up for
them is text; floating inputs are images; where tensors meet, their modalities add up. Numbers that are all 0 or 1 are
masks or types and carry nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary

IDS = "ids"
NOTHING: frozenset[str] = frozenset()
# Functions that stand for an attention, or for its normalisation, in every spelling.
ATTENTIONS = frozenset(
    "scaled_dot_product_attention softmax _softmax multi_head_attention_forward _native_multi_head_attention".split()
)


class Tracker(TorchFunctionMode):
    """Tags tensors while it is active. attended: called at every attention."""

    def __init__(self, inputs: Iterable[Tensor], attended: Callable[[], None]) -> None:
        super().__init__()
        self.attended = attended
        self.tags: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self.followed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        for tensor in inputs:
            if not _is_mask(tensor):
                self.tags[tensor] = frozenset(("image" if tensor.dtype.is_floating_point else IDS,))

    def modalities(self, leaf: Any) -> frozenset[str] | None:
        """What a tensor carries; None for what is no floating tensor."""
        if not isinstance(leaf, Tensor) or not leaf.dtype.is_floating_point:
            return None
        return self.tags.get(leaf, NOTHING)

    def follow(self, output: Any, read: set[int]) -> None:
        """Note in ``read`` the positions at which tokens [B, N, C] in ``output`` are read from now on."""
        for tensor in pytree.tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.dim() == 3 and tensor.dtype.is_floating_point:
                self.followed[tensor] = [*self.followed.get(tensor, []), read]

    def _follow_on(self, name: str, args: tuple[Any, ...], operands: list[Tensor], result: Any) -> None:
        first = next((x for x in operands if x in self.followed), None)
        if first is None:
            return
        if name == "__getitem__":
            index = args[1] if isinstance(args[1], tuple) else ()
            if len(index) > 1 and isinstance(index[0], slice) and isinstance(index[1], int):
                for read in self.followed[first]:
                    read.add(index[1])
        elif isinstance(result, Tensor) and result.dim() == 3 and result.shape[:2] == first.shape[:2]:
            self.followed[result] = self.followed[first]

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in ATTENTIONS:
            self.attended()
        operands = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if name in ("scaled_dot_product_attention", "multi_head_attention_forward"):
            operands = _answered(operands, self.tags)
        self._follow_on(name, args, operands, result)
        found = _union(operands, self.tags)
        if name == "embedding":
            ids = any(IDS in self.tags.get(x, NOTHING) for x in operands if not x.dtype.is_floating_point)
            found = frozenset(("text",)) if ids else NOTHING
        if found:
            for tensor in pytree.tree_leaves(result):
                if isinstance(tensor, Tensor):
                    self._tag(tensor, found)
            if operands and (name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))):
                self._tag(operands[0], found)
        return result

    def _tag(self, tensor: Tensor, found: frozenset[str]) -> None:
        if tensor.dtype.is_floating_point:
            carried = found - {IDS}
        else:
            carried = found & {IDS} if tensor.dtype != torch.bool else NOTHING
        if carried:
            self.tags[tensor] = self.tags.get(tensor, NOTHING) | carried


def _union(operands: list[Tensor], tags: WeakTensorKeyDictionary) -> frozenset[str]:
    return NOTHING.union(*(tags.get(x, NOTHING) for x in operands))


def _answered(operands: list[Tensor], tags: WeakTensorKeyDictionary) -> list[Tensor]:
    """The result of an attention belongs to the stream of its queries, whatever they read."""
    return operands[:1] if operands and tags.get(operands[0], NOTHING) else operands


def _is_mask(tensor: Tensor) -> bool:
    return tensor.dtype == torch.bool or bool(((tensor == 0) | (tensor == 1)).all())
