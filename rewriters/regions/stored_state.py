"""Tensors of samples that modules keep in their attributes as a model runs: :func:`stored_by`.

A program stores nothing in attributes. Where a later call reads what an earlier one has stored, such as keys and values that a
module keeps for the next token, no program may take the module's place; :func:`why_not_rewritten` says so. Other stored tensors
get a note: whoever looks at them finds old ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from madtp.calls.batch import sample_dim
from madtp.calls.call import Call
from madtp.calls.stored_tensors import StoredTensors
from madtp.programs.single_sample import with_doubled_sample
from madtp.sites.preserved_state import trial_run
from rewriters.capture.scope import Region
from rewriters.regions.attribute_reads import reads_earlier

SHOWN = 3
STORED = (
    "forward stores tensors of each sample in {}, and calls of the pruned model do not: what reads them later finds old ones. "
    "Return them, or leave this part out of the rewrite (towers, layers)"
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
    """

    module: str
    name: str
    is_state: bool

    def __str__(self) -> str:
        return f"{self.module}.{self.name}".lstrip(".")


def stored_by(model: nn.Module, call: Call) -> list[StoredAttribute]:
    """Return where a model leaves tensors of samples; it is run once or twice, and is as before afterwards.

    What a model derives from its parameters, such as the bias of positions, has no samples: twice as many leave it as it is.
    """
    samples = call.samples()
    kept = [place for place, counts in _stored(model, call).items() if samples in counts]
    if not kept:
        return []
    doubled = {place: {2 * samples} for place in kept if samples > 1}
    with suppress(Exception):  # such as a model that takes as many samples alone
        doubled = _stored(model, _with_all_doubled(call))
    modules = dict(model.named_modules())
    found = [place for place in kept if 2 * samples in doubled.get(place, ())]
    return [StoredAttribute(path, name, reads_earlier(modules[path], name)) for path, name in found]


def _stored(model: nn.Module, call: Call) -> dict[tuple[str, str], set[int]]:
    """Run the model; returns the lengths of the first dimension of what it stores, by path of the module and attribute."""
    places = {id(vars(module)): (path, "") for path, module in model.named_modules()}
    for path, module in model.named_modules():
        containers = [(name, value) for name, value in vars(module).items() if isinstance(value, (list, dict))]
        places = {**{id(value): (path, name) for name, value in containers}, **places}
    stored, found = StoredTensors(model.modules()), {}
    with torch.no_grad(), trial_run(model, call.flat()[0]):
        model(*call.args, **call.kwargs)
        for one in stored.changed():
            if id(one.holder) in places:
                path, container = places[id(one.holder)]
                found[path, container or str(one.key)] = _lengths(one.now())
    return found


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


def _naming(text: str, stored: Sequence[StoredAttribute]) -> str | None:
    if not stored:
        return None
    return text.format(", ".join(map(str, stored[:SHOWN])) + (" ..." if len(stored) > SHOWN else ""))


def _lengths(value: object) -> set[int]:
    tensors = [x for x in pytree.tree_leaves(value) if isinstance(x, Tensor)]
    return {x.shape[0] for x in tensors if x.is_floating_point() and x.dim() > 2}
