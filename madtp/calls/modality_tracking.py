"""Follow tensors through one real run: which modalities they carry, and where attention is computed.

Start at :class:`Tracker`. Integer inputs, and what is computed from them, are *ids*. What an embedding looks up for ids is
text; floating inputs are images; where tensors meet, their modalities add up. Numbers that are all 0 or 1 are masks or types
and carry nothing. Where values of both modalities are put into one tensor, an image mask (``image_positions.py``) says which
are where.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary

from madtp.calls.compiling import is_compiling
from madtp.calls.image_positions import (
    DROPPED,
    FEATURE,
    IN_PLACE,
    MIXES_CHANNELS,
    MOVES,
    OTHER,
    TOKENWISE,
    TOKENWISE_IN_PLACE,
    dropped_positions,
    moved_mask,
    of_tokens,
    token_positions,
)

IDS = "ids"
NOTHING: frozenset[str] = frozenset()
BOTH = frozenset(("text", "image"))
# Functions that stand for an attention, or for its normalisation, in every spelling.
ATTENTIONS = frozenset(
    "scaled_dot_product_attention softmax _softmax multi_head_attention_forward _native_multi_head_attention".split()
)
# Functions that take only the shape or the type of a tensor: of a second one, or of the only one.
LIKE = frozenset("view_as reshape_as expand_as type_as".split())
# Functions that make a tensor of numbers of Python or of another library.
MADE_OF_NUMBERS = frozenset("tensor as_tensor from_numpy".split())
FRESH = frozenset("zeros_like ones_like empty_like full_like new_zeros new_ones new_empty new_full".split())

Value = TypeVar("Value")


class _ByTensor(Generic[Value]):
    """Values by tensor, which are forgotten with the tensor: a typed view of torch's dictionary with weak keys."""

    def __init__(self) -> None:
        self._values: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def get(self, tensor: Tensor) -> Value | None:
        if tensor not in self._values:
            return None
        found: Value = self._values[tensor]
        return found

    def __contains__(self, tensor: Tensor) -> bool:
        return tensor in self._values

    def __setitem__(self, tensor: Tensor, value: Value) -> None:
        self._values[tensor] = value


class _Masks:
    """Image masks by tensor. One that was written to since, be it through a view, has none."""

    def __init__(self) -> None:
        self._known: _ByTensor[tuple[Tensor, int]] = _ByTensor()

    def get(self, tensor: Tensor) -> Tensor | None:
        found = self._known.get(tensor)
        return None if found is None or found[1] != _version(tensor) else found[0]

    def __contains__(self, tensor: Tensor) -> bool:
        return self.get(tensor) is not None

    def __setitem__(self, tensor: Tensor, mask: Tensor) -> None:
        self._known[tensor] = mask, _version(tensor)


def _version(tensor: Tensor) -> int:
    """How often a tensor was written to; those of inference mode do not count."""
    return -1 if tensor.is_inference() else tensor._version


