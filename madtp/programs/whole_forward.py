"""The forward of a host that is rewritten whole: :class:`WholeForward`."""

from __future__ import annotations

from contextlib import suppress

from madtp.calls.branches import OtherBranch
from madtp.calls.call import is_empty, normalise_call
from madtp.calls.objects import objects_in
from madtp.errors import ContinuationError, ExampleInputsError
from madtp.programs.cached_program import Unserved
from madtp.programs.cached_steps import CachedSteps
from madtp.programs.handed_back import HandedBack
from madtp.programs.notes import FILLS, Notes
from madtp.programs.program_cache import ProgramCache
from madtp.programs.replaced_forward import ReplacedForward
from madtp.sites.control import PruningControl


class WholeForward(ReplacedForward):
    """The forward of a host that programs compute as a whole.

    Attributes:
        programs: the programs of the host.
        control: the control of the pruned model.
        notes: takes remarks on calls that run unpruned.
        steps: run calls that go on from a key/value cache.
        handed_back: tells calls that are given features of the call before.
    """

    def __init__(self, programs: ProgramCache, control: PruningControl, notes: Notes) -> None:
        """Take the place of the host's forward; see above for the arguments."""
        super().__init__(programs.module)
        self.programs, self.control, self.notes = programs, control, notes
        self.steps = CachedSteps(programs.module, programs.host, control)
        self.handed_back = HandedBack(type(programs.module).__name__, control, notes)

    def __call__(self, *args: object, **kwargs: object) -> object:
        """Run a program that serves the call; the host's own forward if none does."""
        original = self.original
        if self.control.scope.runs_original:
            return original(*args, **kwargs)
        self.handed_back.look_at(args, kwargs)
        if self.steps.serve_text(args, kwargs):
            return self.steps.run(original, args, kwargs)
        try:
            call = normalise_call(self.module, args, kwargs, self.parameters)
        except ExampleInputsError:  # the original says best what is wrong
            return original(*args, **kwargs)
        if is_empty(call):
            self.control.clear_record()
            with self.control.running_original():
                return original(*args, **kwargs)
        reason = "the model's Python goes another way than in all of its programs"
        try:
            for program in self.programs.candidates(call):
                with suppress(OtherBranch), self.control.call(), self.programs.trying(program, call):
                    if program.unpruned and self.control.active:
                        self.notes.unpruned(type(self.module).__name__, program.unpruned)
                    if program.fills:
                        self.notes.add(FILLS.format(type(self.module).__name__))
                    self.control.begin_program()
                    result = self.programs.run(program, call)
                    self.control.remember_returned(objects_in(result))
                    self.handed_back.remember(program, result)
                    return result
        except Unserved as error:
            reason = str(error)
        except ExampleInputsError:
            original(*args, **kwargs)  # it says best what is wrong
            raise
        if self.programs.continues_pruned(call):
            raise ContinuationError(
                f"it goes on from what a pruned call has kept, which only programs can read, and {reason}."
            )
        self.notes.unpruned(type(self.module).__name__, reason)
        self.control.clear_record()
        before = self.programs.module_states()
        try:
            with self.control.call():
                result = original(*args, **kwargs)
            self.control.remember_returned(objects_in(result))
            return result
        finally:
            self.programs.ignore_own_changes(before)

    def compiled(self, *args: object, **kwargs: object) -> object:
        """Run a program while a compiler follows."""
        return self.programs.run_compiled(normalise_call(self.module, args, kwargs, self.parameters))
