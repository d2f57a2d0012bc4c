"""Methods of the host that run blocks by themselves: :class:`PrunedMethods` lets programs compute them.

A method such as ``encode_text`` may call a tower and read one position of what it returns. As a region the tower would have to
return every position, so it is left alone; the method as a whole is captured like a forward.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple, TypeAlias

from torch import nn

from madtp.calls.branches import OtherBranch
from madtp.calls.call import normalise_call
from madtp.errors import MadtpError
from madtp.programs.cached_program import Unserved
from madtp.programs.notes import Notes, holding_remarks
from madtp.programs.program_builder import BuildProgram
from madtp.programs.program_cache import ProgramCache
from madtp.sites.control import PruningControl

Method: TypeAlias = Callable[..., Any]


class Served(NamedTuple):
    """What a program returned."""

    result: object


class PrunedMethods:
    """Methods of a host that is rewritten whole, as far as their own code leaves blocks unpruned.

    Attributes:
        host: the pruned model.
        build_program: builds a program of a method.
        control: the control of the pruned model.
        notes: takes remarks on calls that run unpruned.
        programs: the programs by name of the method; None if its calls cannot be captured.
    """

    def __init__(self, host: nn.Module, build_program: BuildProgram, control: PruningControl, notes: Notes) -> None:
        """Begin without programs; see above for the arguments."""
        self.host, self.build_program, self.control, self.notes = host, build_program, control, notes
        self.programs: dict[str, ProgramCache | None] = {}

    def run(self, method: Method, own: Method, args: tuple[object, ...], kwargs: Mapping[str, object]) -> object:
        """Call a method of the host.

        Args:
            method: bound to the host.
            own: runs its own code.
            args: its arguments.
            kwargs: its arguments by name.
        """
        name = method.__name__
        if name in self.programs:
            served = self._served(name, method, args, kwargs)
            return own(*args, **kwargs) if served is None else served.result
        with holding_remarks() as held:
            result = own(*args, **kwargs)
        if not held:
            return result
        served = self._served(name, method, args, kwargs)
        if served is not None:
            return served.result
        self.programs[name] = None
        for one in held:
            self.notes.unpruned(one.called, one.reason)
        return result

    def _served(
        self, name: str, method: Method, args: tuple[object, ...], kwargs: Mapping[str, object]
    ) -> Served | None:
        """What a program returns; None if none serves the call."""
        programs = self.programs.get(name) or self._begin(name)
        if programs is None:
            return None
        try:
            call = normalise_call(self.host, args, kwargs, inspect.signature(method))
            if not call.tensors():
                return None
            for program in programs.candidates(call):
                with suppress(OtherBranch), self.control.call(), programs.trying(program, call):
                    self.control.begin_program()
                    return Served(programs.run(program, call))
        except (Unserved, MadtpError):
            return None
        return None

    def _begin(self, name: str) -> ProgramCache | None:
        if name not in self.programs:
            self.programs[name] = ProgramCache("", self.host, self.build_program, inner=True, method=name)
        return self.programs[name]
