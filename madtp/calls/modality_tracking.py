"""Follow tensors through one real run: which modality they carry, and where attention is computed.

Start at :class:`Tracker`. Integers that are inputs, or computed from them, are *ids*; what an embedding looks up for
them is text; floating inputs are images; where tensors meet, their modalities add up. Numbers that are all 0 or 1 are
masks or types and carry nothing. Where values of both modalities are put into one tensor, it is remembered which went where.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary

from madtp.calls.image_positions import IN_PLACE, MOVES, TOKENWISE, moved, positions

IDS = "ids"
NOTHING: frozenset[str] = frozenset()
# Functions that stand for an attention, or for its normalisation, in every spelling.
ATTENTIONS = frozenset(
    "scaled_dot_product_attention softmax _softmax multi_head_attention_forward _native_multi_head_attention".split()
)
# Functions that take the shape or the type of a tensor, not its values: of a further one, or of the only one.
LIKE = frozenset("view_as reshape_as expand_as type_as".split())
FRESH = frozenset("zeros_like ones_like empty_like full_like new_zeros new_ones new_empty new_full".split())


class Tracker(TorchFunctionMode):
    """Tags tensors while it is active. attended: called at every attention. paused: when this is true, nothing is followed."""

    def __init__(
        self,
        inputs: Iterable[Tensor],
        attended: Callable[[], None] = lambda: None,
        paused: Callable[[], bool] = lambda: False,
    ) -> None:
        super().__init__()
        self.attended, self.paused = attended, paused
        self.tags: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self.followed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self.marks: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        for tensor in inputs:
            if not _is_mask(tensor):
                self.tags[tensor] = frozenset(("image" if tensor.dtype.is_floating_point else IDS,))

    def modalities(self, leaf: Any) -> frozenset[str] | None:
        """What a tensor carries; None for what is no floating tensor."""
        if not isinstance(leaf, Tensor) or not leaf.dtype.is_floating_point:
            return None
        return self.tags.get(leaf, NOTHING)

    def written(self, leaf: Any) -> Tensor | None:
        """``[B, N]`` where image features were written among text ``[B, N, C]``; None where nothing is known to be."""
        marks = self.marks.get(leaf) if isinstance(leaf, Tensor) and leaf.dim() == 3 else None
        return None if marks is None else positions(marks)

    def derived(self, operands: Iterable[Any], result: Any) -> None:
        """What was computed from ``operands`` without being followed carries the modalities of all of them."""
        found = _union([x for x in operands if isinstance(x, Tensor)], self.tags)
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, Tensor) and found:
                self._tag(tensor, found)

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
        if self.paused():
            return func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        marks = self._moved(func, name, args, kwargs or {})
        result = func(*args, **(kwargs or {}))
        if name in ATTENTIONS:
            self.attended()
        operands = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if name in ("scaled_dot_product_attention", "multi_head_attention_forward"):
            operands = _answered(operands, self.tags)
        if name in LIKE or name in FRESH:
            operands = operands[:1] if name in LIKE else []
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
        self._mark(name, operands, operands[:1] if name in IN_PLACE else pytree.tree_leaves(result), marks)
        return result

    def _moved(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """Marks of the results of a function that moves values of both modalities."""
        if name not in MOVES and name not in IN_PLACE:
            return []
        operands = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        both = {"text", "image"} <= _union(operands, self.tags)
        if not both:
            return []
        return pytree.tree_leaves(moved(func, args, kwargs, self._marks_of))

    def _marks_of(self, tensor: Tensor) -> Tensor | None:
        if tensor in self.marks:
            return self.marks[tensor]
        carried = self.tags.get(tensor, NOTHING) - {IDS}
        if {"text", "image"} <= carried:
            return None
        return torch.tensor("image" in carried, device=tensor.device).expand(tensor.shape)

    def _mark(self, name: str, operands: list[Tensor], results: list[Any], marks: list[Any]) -> None:
        """Remember which values of the results are of which modality."""
        if name in TOKENWISE:
            source = next((x for x in operands if x in self.marks), None)
            if source is not None:
                marks = [self.marks[source].all(-1, keepdim=True)]
                results = [x for x in results if isinstance(x, Tensor) and x.shape[:-1] == source.shape[:-1]]
                marks = [marks[0].expand(x.shape) for x in results]
        elif name in IN_PLACE and not marks:
            self.marks.pop(results[0], None) if results else None
        for tensor, own in zip(results, marks, strict=False):
            if isinstance(tensor, Tensor) and isinstance(own, Tensor) and tensor.shape == own.shape:
                self.marks[tensor] = own

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
