"""Regions whose calls are split into images: start at :class:`PerImageRegion`.

Images of one size run as a batch, by one program for each size, and their results are put together as the original packs them.
Calls that cannot be split (see :mod:`madtp.calls.packed_images`) run as the original does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from madtp.calls.call import Call, normalise_call
from madtp.calls.packed_images import Image, ImageResults, PerImageArguments, PerImageForward, by_kind, image_results
from madtp.errors import ExampleInputsError, RewriteError
from madtp.programs.notes import Notes
from madtp.programs.program_cache import ProgramCache
from madtp.programs.region import PrunedRegion
from madtp.programs.replaced_forward import ReplacedForward
from madtp.sites.control import PruningControl
from madtp.sites.forward_record import FeatureKey
from madtp.sites.preserved_state import trial_run
from madtp.tokens.state import TokenState, positions_of

MANY_SIZES = (
    "images of more than {} sizes were seen; bring images to fewer sizes, or raise PruningConfig(max_programs={})"
)

CallForm: TypeAlias = tuple[str | bool, ...]
"""All of a call that is the same for images of any size and number."""
Key = TypeVar("Key")


class PerImageRegion(ReplacedForward):
    """The forward of a region that takes all images at once; its programs take a batch of images of one size.

    Attributes:
        programs: the programs of the region.
        per_image: which arguments hold the images, and how they are split.
        control: the control of the pruned model.
        notes: takes remarks on calls that run unpruned.
        region: serves a batch of images of one size.
        packings: how the results of images are joined, by form of the call.
        kinds: the kinds of images for which splitting has been checked.
    """

    def __init__(
        self, programs: ProgramCache, per_image: PerImageArguments, control: PruningControl, notes: Notes
    ) -> None:
        """Replace the forward of the module of ``programs``; see above for the arguments."""
        super().__init__(programs.module)
        self.programs, self.per_image, self.control, self.notes = programs, per_image, control, notes
        self.region = PrunedRegion(programs, control, notes, original=PerImageForward(self.original, per_image))
        self.packings: dict[CallForm, ImageResults] = {}
        self.kinds: set[object] = set()

    def __call__(self, *args: object, **kwargs: object) -> object:
        if self.control.scope.runs_original:
            return self.original(*args, **kwargs)
        try:
            call = normalise_call(self.module, args, kwargs, self.parameters)
        except ExampleInputsError:  # the original says best what is wrong
            return self.original(*args, **kwargs)
        images = self.per_image.images(call)
        packing = None if images is None else self._packing(call, images)
        if images is None or packing is None:
            return self.original(*args, **kwargs)
        with self.control.call():
            return self._run(call, images, packing)

    def _run(self, call: Call, images: Sequence[Image], packing: ImageResults) -> object:
        results: dict[int, list[object]] = {}
        records = _BatchRecords(self.control)
        for numbers in by_kind(images):
            batch = self.per_image.batch(call, [images[number] for number in numbers])
            leaves = self.region(*batch.args, **batch.kwargs)
            assert isinstance(leaves, (list, tuple))
            records.add(numbers)
            for place, number in enumerate(numbers):
                results[number] = [x[place] if isinstance(x, Tensor) else x for x in leaves]
        records.join()
        joined: object = packing.join([results[number] for number in range(len(images))])
        return joined

    def _packing(self, call: Call, images: Sequence[Image]) -> ImageResults | None:
        """How the results of images are joined; None if the call cannot be split. Each size is checked once."""
        form = self._form(call)
        kinds = {image.kind for image in images}
        if form in self.packings and kinds <= self.kinds:
            return self.packings[form]
        most = self.control.config.max_programs
        if len(self.kinds | kinds) > most:
            self._note(MANY_SIZES.format(most, 2 * most))
            return None
        several = list(images) * 2 if len(images) == 1 else images
        together = self.per_image.join(call, several)
        try:
            # A check is not the model's work: it must not be counted.
            with (
                torch.no_grad(),
                trial_run(self.module, (call.args, call.kwargs)),
                self.control.running_original(),
                self.control.in_program(),
            ):
                packing = image_results(self.original, together, several, self.per_image)
        except RewriteError as error:
            self._note(f"its images do not come apart: {error}")
            return None
        if self.packings.setdefault(form, packing) != packing:
            self._note("its results are put together in different ways for images of different sizes.")
            return None
        self.kinds |= kinds
        return packing

    def _form(self, call: Call) -> CallForm:
        per_image = {*self.per_image.sizes, *(rows.name for rows in self.per_image.rows)}
        leaves, spec = pytree.tree_flatten((call.args, {k: v for k, v in call.kwargs.items() if k not in per_image}))
        return str(spec), *map(repr, leaves), *(m.training for m in self.module.modules())

    def _note(self, reason: str) -> None:
        self.notes.unpruned(self.programs.name, reason)


@dataclass(frozen=True)
class _BatchRecord:
    """What the sites of a region have recorded about one batch of images.

    Attributes:
        numbers: positions of the batch's images in the call.
        states: the token state after each site.
        features: pooled features by site and modality.
        kept_counts: candidates that each site kept.
    """

    numbers: list[int]
    states: dict[str, TokenState]
    features: dict[FeatureKey, Tensor]
    kept_counts: dict[str, Tensor]


class _BatchRecords:
    """The records of all batches of images of one call, which become one record of the call."""

    def __init__(self, control: PruningControl) -> None:
        self.control = control
        self.batches: list[_BatchRecord] = []

    def add(self, numbers: list[int]) -> None:
        """Take the record of a batch that has just run, of the images ``numbers``."""
        control = self.control
        states = dict(control.record.runs[-1].states) if control.record.runs else {}
        features = {key: value for key, value in control.record.features.items() if key[0] in states}
        counts = {name: value for name, value in control.record.kept_counts.items() if name.partition("[")[0] in states}
        self.batches.append(_BatchRecord(numbers, states, features, counts))

    def join(self) -> None:
        """Record the call, after its last batch."""
        if len(self.batches) < 2:
            return
        order = torch.tensor([number for batch in self.batches for number in batch.numbers]).argsort()
        for name in self.batches[0].states:
            states = [batch.states[name] for batch in self.batches if name in batch.states]
            self.control.record.states[name] = _joined_states(states, order)
        _join_into(self.control.record.features, [batch.features for batch in self.batches], order)
        _join_into(self.control.record.kept_counts, [batch.kept_counts for batch in self.batches], order)


def _join_into(record: dict[Key, Tensor], parts: Sequence[Mapping[Key, Tensor]], order: Tensor) -> None:
    for name in parts[0]:
        if all(name in part for part in parts):
            together = torch.cat([part[name] for part in parts])
            record[name] = together[order.to(together.device)]


def _joined_states(states: Sequence[TokenState], order: Tensor) -> TokenState:
    """The states of several batches as one; shorter ones are padded."""
    length = max(state.length for state in states)

    def padded(state: TokenState) -> tuple[Tensor, Tensor, Tensor]:
        device = order.device if state.index is None else state.index.device
        index = positions_of(state, device)
        valid = torch.ones_like(index, dtype=torch.bool) if state.valid is None else state.valid
        merged = torch.zeros_like(valid) if state.merged is None else state.merged
        index, valid, merged = (torch.nn.functional.pad(x, (0, length - state.length)) for x in (index, valid, merged))
        return index, valid, merged

    fields = [torch.cat(same) for same in zip(*map(padded, states), strict=True)]
    index, valid, merged = (field[order.to(field.device)] for field in fields)
    full = max(state.full_length for state in states)
    return TokenState(
        full_length=full,
        length=length,
        batch=len(index),
        index=index,
        valid=valid,
        merged=merged,
        quirks=states[0].quirks,
    )
