"""The programs of one module, by call signature: found again, or captured once more.

Start at :class:`Programs`. A capture serves one kind of call (:class:`madtp.calls.Signature`); what it was made for is
compared with each call, and a call that none of them serves is captured by itself onto the same sites.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from madtp.additions import PREFIX, Additions
from madtp.calls import Call, Signature, signature
from madtp.control import Run
from madtp.pairs import Pair, as_pair, doubled, first_of_each, twice
from madtp.program import Program

log = logging.getLogger("madtp")
CACHE = 16
# Ways of the model's Python on calls of one signature that are captured; on others the original runs.
BRANCHES = 4
MANY_WAYS = f"the model's Python goes more than {BRANCHES} ways on calls of one kind"

Builder = Callable[[nn.Module, Call, int], Program]


@dataclass
class _Entry:
    program: Program
    signature: Signature


class Programs:
    """The programs that stand for calls of ``module``, which lies at ``path`` of the module tree ``host``.

    builder: captures and rewrites the module for a further call, under a serial number.
    """

    def __init__(self, path: str, module: nn.Module, host: nn.Module, builder: Builder) -> None:
        self.path, self.module, self.host, self.builder = path, module, host, builder
        self.additions: Additions = host._modules[PREFIX]  # type: ignore[assignment]
        self.entries: OrderedDict[int, _Entry] = OrderedDict()

    def candidates(self, call: Call) -> Iterator[Program]:
        """The programs to try on ``call``: those for calls like it, then one that is captured for it."""
        found = self.matching(call)
        yield from found
        if len(found) < BRANCHES:
            yield self.build(call)

    def matching(self, call: Call) -> list[Program]:
        """The programs made for calls like ``call``, latest first; they differ in the way that the model's Python went."""
        return [
            cached.program
            for cached in reversed(self.entries.values())
            if signature(self.module, call, cached.program.dynamic) == cached.signature
        ]

    def build(self, call: Call) -> Program:
        """Capture and rewrite the module for calls like ``call``.

        Raises:
            MadtpError: from the rewrite, or because no program can serve a single sample.
        """
        log.info("capturing %s for a new call signature", self.path or type(self.module).__name__)
        captured = doubled(call)
        with self._untouched():
            program = self.builder(self.module, captured, self.additions.programs)
        self._hold(program)
        if captured is not call and _frozen_batch(program, captured):
            program = self._serving_one(program, call)
        self._remember(program, call)
        return program

    def _serving_one(self, program: Program, call: Call) -> Program:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            with self._untouched():
                wanted = self.module(*call.args, **call.kwargs)
            with self.additions.control.unpruned():
                return as_pair(program, self.module, self.host, call, wanted)

    def adopt(self, program: Program, call: Call) -> None:
        """Take a program into the cache as the one for calls like ``call``."""
        self._hold(program)
        self._remember(program, call)

    def _hold(self, program: Program) -> None:
        """Give the program what it needs to run."""
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
        leaves = call.flat()[0]
        result = program.run(self.host, leaves)
        states = {name: control.states[name] for name in program.sites if name in control.states}
        if isinstance(program, Pair):
            leaves = [twice(x) for x in leaves]
            control.states.update(first_of_each(states))
        control.runs.append(Run(program, [_meta(x) for x in leaves], states))
        return result

    @contextmanager
    def _untouched(self) -> Iterator[None]:
        """The module as it was before the rewrite: without additions, and with its own forward."""
        own = self.module._modules.pop(PREFIX, None)
        replaced = self.module.__dict__.pop("forward", None)
        try:
            yield
        finally:
            if own is not None:
                self.module._modules[PREFIX] = own
            if replaced is not None:
                self.module.__dict__["forward"] = replaced


def _meta(leaf: Any) -> Any:
    return torch.empty(leaf.shape, device="meta") if isinstance(leaf, Tensor) else leaf


def _frozen_batch(program: Program, call: Call) -> bool:
    leaves = zip(call.flat()[0], program.dynamic, strict=True)
    return any(isinstance(x, Tensor) and x.dim() > 0 and 0 not in free for x, free in leaves)
