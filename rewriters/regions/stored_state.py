"""Tensors of samples that modules keep in their attributes as a model runs: :func:`stored_by`.

A program stores nothing in attributes. Where a later call reads what an earlier one has stored, such as keys and values that a
module keeps for the next token, no program may take the module's place; :func:`why_not_rewritten` says so. Other stored tensors
get a note, and whoever reads them nevertheless an error (:class:`madtp.programs.unwritten.Unwritten`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from madtp.calls.batch import sample_dim
from madtp.calls.call import Call
from madtp.calls.held_containers import containers_in
from madtp.calls.stored_tensors import TORCHS_OWN, StoredTensors
from madtp.programs.single_sample import with_doubled_sample
from madtp.sites.preserved_state import trial_run
from rewriters.capture.scope import Region
from rewriters.regions.attribute_reads import reads_earlier

SHOWN = 3
STORED = (
    "forward stores tensors of each sample in {}, and calls of the pruned model do not; reading them is an error. Return them, "
    "or leave this part out of the rewrite (towers, layers)"
)
STATE = (
    "its modules keep tensors of each sample in {} and read them in a later call, such as keys and values of earlier tokens, "
    "which programs do not; hand such a cache on as an object that forward takes and returns"
)


@dataclass(frozen=True)
class StoredAttribute:
    """An attribute in which a module leaves tensors of samples.

    Attributes:
        module: The path of the module.
        name: The attribute.
        is_state: Whether a later call may read it.
        is_plain: It holds the tensor itself, or a tuple of tensors.
    """

    module: str
    name: str
    is_state: bool
    is_plain: bool

    def __str__(self) -> str:
        return f"{self.module}.{self.name}".lstrip(".")


Shapes = tuple[tuple[int, ...], ...]
Places = dict[tuple[str, str], Shapes]
"""The shapes of tensors that were stored, by path of the module and attribute."""


def stored_by(model: nn.Module, call: Call) -> list[StoredAttribute]:
    """Return where a model leaves tensors of samples; it is run once or twice, and is as before afterwards.

    What a model derives from its parameters, such as the bias of positions, has no samples: twice as many leave it as it is.
    """
    samples = call.samples()
    try:
        once = _stored(model, call)
    except Exception:  # what is wrong with the call is told where it is captured
        return []
    if not once:
        return []
    try:
        twice = _stored(model, _with_all_doubled(call))
    except Exception:  # such as a model that takes as many samples alone
        found = [place for place, shapes in once.items() if samples > 1 and any(samples in shape for shape in shapes)]
    else:
        found = [place for place, shapes in once.items() if twice.get(place) != shapes]
    modules = dict(model.named_modules())
    return [_attribute(modules[path], path, name) for path, name in found]


def _attribute(module: nn.Module, path: str, name: str) -> StoredAttribute:
    value = vars(module).get(name)
    holds_object = any(True for _ in containers_in([value], set())) and not isinstance(value, (list, dict, tuple))
    is_plain = not isinstance(value, (list, dict)) and not holds_object and name not in module._buffers
    return StoredAttribute(path, name, holds_object or reads_earlier(module, name), is_plain)


def _stored(model: nn.Module, call: Call) -> Places:
    """Run the model; returns what it has stored."""
    places: dict[int, tuple[str, str]] = {}
    for path, module in model.named_modules():
        places[id(vars(module))] = places[id(module._buffers)] = path, ""
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name not in TORCHS_OWN:
                for held in containers_in([value], set()):
                    places.setdefault(id(held), (path, name))
    stored, found = StoredTensors(model.modules()), Places()
    with torch.no_grad(), trial_run(model, (call.args, call.kwargs)):
        model(*call.args, **call.kwargs)
        for one in stored.changed():
            if id(one.holder) in places:
                path, inside = places[id(one.holder)]
                place = path, inside or str(one.key)
                found[place] = (*found.get(place, ()), *_shapes(one.now()))
    return {place: shapes for place, shapes in found.items() if shapes}


def _with_all_doubled(call: Call) -> Call:
    samples = call.samples()
    if samples == 1:
        return with_doubled_sample(call)
    leaves, dims = call.flat()[0], [sample_dim(leaf, samples) for leaf in call.flat()[0]]
    return call.with_leaves(
        [
            x if d is None or not isinstance(x, Tensor) else torch.cat([x, x], d)
            for x, d in zip(leaves, dims, strict=True)
        ]
    )


def why_not_rewritten(stored: Sequence[StoredAttribute], region: Region) -> str | None:
    """The reason why no program may take a region's place; None if modules in it keep no state."""
    return _naming(STATE, [one for one in stored if one.is_state and region.holds(one.module)])


def stored_note(stored: Sequence[StoredAttribute], regions: Sequence[Region]) -> str | None:
    """The note on tensors that the programs of regions no longer store; None if there are none."""
    return _naming(STORED, [one for one in stored if any(region.holds(one.module) for region in regions)])


def unwritten_attributes(stored: Sequence[StoredAttribute], region: Region) -> list[tuple[str, str]]:
    """The attributes that programs of a region leave behind; what reads them later is told so."""
    return [(one.module, one.name) for one in stored if one.is_plain and region.holds(one.module)]


def _naming(text: str, stored: Sequence[StoredAttribute]) -> str | None:
    if not stored:
        return None
    return text.format(", ".join(map(str, stored[:SHOWN])) + (" ..." if len(stored) > SHOWN else ""))


def _shapes(value: object) -> Shapes:
    found = [value, *containers_in([value], set())]
    tensors = {id(x): x for x in pytree.tree_leaves(found) if isinstance(x, Tensor)}
    return tuple(tuple(x.shape) for x in tensors.values())
