"""Regions whose calls are taken apart into images; start at :class:`RegionApart`.

Images of one size run as a batch, by one program for each size; results are put back in the order and packing of the
original's. What does not come apart (see :mod:`madtp.calls.per_image`) runs as the original does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from madtp.calls.call import Call, normalise_call
from madtp.calls.compare import drawing_alike
from madtp.calls.per_image import Image, ImageResults, PerImageArguments, PerImageForward, by_kind, image_results
from madtp.errors import ExampleInputsError, RewriteError
from madtp.programs.cache import CACHE, Programs, StandIn
from madtp.programs.region import Notes, Region
from madtp.sites.control import PruningControl
from madtp.tokens.state import TokenState, positions_of

MANY_SIZES = f"images of more than {CACHE} sizes were seen; bring images to fewer sizes"
Template = tuple[Any, ...]
Key = TypeVar("Key")


class RegionApart(StandIn):
    """The forward of a region that takes all images at once: its programs take a batch of images of one size."""

    def __init__(self, programs: Programs, apart: PerImageArguments, control: PruningControl, notes: Notes) -> None:
        super().__init__(programs.module)
        self.programs, self.apart, self.control, self.notes = programs, apart, control, notes
        self.region = Region(programs, control, notes, original=PerImageForward(self.original, apart))
        self.recipes: dict[Template, ImageResults] = {}
        self.kinds: set[Any] = set()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.control.runs_original:
            return self.original(*args, **kwargs)
        try:
            call = normalise_call(self.module, args, kwargs)
        except ExampleInputsError:  # the original says best what is wrong
            return self.original(*args, **kwargs)
        images = self.apart.images(call)
        recipe = None if images is None else self._recipe(call, images)
        if images is None or recipe is None:
            return self.original(*args, **kwargs)
        with self.control.call():
            return self._run(call, images, recipe)

    def _run(self, call: Call, images: Sequence[Image], recipe: ImageResults) -> Any:
        groups = by_kind(images)
        results: dict[int, list[Any]] = {}
        records = _Records(self.control, self.programs)
        for numbers in groups:
            batch = self.apart.batch(call, [images[number] for number in numbers])
            leaves = self.region(*batch.args, **batch.kwargs)
            records.take(numbers)
            for place, number in enumerate(numbers):
                results[number] = [x[place] if isinstance(x, Tensor) else x for x in leaves]
        records.give()
        return recipe.join([results[number] for number in range(len(images))])

    def _recipe(self, call: Call, images: Sequence[Image]) -> ImageResults | None:
        """How results are put together; images of a new size are checked once to come apart. None: they do not."""
        template = self._template(call)
        kinds = {image.kind for image in images}
        if template in self.recipes and kinds <= self.kinds:
            return self.recipes[template]
        if len(self.kinds | kinds) > CACHE:
            self._note(MANY_SIZES)
            return None
        several = list(images) * 2 if len(images) == 1 else images
        together = self.apart.join(call, several)
        try:
            # A check is no part of the model's work: nobody counts it.
            with torch.no_grad(), drawing_alike(), self.control.running_original(), self.control.in_program():
                recipe = image_results(self.original, together, several, self.apart)
        except RewriteError as error:
            self._note(f"its images do not come apart: {error}")
            return None
        if self.recipes.setdefault(template, recipe) != recipe:
            self._note("its results are put together in different ways for images of different sizes.")
            return None
        self.kinds |= kinds
        return recipe

    def _template(self, call: Call) -> Template:
        """All of a call that is the same for images of any size and number."""
        own = {*self.apart.sizes, *(rows.name for rows in self.apart.rows)}
        leaves, spec = pytree.tree_flatten((call.args, {k: v for k, v in call.kwargs.items() if k not in own}))
        return str(spec), *map(repr, leaves), *(m.training for m in self.module.modules())

    def _note(self, reason: str) -> None:
        self.notes.unpruned(self.programs.path or type(self.module).__name__, reason)


class _Records:
    """What the sites of a region note down about each batch of images, joined for all images of a call."""

    def __init__(self, control: PruningControl, programs: Programs) -> None:
        self.control, self.programs = control, programs
        self.runs = 0
        self.taken: list[tuple[list[int], dict[str, TokenState], dict[Any, Tensor], dict[str, Tensor]]] = []

    def take(self, numbers: list[int]) -> None:
        """After a batch of the images ``numbers``."""
        control = self.control
        states = dict(control.record.runs[-1].states) if control.record.runs else {}
        features = {key: value for key, value in control.record.features.items() if key[0] in states}
        counts = {name: value for name, value in control.record.kept_counts.items() if name.partition("[")[0] in states}
        self.taken.append((numbers, states, features, counts))

    def give(self) -> None:
        """After the last batch."""
        if len(self.taken) < 2:
            return
        order = torch.tensor([number for numbers, *_ in self.taken for number in numbers]).argsort()
        states = [states for _, states, _, _ in self.taken]
        for name in states[0]:
            self.control.record.states[name] = _joined_states([own[name] for own in states if name in own], order)
        _join_into(self.control.record.features, [features for _, _, features, _ in self.taken], order)
        _join_into(self.control.record.kept_counts, [counts for *_, counts in self.taken], order)


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
