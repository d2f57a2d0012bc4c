"""A program in a cache, with what tells whether it still serves: :class:`CachedProgram`."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from madtp.calls.call import Signature
from madtp.calls.double_precision import LESS
from madtp.calls.hooks import HookedModules
from madtp.programs.program import Program


class Unserved(Exception):
    """No program runs for a call; the message says why, to users."""


@dataclass(frozen=True)
class CachedProgram:
    """A program in the cache.

    Attributes:
        program: the program.
        signature: that of the calls that it serves.
        classes: the classes of the modules whose place it takes, by path.
        hooked: looks for hooks on these modules.
    """

    program: Program
    signature: Signature
    classes: Mapping[str, type[nn.Module]]
    hooked: HookedModules


def classes_of(modules: Iterable[tuple[str, nn.Module]]) -> dict[str, type[nn.Module]]:
    """Return the classes of named modules."""
    return {path: type(module) for path, module in modules}


def without_attributes(kind: Signature, places: Collection[int]) -> Signature:
    """Return a signature without some attributes of modules."""
    kept = tuple([value for at, value in enumerate(kind.modules.attributes) if at not in places])
    return replace(kind, modules=kind.modules._replace(attributes=kept))


def doubled(kind: Signature) -> Signature:
    """Return the signature of calls that are in double precision, of a model that is."""
    less = {str(dtype) for dtype in LESS}
    leaves = tuple([one._replace(kind=str(torch.float64)) if one.kind in less else one for one in kind.leaves])
    dtypes = tuple([torch.float64 if one in LESS else one for one in kind.modules.dtypes])
    return replace(kind, leaves=leaves, modules=kind.modules._replace(dtypes=dtypes))


def differs_in_attributes(one: Signature, other: Signature) -> bool:
    """Return whether two signatures differ in attributes of modules, and in nothing else."""
    attributes = other.modules.attributes
    alike = replace(one, modules=one.modules._replace(attributes=attributes)) == other
    return alike and len(one.modules.attributes) == len(attributes) and one.modules.attributes != attributes