class Tracker(TorchFunctionMode):
    """Follows tensors while it is active.

    Args:
        inputs: the tensors that a model is called with.
        on_attention: called at every attention.
        paused: nothing is followed while this returns True.
        tokenises: the model makes ids of texts: integers that it makes a tensor of are ids.

    Attributes:
        follows_images: an image is among the inputs.
    """

    def __init__(
        self,
        inputs: Iterable[Tensor],
        on_attention: Callable[[], None] = lambda: None,
        paused: Callable[[], bool] = lambda: False,
        *,
        tokenises: bool = False,
    ) -> None:
        super().__init__()
        self.on_attention, self.paused, self.tokenises = on_attention, paused, tokenises
        self._tags: _ByTensor[frozenset[str]] = _ByTensor()
        self._reads: _ByTensor[list[set[int]]] = _ByTensor()
        self._masks = _Masks()
        self.follows_images = False
        self.follow(inputs)

    def follow(self, inputs: Iterable[Tensor]) -> None:
        """Follow further inputs; those that are followed already stay what they are."""
        for tensor in inputs:
            if tensor not in self._tags and tensor not in self._masks and not _is_mask(tensor):
                self._tags[tensor] = frozenset(("image" if tensor.dtype.is_floating_point else IDS,))
                self.follows_images |= tensor.dtype.is_floating_point

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Leave the mode inside the block, if it is the innermost one: it would be asked about every operation."""
        if _get_current_function_mode() is not self:
            yield
            return
        self.__exit__(None, None, None)
        try:
            yield
        finally:
            self.__enter__()

    def modalities(self, leaf: object) -> frozenset[str] | None:
        """Return the modalities that a floating tensor carries; None for any other leaf."""
        if not isinstance(leaf, Tensor) or not leaf.dtype.is_floating_point:
            return None
        return self._tags_of(leaf)

    def image_positions(self, leaf: object) -> Tensor | None:
        """Return where image features stand among text ``[B, N, C]``, ``[B, N]`` bool; None if that is not known."""
        mask = self._masks.get(leaf) if isinstance(leaf, Tensor) and leaf.dim() == 3 else None
        return None if mask is None else token_positions(mask)

    def dropped_positions(self, leaf: object) -> Tensor | None:
        """Return at which of these positions stand tokens that a vision tower has dropped, ``[B, N]`` bool; None if nowhere."""
        mask = self._masks.get(leaf) if isinstance(leaf, Tensor) and leaf.dim() == 3 else None
        dropped = None if mask is None else dropped_positions(mask)
        return None if dropped is None or not bool(dropped.any()) else dropped

    def mark_dropped(self, result: object, dropped: Tensor) -> None:
        """Mark tokens ``[B, N, C]`` of which some were dropped, ``[B, N]`` bool; whatever is read of them is followed."""
        if isinstance(result, Tensor) and result.dim() == 3 and result.shape[:2] == dropped.shape:
            kinds = torch.where(dropped, DROPPED, FEATURE).to(torch.uint8)
            self._masks[result] = kinds[:, :, None].expand(result.shape)

    def tag_result(self, operands: Iterable[object], result: object) -> None:
        """Give a result that was computed without being followed the modalities of all its operands."""
        found = self._union(_tensors(operands))
        for tensor in _tensors(pytree.tree_leaves(result)):
            if found:
                self._tag(tensor, found)

    def keep_image_positions(self, sequence: object, result: object) -> None:
        """Mark the sequences in a result that have the tokens of another one: image features stand where they stood in that."""
        mask = self._masks.get(sequence) if isinstance(sequence, Tensor) else None
        for tensor in _tensors(pytree.tree_leaves(result)):
            if mask is not None and tensor.shape[:-1] == mask.shape[:-1]:
                self._masks[tensor] = of_tokens(mask, tensor.shape)

    def watch_reads(self, output: object, read: set[int]) -> None:
        """Add to ``read`` the positions at which tokens ``[B, N, C]`` in ``output`` are read from now on."""
        for tensor in _tensors(pytree.tree_leaves(output)):
            if tensor.dim() == 3 and tensor.dtype.is_floating_point:
                self._reads[tensor] = [*(self._reads.get(tensor) or ()), read]

    def _tag_ids(self, made: Tensor) -> None:
        """Tag a tensor that was made of numbers, if these may be token ids."""
        if not made.dtype.is_floating_point and not _is_mask(made):
            self._tags[made] = frozenset((IDS,))

    def _note_reads(self, name: str, args: tuple[object, ...], operands: list[Tensor], result: object) -> None:
        first = next((x for x in operands if x in self._reads), None)
        reads = None if first is None else self._reads.get(first)
        if first is None or reads is None:
            return
        if name == "__getitem__":
            index = args[1] if isinstance(args[1], tuple) else ()
            if len(index) > 1 and isinstance(index[0], slice) and isinstance(index[1], int):
                for read in reads:
                    read.add(index[1])
        elif isinstance(result, Tensor) and result.dim() == 3 and result.shape[:2] == first.shape[:2]:
            self._reads[result] = reads

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Iterable[type],
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        if self.paused():
            return func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        masks = self._moved_masks(func, name, args, kwargs or {})
        operands = _tensors(pytree.tree_leaves((args, kwargs)))
        written = self._masks.get(operands[0]) if operands and name in TOKENWISE_IN_PLACE else None
        result = func(*args, **(kwargs or {}))
        if written is not None:
            self._masks[operands[0]] = self._with_others(written, operands[1:])
        if name in ATTENTIONS:
            self.on_attention()
        if self.tokenises and name in MADE_OF_NUMBERS and isinstance(result, Tensor):
            self._tag_ids(result)
            return result
        if name in ("scaled_dot_product_attention", "multi_head_attention_forward"):
            # The result belongs to the stream of the queries, whatever they read.
            operands = operands[:1] if operands and self._tags_of(operands[0]) else operands
        if name in LIKE or name in FRESH:
            operands = operands[:1] if name in LIKE else []
        self._note_reads(name, args, operands, result)
        found = self._union(operands)
        if name == "embedding":
            ids = any(IDS in self._tags_of(x) for x in operands if not x.dtype.is_floating_point)
            found = frozenset(("text",)) if ids else NOTHING
        leaves = pytree.tree_leaves(result)
        if found:
            for tensor in _tensors(leaves):
                self._tag(tensor, found)
            if operands and (name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))):
                self._tag(operands[0], found)
        self._note_masks(name, (args, kwargs or {}), operands, operands[:1] if name in IN_PLACE else leaves, masks)
        return result

    def _moved_masks(
        self, func: Callable[..., object], name: str, args: tuple[object, ...], kwargs: Mapping[str, object]
    ) -> Sequence[object]:
        """Image masks of the results of a function that moves values of both modalities."""
        if name not in MOVES and name not in IN_PLACE:
            return []
        operands = _tensors(pytree.tree_leaves((args, kwargs)))
        if not (self._union(operands) >= BOTH or any(x in self._masks for x in operands)):
            return []
        return pytree.tree_leaves(moved_mask(func, args, kwargs, self._mask_of))

    def _mask_of(self, tensor: Tensor) -> Tensor | None:
        known = self._masks.get(tensor)
        if known is not None:
            return known
        carried = self._tags_of(tensor)
        if carried >= BOTH:
            return None
        kind = FEATURE if "image" in carried else OTHER
        return torch.tensor(kind, dtype=torch.uint8, device=tensor.device).expand(tensor.shape)

    def _note_masks(
        self,
        name: str,
        arguments: tuple[tuple[object, ...], Mapping[str, object]],
        operands: list[Tensor],
        results: Sequence[object],
        masks: Sequence[object],
    ) -> None:
        """Remember which values of the results are of which modality."""
        if name in TOKENWISE and not _crosses_tokens(name, arguments):
            source = next((x for x in operands if x in self._masks), None)
            mask = None if source is None else self._masks.get(source)
            if source is not None and mask is not None:
                mask = self._with_others(mask, [x for x in operands if x is not source])
                alike = [x for x in _tensors(results) if x.shape[:-1] == source.shape[:-1]]
                if name in MIXES_CHANNELS or any(x.shape != source.shape for x in alike):
                    mask = of_tokens(mask, mask.shape)
                results, masks = alike, [mask if x.shape == mask.shape else of_tokens(mask, x.shape) for x in alike]
        for tensor, own in zip(results, masks, strict=False):
            if isinstance(tensor, Tensor) and isinstance(own, Tensor) and tensor.shape == own.shape:
                self._masks[tensor] = own

    def _with_others(self, mask: Tensor, others: Iterable[Tensor]) -> Tensor:
        """The image mask of tokens that meet others: one that was dropped and meets one that was not is a feature again."""
        for other in others:
            if other.dim() < 2 or not self._tags_of(other) & BOTH:
                continue
            known = self._masks.get(other)
            if known is None or known.shape[:-1] != mask.shape[:-1]:
                mask = mask.clamp(max=FEATURE)
            else:
                met = of_tokens(known, (*known.shape[:-1], 1))
                mask = mask.masked_fill((mask == DROPPED) & (met != DROPPED), FEATURE)
        return mask

    def _tag(self, tensor: Tensor, found: frozenset[str]) -> None:
        if tensor.dtype.is_floating_point:
            carried = found - {IDS}
        else:
            carried = found & {IDS} if tensor.dtype != torch.bool else NOTHING
        if carried:
            self._tags[tensor] = self._tags_of(tensor) | carried

    def _tags_of(self, tensor: Tensor) -> frozenset[str]:
        return self._tags.get(tensor) or NOTHING

    def _union(self, operands: Iterable[Tensor]) -> frozenset[str]:
        return NOTHING.union(*map(self._tags_of, operands))


def _crosses_tokens(name: str, arguments: tuple[tuple[object, ...], Mapping[str, object]]) -> bool:
    """Whether a norm is over more than the last dimension."""
    args, kwargs = arguments
    shape = kwargs.get("normalized_shape", args[1] if len(args) > 1 else ())
    return name.endswith("_norm") and isinstance(shape, Sequence) and len(shape) > 1


def _tensors(leaves: Iterable[object]) -> list[Tensor]:
    return [x for x in leaves if isinstance(x, Tensor)]


def _has_channels(tensor: Tensor) -> bool:
    """Whether an input has the shape of images or clips in colour, be they black; a mask has one channel, for all heads."""
    return tensor.dtype.is_floating_point and tensor.dim() >= 4 and tensor.size(-3) > 1


def _is_mask(tensor: Tensor) -> bool:
    if tensor.dtype == torch.bool:
        return True
    if _has_channels(tensor):
        return False
    if is_compiling():  # values are not known: then masks count as ids
        return False
    return bool(((tensor == 0) | (tensor == 1)).all())
