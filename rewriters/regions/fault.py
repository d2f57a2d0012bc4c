"""Which region keeps a model from computing what the original computes: :func:`region_at_fault`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from madtp.calls.call import Call
from madtp.programs.host_forward import HostForward
from madtp.programs.replaced_forward import ReplacedForward
from madtp.pruned import PrunedModel
from rewriters.capture.scope import Region


def region_at_fault(pruned: PrunedModel, regions: Sequence[Region], call: Call) -> Region | None:
    """A region that by itself makes a model differ from the original; None if there is none.

    Args:
        pruned: The model with all its regions, which differs.
        regions: Its regions.
        call: The example call.
    """
    host = pruned.madtp.forward_of_host
    if len(regions) < 2 or not isinstance(host, HostForward):
        return next(iter(regions), None)
    for region in regions:
        with _alone(pruned, region, regions), host.control.call(), host.control.unrecorded():
            if host.disagreement(call) is not None:
                return region
    return None


@contextmanager
def _alone(pruned: PrunedModel, region: Region, regions: Sequence[Region]) -> Iterator[None]:
    """Let one region run a program, and the others their own code."""
    paths = [path for other in regions if other is not region for path in _replaced(other)]
    others = [pruned.get_submodule(path).__dict__ for path in paths]
    programs = [attributes.pop("forward") for attributes in others]
    for attributes, program in zip(others, programs, strict=True):
        if isinstance(program, ReplacedForward) and program.attribute is not None:
            attributes["forward"] = program.attribute
    try:
        yield
    finally:
        for attributes, program in zip(others, programs, strict=True):
            attributes["forward"] = program


def _replaced(region: Region) -> tuple[str, ...]:
    """Paths of the modules whose forwards programs have replaced."""
    return (region.path,) if region.chain is None else region.chain.names
