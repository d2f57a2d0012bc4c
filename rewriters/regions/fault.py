"""Which region keeps a model from computing what the original computes: :func:`region_at_fault`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from madtp.calls.call import Call
from madtp.programs.host_forward import HostForward
from madtp.programs.replaced_forward import ReplacedForward
from madtp.pruned import PrunedModel


def region_at_fault(pruned: PrunedModel, paths: Sequence[str], call: Call) -> str | None:
    """The path of a region that by itself makes a model differ from the original; None if there is none.

    Args:
        pruned: The model with all its regions, which differs.
        paths: The paths of its regions.
        call: The example call.
    """
    host = pruned.madtp.forward_of_host
    if len(paths) < 2 or not isinstance(host, HostForward):
        return next(iter(paths), None)
    for path in paths:
        with _alone(pruned, path, paths), host.control.call(), host.control.unrecorded():
            if host.disagreement(call) is not None:
                return path
    return None


@contextmanager
def _alone(pruned: PrunedModel, path: str, paths: Sequence[str]) -> Iterator[None]:
    """Let one region run a program, and the others their own code."""
    others = [pruned.get_submodule(other).__dict__ for other in paths if other != path]
    programs = [attributes.pop("forward") for attributes in others]
    for attributes, program in zip(others, programs, strict=True):
        if isinstance(program, ReplacedForward) and program.attribute is not None:
            attributes["forward"] = program.attribute
    try:
        yield
    finally:
        for attributes, program in zip(others, programs, strict=True):
            attributes["forward"] = program
