"""The programs of one module, by call signature: found again, or captured once more.

Start at :class:`Programs`. A capture serves one kind of call (:class:`madtp.calls.call.Signature`); what it was made for is
compared with each call, and a call that none of them serves is captured by itself onto the same sites.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from madtp.calls.batch import are_free, sample_dims
from madtp.calls.call import Call, Signature, signature
from madtp.calls.compare import compare, drawing_alike
from madtp.calls.objects import CannotFlatten, object_kind, objects_in, on_tensors
from madtp.calls.per_image import PerImageArguments, per_image_module
from madtp.errors import CaptureError, ExampleInputsError
from madtp.programs.checkpointing import in_pieces
from madtp.programs.program import Program, Run
from madtp.programs.single_sample import Pair, as_pair, doubled, doubled_dims, first_of_each, twice
from madtp.sites.additions import PREFIX, Additions
from madtp.tokens.cache_marks import MarkedAxes, any_marked, zero_marked

log = logging.getLogger("madtp")
CACHE = 16
# Ways of the model's Python on calls of one signature that are captured; on others the original runs.
BRANCHES = 4
MANY_WAYS = f"the model's Python goes more than {BRANCHES} ways on calls of one kind"

Builder = Callable[[nn.Module, Call, int, Mapping[str, MarkedAxes]], Program]


@dataclass
class _Entry:
    program: Program
    signature: Signature


class StandIn:
    """Stands in for ``module.forward``; looks like it to whoever inspects its signature."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.original: Callable[..., Any] = module.forward
        self.__wrapped__ = self.original


