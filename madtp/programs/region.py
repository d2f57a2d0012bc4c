"""Regions: submodules that run a rewritten program where Python stays in charge of the rest of the model.

Start at :class:`PrunedRegion`, which takes the place of the ``forward`` of one module of the host's copy. Modules keep their
class, attributes and parameters; only the instance's ``forward`` is another. A call that no program serves runs as the original
does. That is never an error, and it never drops tokens that later calls would miss.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import suppress

from torch import Tensor
from torch.utils import _pytree as pytree

from madtp.calls.branches import OtherBranch
from madtp.calls.call import Call, Signature, is_empty, normalise_call, signature
from madtp.calls.compiling import is_compiling
from madtp.calls.objects import CannotFlatten
from madtp.errors import ContinuationError, ExampleInputsError, ExportError, MadtpError, NothingToPruneError
from madtp.programs.cached_program import Unserved
from madtp.programs.cached_steps import CachedSteps
from madtp.programs.handed_back import HandedBack
from madtp.programs.notes import FILLS, Notes
from madtp.programs.program import Program
from madtp.programs.program_cache import FAILURES, ProgramCache
from madtp.programs.recomputed_calls import ImageFeatures, RecomputedCalls
from madtp.programs.replaced_forward import ReplacedForward
from madtp.sites.control import PruningControl
from madtp.tokens.segments import small_runs
from madtp.tokens.state import kept_positions

log = logging.getLogger("madtp")


class PrunedRegion(ReplacedForward):
    """The forward of a region: a rewritten program where one serves the call, else the original's own code.

    Attributes:
        programs: the programs of the region.
        control: the control of the pruned model.
        notes: take remarks on calls that run unpruned.
        embeddings: path in a call, as pytree names it, of the text embeddings ``[B, N, C]``; programs need to know at
            which positions these hold image features. Empty if they do not.
        failed: signatures of the calls that could not be rewritten.
        failure: why the last of them could not be rewritten.
        prunes_caches: whether programs may prune what a key/value cache keeps.
        steps: run calls that go on from what a pruned call has kept.
        handed_back: tells calls that are given features of the call before.
        recomputed: tells calls that a checkpoint makes again what they were told.
    """

    def __init__(
        self,
        programs: ProgramCache,
        control: PruningControl,
        notes: Notes,
        *,
        embeddings: str = "",
        original: Callable[..., object] | None = None,
    ) -> None:
        """Take the place of the forward of the module of ``programs``.

        Args:
            programs: see above.
            control: see above.
            notes: see above.
            embeddings: see above.
            original: runs where no program does. None takes the module's own forward.
        """
        super().__init__(programs.module)
        self.original = original or self.original
        self.programs, self.control, self.notes, self.embeddings = programs, control, notes, embeddings
        self.failed: set[Signature] = set()
        self.failure = ""
        self.prunes_caches = True
        self.steps = CachedSteps(self.module, programs.host, control)
        self.handed_back = HandedBack(programs.name, control, notes)
        self.recomputed = RecomputedCalls()

    def __call__(self, *args: object, **kwargs: object) -> object:
        scope = self.control.scope
        if scope.follows_caches or (scope.runs_original and not self.programs.marked):
            return self.original(*args, **kwargs)
        self.handed_back.look_at(args, kwargs)
        if self.steps.serve(args, kwargs):
            return self.steps.run(self.original, args, kwargs)
        try:
            call = normalise_call(self.module, args, kwargs, self.parameters)
        except ExampleInputsError:  # the original says best what is wrong
            return self.original(*args, **kwargs)
        if is_compiling():
            return self._compiled(call)
        if is_empty(call):
            return self.original(*args, **kwargs)
        # Only programs can read a pruned key/value cache: the original would attend to dropped tokens.
        continues = self.programs.continues_pruned(call)
        if self.control.scope.runs_original and not continues:
            return self.original(*args, **kwargs)
        dropped = None
        if self.embeddings and not continues:
            found = self._image_features(call)
            if found is None:
                return self.original(*args, **kwargs)
            call, dropped = call.with_image_positions(found.positions), found.dropped
        for program in self._candidates(call, continues):
            trying = self.programs.trying(program, call)
            with suppress(OtherBranch), self.control.call(), self.control.in_program(), trying:
                if program.unpruned and self.control.active:
                    self._note(program.unpruned)
                if program.fills:
                    self.notes.add(FILLS.format(self.programs.name))
                self.control.begin_program()
                with self.control.without_features(dropped):
                    result = self.programs.run(program, call)
                self._follow(call, result)
                self._follow_dropped(program, result)
                self.handed_back.remember(program, result)
                return result
        if continues:
            raise self._cannot_continue()
        return self.original(*args, **kwargs)

    def _compiled(self, call: Call) -> object:
        """Run a program while a compiler follows."""
        if self.embeddings:
            found = self._image_features(call)
            if found is None:
                raise ExportError(
                    f"it cannot be followed where image features are written among the tokens of {self.programs.name}."
                )
            call = call.with_image_positions(found.positions)
        with self.control.in_program():
            result = self.programs.run_compiled(call)
        self._follow(call, result)
        return result

    def _follow(self, call: Call, result: object) -> None:
        """Tell what follows the host's tensors what a program has computed."""
        tracker = self.control.scope.tracker
        if tracker is not None:
            tracker.tag_result(call.flat()[0], result)
            if self.embeddings:
                tracker.keep_image_positions(call.leaf_at(self.embeddings), result)

    def _follow_dropped(self, program: Program, result: object) -> None:
        """Tell what follows the host's tensors which tokens a program has dropped of what it returns."""
        tracker, states = self.control.scope.tracker, self.control.record.states
        if tracker is None or not self.control.active or not program.output_sites:
            return
        leaves = pytree.tree_leaves(result)
        for position, site in program.output_sites.items():
            state = states.get(site)
            if state is not None and state.index is not None:
                tracker.mark_dropped(leaves[position], ~kept_positions(state))

    def _image_features(self, call: Call) -> ImageFeatures | None:
        """Image features in a call's sequence; None if they are not known, and nothing would be pruned of text."""
        sequence, tracker = call.leaf_at(self.embeddings), self.control.scope.tracker
        if not isinstance(sequence, Tensor) or tracker is None:
            found = self.recomputed.features(sequence)
            if found is None:
                self._note("it was not called by the model's own forward, which shows where image features are written")
            return found
        positions = tracker.image_positions(sequence)
        if positions is None and "image" in (tracker.modalities(sequence) or ()):
            self._note("it cannot be followed where image features were written among its tokens")
        if positions is None:
            return None
        found = ImageFeatures(positions, self._dropped(tracker.dropped_positions(sequence), positions))
        self.recomputed.remember(sequence, found)
        return found

    def _dropped(self, dropped: Tensor | None, positions: Tensor) -> Tensor | None:
        """Which of the tokens that their vision tower has dropped are left out: some of each image stay."""
        if dropped is None or not self.control.active or is_compiling():
            return None
        config = self.control.config
        return dropped & ~small_runs(positions, dropped, max(1, config.min_tokens, config.min_tokens_per_image))

    def _cannot_continue(self) -> ContinuationError:
        self.prunes_caches = False
        return ContinuationError(
            f"{self.programs.name} was to go on from what a pruned call has kept, and no program can be made for this call: "
            f"{self.failure or 'too many others could not be made'}. Start again; tokens are no longer pruned there in calls "
            "that keep something for later ones."
        )

    def _candidates(self, call: Call, continues: bool) -> Iterator[Program]:
        """The programs to try on a call, in order."""
        try:
            call = call.flattened(self.programs.sizes)
        except CannotFlatten as error:
            self._note(
                f"it was called with a {error}, which later calls may read again; leave the option out that asks for it"
            )
            return
        if call.continues() and not continues:
            return
        for program in self._cached_or_built(call):
            if program.marked and not self.prunes_caches:
                return
            yield program

    def _cached_or_built(self, call: Call) -> Iterator[Program]:
        cached = self.programs.matching(call)
        try:
            self.programs.require_no_hooks()
            for program in cached:
                yield self.programs.with_gradients(program, call)
            self.programs.require_room(cached)
        except Unserved as error:
            self._note(str(error))
            return
        exact = signature(call, None, self.programs.module_states())
        if len(self.failed) >= FAILURES or exact in self.failed:
            if self.notes.strict:
                self._note(f"a further kind of call cannot be rewritten: {self.failure}")
            return
        try:
            # What a capture computes is not the model's work: it must not be counted, least of all its symbolic sizes.
            with self.control.in_program():
                built = self.programs.build(call, cached)
            self.programs.require_no_hooks()
            self.programs.with_gradients(built, call)
        except Unserved as error:
            self._note(str(error))
            return
        except MadtpError as error:
            self.failed.add(exact)
            self.failure = str(error)
            if isinstance(error, NothingToPruneError):  # the regions inside serve the call
                log.info("%s", error)
                return
            self._note(f"a further kind of call cannot be rewritten: {error}")
            return
        yield built

    def _note(self, reason: str) -> None:
        self.notes.unpruned(self.programs.name, reason)
