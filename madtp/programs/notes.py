"""Remarks on calls that run unpruned: start at :class:`Notes`."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from madtp.errors import UnprunedError
from madtp.report import RewriteReport, UnprunedCalls
from madtp.sites.control import PruningControl

log = logging.getLogger("madtp")
FILLS = (
    "{} changes a container that it is given, such as a dictionary of features for later calls. Where it is pruned, the "
    "container stays as it was"
)
_held: ContextVar[list[UnprunedCalls] | None] = ContextVar("remarks on calls that run unpruned", default=None)


class Notes:
    """Remarks on calls, each logged once and kept in the report.

    Attributes:
        report: Takes the remarks.
        strict: Calls that run unpruned are an error.
    """

    def __init__(self, report: RewriteReport, *, strict: bool = False) -> None:
        self.report, self.strict = report, strict

    def add(self, text: str) -> None:
        """Log ``text`` unless it was logged before."""
        if text not in self.report.notes:
            self.report.notes.append(text)
            log.warning("%s", text)

    def unpruned(self, called: str, reason: str) -> None:
        """Say that calls of a module, a model or a method run unpruned, and why.

        Raises:
            UnprunedError: the configuration is strict.
        """
        calls = UnprunedCalls(called, reason)
        held = _held.get()
        if held is not None:
            held.append(calls)
            return
        if self.strict:
            raise UnprunedError(
                f"{calls}. Leave strict=True out of the configuration to run them as the original does."
            )
        if calls not in self.report.unpruned:
            self.report.unpruned.append(calls)
        self.add(str(calls))


@contextmanager
def holding_remarks() -> Iterator[list[UnprunedCalls]]:
    """Collect remarks on unpruned calls inside the block, in place of making them."""
    held: list[UnprunedCalls] = []
    before = _held.set(held)
    try:
        yield held
    finally:
        _held.reset(before)


@contextmanager
def noting_unpruned_blocks(
    host: nn.Module, blocks: Collection[str], *, control: PruningControl, notes: Notes, method: str
) -> Iterator[None]:
    """Note blocks that run inside the block of code although no program runs them.

    Args:
        host: the module tree.
        blocks: paths of the blocks that hold sites.
        control: the control of the pruned model.
        notes: take the remark.
        method: name of the host's method that is at work, for the remark.
    """
    watched = {id(module): path for path, module in host.named_modules() if path in blocks}
    unpruned: list[str] = []

    def enter(module: nn.Module, args: object) -> None:
        if id(module) in watched and control.active and not (control.scope.runs_original or control.scope.programs):
            unpruned.append(watched[id(module)])

    handle = register_module_forward_pre_hook(enter)
    try:
        yield
    finally:
        handle.remove()
    if unpruned:
        notes.unpruned(
            method,
            f"it runs {unpruned[0]} by itself, outside any tower that is called as a module; "
            "call the model, or rewrite the submodule that it calls.",
        )
