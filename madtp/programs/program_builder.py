"""Build one more program of a module, and check it: :class:`ProgramBuilder`."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from madtp.calls.agreement import require_agreement
from madtp.calls.batch import are_free, sample_dims
from madtp.calls.branches import OtherBranch
from madtp.calls.call import Call
from madtp.calls.fast_path import spelled_out
from madtp.calls.hooks import without_hooks
from madtp.calls.objects import ResultSpec, on_tensors, result_spec_of
from madtp.calls.packed_images import PerImageArguments, per_image_module
from madtp.errors import CaptureError, ExampleInputsError, MadtpError, RewriteError
from madtp.programs.caches_in_place import CachesInPlace
from madtp.programs.lost_gradients import lost_gradients
from madtp.programs.originals import original_of
from madtp.programs.program import Program
from madtp.programs.single_sample import (
    SingleSampleProgram,
    sample_dims_of_one,
    serving_one_sample,
    with_doubled_sample,
)
from madtp.sites.additions import additions_of
from madtp.sites.preserved_state import trial_run
from madtp.sites.steady_draws import comparable_draws, values_are_comparable
from madtp.tokens.cache_marks import MarkedAxes, zero_marked

EXPENSIVE = 2e10
"""MACs per sample from which on one comparison has to do: further ones would take seconds."""


class BuildProgram(Protocol):
    """Captures and rewrites a module for one more kind of call."""

    def __call__(self, module: nn.Module, call: Call, serial: int, marked: Mapping[str, MarkedAxes], /) -> Program:
        """Build a program.

        Args:
            module: the module to capture.
            call: the call to serve; calls like it are served, too.
            serial: number of the program, unique within the pruned model.
            marked: the tensors of key/value caches in which earlier programs may have marked dropped tokens, by path.
        """
        ...


class ProgramBuilder:
    """Builds programs of one module for further calls, from the module as it was before the rewrite.

    Attributes:
        module: the module whose calls are served.
        host: the module tree that programs run on.
        build_program: builds a program for a further call.
        inner: the module lies inside another one that programs replace, so that nothing was rewritten and checked for it
            in advance.
        per_image: which arguments hold the images, if calls are split into images, a batch of which a program takes. None if
            they are not.
        method: name of the method whose calls are served; empty for ``forward``.
    """

    def __init__(
        self,
        module: nn.Module,
        host: nn.Module,
        build_program: BuildProgram,
        *,
        inner: bool,
        per_image: PerImageArguments | None,
        method: str = "",
    ) -> None:
        """Make a builder; see above for the arguments."""
        self.module, self.host, self.build_program = module, host, build_program
        self.inner, self.per_image, self.method = inner, per_image, method
        self.additions = additions_of(host)
        self._caches_in_place = CachesInPlace()

    def build(self, call: Call, marked: Mapping[str, MarkedAxes]) -> tuple[Program, bool]:
        """Build a program for calls like ``call``.

        Args:
            call: the call, objects flattened.
            marked: the tensors of key/value caches in which earlier programs may have marked dropped tokens, by path.

        Returns:
            The program, and whether it was captured from two samples in place of the one of ``call``.

        Raises:
            MadtpError: the module cannot be rewritten for such calls.
        """
        captured, original = with_doubled_sample(call), self.original()
        self._caches_in_place.refuse(call, original)
        serial = self.additions.programs
        try:
            return self.build_program(original, captured, serial, marked), captured is not call
        except (CaptureError, ExampleInputsError):
            if captured is call or sample_dims(call.flat()[0]) is not None:
                raise
        # Then a tensor without a batch dimension belongs to no sample.
        return self.build_program(original, call, serial, marked), False

    def checked(self, program: Program, call: Call, *, doubled: bool) -> Program:
        """Make a program serve ``call``, and check it where nothing was checked in advance.

        Args:
            program: a program that is ready to run.
            call: the call, objects flattened.
            doubled: it was captured from two samples in place of one.

        Raises:
            MadtpError: it computes something else than the module, or cannot serve a single sample.
        """
        leaves = call.flat()[0]
        if doubled and not (are_free(sample_dims_of_one(leaves), program.dynamic) and program.serves(leaves)):
            with torch.no_grad(), comparable_draws(self.module, call.tensors()):
                expected, returned = self._run(self.original(), call, program)
                with trial_run(self.host, leaves), self.additions.control.unpruned():
                    program = serving_one_sample(
                        program,
                        self.module,
                        self._without_hooks(),
                        call,
                        expected,
                        returned,
                        values=values_are_comparable(self.module, call.tensors()),
                    )
        elsewhere = call.cache_leaves() or self.inner or self.per_image is not None
        if elsewhere or (not isinstance(program, SingleSampleProgram) and program.dense_macs(leaves) < EXPENSIVE):
            self._check(program, call)
        if torch.is_grad_enabled() and not program.own_backward:
            program.lost_gradients = lost_gradients(
                self.module,
                call,
                lambda own: self._run(self.original(), own, program)[0],
                partial(self._run_unpruned, program),
            )
        return program

    def original(self) -> nn.Module:
        """The module as it was before the rewrite; its forward is the method that is served."""
        original = original_of(self.module, self.additions.own_hooks)
        if self.method:
            original.__dict__["forward"] = getattr(original, self.method)
        return original

    def run_evaluating(self, call: Call, program: Program) -> object:
        """What the module itself returns for ``call`` in eval mode, with gradients if they are on.

        Objects are opened as ``program`` takes and returns them.
        """
        return self._run(self.original().eval(), call, program)[0]

    def _run_writing(self, call: Call, program: Program) -> object:
        """What the original returns, and what it writes to tensors."""
        original = self.original()
        with trial_run(original, (call.args, call.kwargs)) as trial, spelled_out():
            result, _ = self._opened(original, call, program)
        program.fills |= trial.filled
        return result, trial.written

    def _run(self, original: nn.Module, call: Call, program: Program) -> tuple[object, ResultSpec | None]:
        """What the original returns, objects opened, and how to close them."""
        with trial_run(original, (call.args, call.kwargs)):
            return self._opened(original, call, program)

    def _opened(self, original: nn.Module, call: Call, program: Program) -> tuple[object, ResultSpec | None]:
        module = per_image_module(on_tensors(original, call.objects, program.sizes()), self.per_image)
        return module(*call.args, **call.kwargs), result_spec_of(module)

    def _without_hooks(self) -> nn.Module:
        return without_hooks(self.host, self.additions.own_hooks)

    def _check(self, program: Program, call: Call) -> None:
        """Check that with pruning off, and no token marked as dropped, a program computes what the module computes.

        Raises:
            RewriteError: it does not.
        """
        if not values_are_comparable(self.module, call.tensors()):
            return
        held = call.cache_leaves()
        leaves = [
            zero_marked(x) if at in held and isinstance(x, Tensor) and x.is_floating_point() else x
            for at, x in enumerate(call.flat()[0])
        ]
        given = call.with_leaves(leaves)
        # What Python decides by a number that it draws cannot be compared.
        with torch.no_grad(), comparable_draws(self.module, call.tensors()), suppress(OtherBranch):
            require_agreement(partial(self._run_writing, given, program), partial(self._run_unpruned, program, given))

    def _run_unpruned(self, program: Program, call: Call) -> object:
        """What a program returns with pruning off, and what it writes to tensors."""
        leaves = call.flat()[0]
        with trial_run(self.host, leaves) as trial, self.additions.control.unpruned():
            try:
                result = program.run(self._without_hooks(), leaves)
            except (MadtpError, OtherBranch):
                raise
            except Exception as error:  # the original has run: a buffer, say, is larger than in the capture
                raise RewriteError(f"its program fails: {type(error).__name__}: {error}") from error
        return result, trial.written