class Programs:
    """The programs that stand for calls of ``module``, which lies at ``path`` of the module tree ``host``.

    builder: captures and rewrites the module for a further call, under a serial number. inner: the module lies in another one
    that programs stand for, so that nothing was rewritten and checked for it in advance. apart: how calls were taken apart into
    images, a batch of which a program takes; None if they are not.
    """

    def __init__(
        self,
        path: str,
        module: nn.Module,
        host: nn.Module,
        builder: Builder,
        *,
        inner: bool = False,
        apart: PerImageArguments | None = None,
    ) -> None:
        self.path, self.module, self.host, self.builder, self.inner = path, module, host, builder, inner
        self.apart = apart
        self.additions: Additions = host._modules[PREFIX]  # type: ignore[assignment]
        self.entries: OrderedDict[int, _Entry] = OrderedDict()
        self.marked: dict[str, MarkedAxes] = {}
        self.sizes: set[str] = set()

    def continues_pruned(self, call: Call) -> bool:
        """Whether ``call`` reads something from which an earlier, pruned call has dropped tokens."""
        if not self.marked or object_kind((call.args, call.kwargs)) is None:
            return False
        try:
            call = call.flattened(self.sizes)
        except CannotFlatten:
            return False
        assert call.objects is not None
        leaves = call.flat()[0]
        kept = zip(call.objects.paths(), (leaves[at] for at in sorted(call.cache_leaves())), strict=True)
        return any_marked((values, self.marked[path]) for path, values in kept if path in self.marked)

    def candidates(self, call: Call) -> Iterator[Program]:
        """The programs to try on ``call``: those for calls like it, then one that is captured for it."""
        found = self.matching(call)
        yield from found
        if len(found) < BRANCHES:
            yield self.build(call)

    def matching(self, call: Call) -> list[Program]:
        """The programs made for calls like ``call``, latest first; they differ in the way that the model's Python went."""
        try:
            call = call.flattened(self.sizes)
        except CannotFlatten:
            return []
        leaves = call.flat()[0]
        return [
            cached.program
            for cached in reversed(self.entries.values())
            if signature(self.module, call, cached.program.dynamic) == cached.signature
            and cached.program.serves(leaves)
        ]

    def build(self, call: Call) -> Program:
        """Capture and rewrite the module for calls like ``call``.

        Raises:
            MadtpError: from the rewrite, or because no program can serve a single sample.
        """
        log.info("capturing %s for a new call signature", self.path or type(self.module).__name__)
        with suppress(CannotFlatten):  # the builder says best what is wrong
            call = call.flattened(self.sizes)
        captured, program = self._built(call)
        self._hold(program)
        if captured is not call:
            leaves = call.flat()[0]
            if not (are_free(doubled_dims(leaves), program.dynamic) and program.serves(leaves)):
                program = self._serving_one(program, call)
        if call.cache_leaves() or self.inner or self.apart is not None:
            self._check(program, call)
        self._remember(program, call)
        return program

    def _built(self, call: Call) -> tuple[Call, Program]:
        """The program for calls like ``call``, and the call it was captured from: of two samples where there is one."""
        captured = doubled(call)
        try:
            with self._untouched():
                return captured, self.builder(self.module, captured, self.additions.programs, self.marked)
        except (CaptureError, ExampleInputsError):
            if captured is call or sample_dims(call.flat()[0]) is not None:
                raise
        # A tensor without a batch dimension is no part of the sample, then.
        with self._untouched():
            return call, self.builder(self.module, call, self.additions.programs, self.marked)

    def _serving_one(self, program: Program, call: Call) -> Program:
        with torch.no_grad():
            with drawing_alike(), self._untouched():
                wanted = self._opened(call, program)(*call.args, **call.kwargs)
            with drawing_alike(), self.additions.control.unpruned():
                return as_pair(program, self.module, self.host, call, wanted)

    def _check(self, program: Program, call: Call) -> None:
        """With pruning off and all visible that was kept, a program computes what the module computes.

        Raises:
            RewriteError: it does not.
        """
        if any(m.training for m in self.module.modules()):
            return
        kept = call.cache_leaves()
        leaves = [
            zero_marked(x) if at in kept and isinstance(x, Tensor) and x.is_floating_point() else x
            for at, x in enumerate(call.flat()[0])
        ]
        visible = call.with_leaves(leaves)
        with torch.no_grad():
            with drawing_alike(), self._untouched():
                expected = self._opened(call, program)(*visible.args, **visible.kwargs)
            with drawing_alike(), self.additions.control.unpruned():
                compare(expected, program.run(self.host, leaves))

    def _opened(self, call: Call, program: Program) -> nn.Module:
        """The module as it takes ``call``."""
        return per_image_module(on_tensors(self.module, call.objects, program.sizes()), self.apart)

    def adopt(self, program: Program, call: Call) -> None:
        """Take a program into the cache as the one for calls like ``call``."""
        self._hold(program)
        self._remember(program, call.flattened(self.sizes))

    def _hold(self, program: Program) -> None:
        """Give the program what it needs to run."""
        self.marked.update(program.marked)
        self.sizes.update(program.sizes())
        self.additions.bind(program.cost)
        for name, value in program.constants.items():
            self.additions.constants.register_buffer(name, value, persistent=False)

    def _remember(self, program: Program, call: Call) -> None:
        self.entries[self.additions.programs] = _Entry(program, signature(self.module, call, program.dynamic))
        self.additions.programs += 1
        while len(self.entries) > CACHE:
            self.entries.popitem(last=False)

    def run(self, program: Program, call: Call) -> Any:
        """Run a program and record it; returns what the module returns."""
        control = self.additions.control
        leaves = call.flattened(program.given).flat()[0]
        if control.gradient_checkpointing and torch.is_grad_enabled():
            if program.pieces is None:
                program.pieces = in_pieces(program.graph, self.host, self.path or "whole")
            result = program.run_in_pieces(self.host, leaves)
        else:
            result = program.run(self.host, leaves)
        states = {name: control.record.states[name] for name in program.sites if name in control.record.states}
        if isinstance(program, Pair):
            leaves = twice(leaves)
            control.record.states.update(first_of_each(states))
        control.record.runs.append(Run(program, [_meta(x) for x in leaves], states))
        if program.returned is None:
            return result
        plain, tensors = result
        return program.returned.close(plain, tensors, objects_in((call.args, call.kwargs)))

    @contextmanager
    def _untouched(self) -> Iterator[None]:
        """The module as it was before the rewrite: without additions, and with the forwards of its own."""
        own = self.module._modules.pop(PREFIX, None)
        replaced = [m for m in self.module.modules() if isinstance(m.__dict__.get("forward"), StandIn)]
        forwards = [m.__dict__.pop("forward") for m in replaced]
        try:
            yield
        finally:
            if own is not None:
                self.module._modules[PREFIX] = own
            for module, forward in zip(replaced, forwards, strict=True):
                module.__dict__["forward"] = forward


def _meta(leaf: Any) -> Any:
    return torch.empty(leaf.shape, device="meta") if isinstance(leaf, Tensor) else leaf
