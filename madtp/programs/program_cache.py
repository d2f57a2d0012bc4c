"""The programs of one module, by call signature. Each is built at the first call of its kind and reused later.

Start at :class:`ProgramCache`. A program serves one kind of call (:class:`madtp.calls.call.Signature`). A call that no program
serves is captured by itself, onto the same sites.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace

import torch
from torch import Tensor, nn

from madtp.calls.branches import OtherBranch
from madtp.calls.call import Call, Signature, signature
from madtp.calls.capture_lock import CAPTURE_LOCK
from madtp.calls.compiling import has_free_sizes, is_exporting
from madtp.calls.hooks import hooks_of
from madtp.calls.inference_mode import outside_inference_mode
from madtp.calls.module_states import ModuleState, ModuleStates
from madtp.calls.objects import CannotFlatten, object_kind, objects_in
from madtp.calls.packed_images import PerImageArguments
from madtp.calls.progress_line import progress_line
from madtp.calls.saved_tensors import without_saved_tensors_hooks
from madtp.errors import ExampleInputsError, ExportError, MadtpError
from madtp.programs.autocast_dtypes import as_under_autocast
from madtp.programs.cached_program import (
    CachedProgram,
    Unserved,
    classes_of,
    differs_in_attributes,
    doubled,
    without_attributes,
)
from madtp.programs.chained_modules import Chain, ChainedModules
from madtp.programs.gradient_checkpointing import checkpointed
from madtp.programs.lost_gradients import lost_gradients_remark
from madtp.programs.program import Program, Run
from madtp.programs.program_builder import BuildProgram, ProgramBuilder
from madtp.programs.single_sample import (
    SingleSampleProgram,
    first_samples,
    with_doubled_leaves,
)
from madtp.programs.unwritten import UnwrittenAttributes
from madtp.sites.additions import PREFIX, additions_of
from madtp.sites.preserved_state import preserved_random_numbers, undone_after
from madtp.tokens.cache_bytes import bytes_of_caches
from madtp.tokens.cache_marks import MarkedAxes, any_marked, with_marks, without_marked
from madtp.tokens.cached_tokens import CachedTokens

log = logging.getLogger("madtp")
BRANCHES = 4
"""Number of ways of the model's Python, on calls of one signature, that are captured; on others the original runs."""
MANY_WAYS = f"the model's Python goes more than {BRANCHES} ways on calls of one kind"
MANY_KINDS = (
    "it was called in {} ways that differ in sizes, dtypes, modes or switches, and no further one is captured; pad or resize "
    "inputs to fewer sizes, or raise PruningConfig(max_programs={})"
)
SHOWN = 3
ALIKE = 3
"""Number of values of an attribute that are captured to find that they give the same graph; then its values do not matter."""
FAILURES = 3
"""Number of call signatures that cannot be rewritten after which no further one is tried."""
OWN_BACKWARD = (
    "{} computes its gradients by a backward pass of its own, which programs do not follow; under torch.no_grad() such calls "
    "are pruned"
)
HOOKED = (
    "hooks on {} need these modules to run by themselves, which programs do not; remove the hooks to prune such calls"
)


class ProgramCache:
    """The programs that serve calls of one module.

    Attributes:
        path: the path of the module in ``host``; empty for the host itself.
        name: what it is called in messages.
        module: the module whose calls are served.
        host: the module tree that programs run on.
        builder: builds further programs.
        failed: why no program can be built, by signature of the calls.
        entries: the programs by serial number, oldest first.
        marked: the tensors of key/value caches in which programs may have marked dropped tokens, by path.
        sizes: paths of the numbers in these caches that follow from sizes of tensors.
        latest: the program that ran last.
        unwritten: the attributes that the module's own forward writes and programs do not.
    """

    def __init__(
        self,
        path: str,
        host: nn.Module,
        build_program: BuildProgram,
        *,
        inner: bool = False,
        per_image: PerImageArguments | None = None,
        chain: Chain | None = None,
        method: str = "",
    ) -> None:
        """Make an empty cache; see above, and :class:`~madtp.programs.program_builder.ProgramBuilder`, for the arguments.

        The module is that at ``path``, or the modules of ``chain`` as one.
        """
        self.path, self.host = path, host
        self.module = host.get_submodule(path) if chain is None else ChainedModules(host, chain.names)
        own_name = f"{type(host).__name__}.{method}".rstrip(".")
        self.name = (path or own_name) if chain is None else str(chain)
        self.builder = ProgramBuilder(self.module, host, build_program, inner=inner, per_image=per_image, method=method)
        self.additions = additions_of(host)
        self.module_states = ModuleStates(self.module, without="" if path else PREFIX)
        # Replaced, never changed: other threads may be reading it.
        self.entries: Mapping[int, CachedProgram] = {}
        self.failed: dict[Signature, str] = {}
        self._tree = self.module_states.tree
        self.marked: dict[str, MarkedAxes] = {}
        self.sizes: set[str] = set()
        self.latest: Program | None = None
        self.unwritten = UnwrittenAttributes()

    def continues_pruned(self, call: Call) -> bool:
        """Whether ``call`` reads a key/value cache from which an earlier, pruned call has dropped tokens."""
        if not self.marked or object_kind((call.args, call.kwargs)) is None:
            return False
        try:
            call = call.flattened(self.sizes)
        except CannotFlatten:
            return False
        assert call.objects is not None
        leaves = with_marks(call.flat()[0])
        kept = zip(call.objects.paths(), (leaves[at] for at in sorted(call.cache_leaves())), strict=True)
        known = ((x, self.marked[path]) for path, x in kept if path in self.marked and isinstance(x, Tensor))
        return any_marked(known)

    def candidates(self, call: Call) -> Iterator[Program]:
        """The programs to try on ``call``: those for calls like it, then one that is built for it.

        Raises:
            Unserved: no program may run, or be built, for such calls.
        """
        cached = self.matching(call)
        self.require_no_hooks()
        for program in cached:
            yield self.with_gradients(program, call)
        self.require_room(cached)
        exact = signature(call, None, self.module_states())
        failure = self.failed.get(exact) or (next(iter(self.failed.values())) if len(self.failed) >= FAILURES else None)
        if failure is not None:
            raise Unserved(failure)
        try:
            built = self.build(call, cached)
        except ExampleInputsError:
            raise
        except MadtpError as error:
            self.failed[exact] = f"a further kind of call cannot be rewritten: {error}"
            raise Unserved(self.failed[exact]) from error
        self.require_no_hooks()
        yield self.with_gradients(built, call)

    def trying(self, program: Program, call: Call) -> AbstractContextManager[None]:
        """The context in which a program runs: what it did is undone where the model's Python turns out to go another way."""
        return undone_after(OtherBranch, self.host, call.flat()[0]) if program.turns_back else nullcontext()

    def with_gradients(self, program: Program, call: Call) -> Program:
        """The program, unless gradients are wanted that it does not have.

        Raises:
            Unserved: they are.
        """
        if not (program.own_backward or program.lost_gradients) or not torch.is_grad_enabled():
            return program
        if any(one.requires_grad for one in (*self.module.parameters(), *call.tensors())):
            if program.own_backward:
                raise Unserved(OWN_BACKWARD.format(", ".join(program.own_backward)))
            raise Unserved(lost_gradients_remark(program.lost_gradients))
        return program

    def require_room(self, cached: Sequence[Program]) -> None:
        """Check that one more program may be built, beside those that are ``cached`` for calls of a kind.

        Raises:
            Unserved: there are too many.
        """
        if len(cached) >= BRANCHES:
            raise Unserved(MANY_WAYS)
        if len({id(one.program) for one in self.entries.values()}) >= self._most:
            raise Unserved(MANY_KINDS.format(self._most, 2 * self._most))

    def require_no_hooks(self) -> None:
        """Check that no module has hooks that would not run, because a program takes its place.

        Raises:
            Unserved: a module has.
        """
        watches = [entry.hooked for entry in self.entries.values()] or [
            hooks_of(self._holders(), self.additions.own_hooks)
        ]
        before = self.additions.control.scope.next_hook
        for found in [watch(before) for watch in watches]:
            if found:
                shown = ", ".join(found[:SHOWN]) + (" ..." if len(found) > SHOWN else "")
                raise Unserved(HOOKED.format(shown))

    def _holders(self) -> Iterator[tuple[str, nn.Module]]:
        """Modules that hold others: no program calls them."""
        for path, module in self.module.named_modules():
            if path and path.partition(".")[0] != PREFIX and module._modules:
                yield self._from_root(path), module

    def _from_root(self, path: str) -> str:
        return ".".join(part for part in (self.path, path) if part)

    @property
    def _most(self) -> int:
        return self.additions.control.config.max_programs

    def matching(self, call: Call) -> list[Program]:
        """The programs for calls like ``call``, latest first; they differ in the branches that the model's Python took."""
        try:
            call = call.flattened(self.sizes)
        except CannotFlatten:
            return []
        leaves = call.flat()[0]
        modules = self.module_states()
        self._follow_tree()
        return [
            cached.program
            for cached in reversed(list(self.entries.values()))
            if signature(call, cached.program.dynamic, modules) == cached.signature and cached.program.serves(leaves)
        ]

    def _follow_tree(self) -> None:
        """After modules were replaced: forget programs that took the place of other modules."""
        if self.module_states.tree is self._tree:
            return
        kept = {}
        for serial, entry in self.entries.items():
            uncalled = list(self._uncalled_modules(entry.program))
            if classes_of(uncalled) == entry.classes:
                kept[serial] = replace(entry, hooked=hooks_of(uncalled, self.additions.own_hooks))
        self.entries, self._tree = kept, self.module_states.tree

    def build(self, call: Call, known: Sequence[Program] = ()) -> Program:
        """Build the program for calls like ``call``.

        Args:
            call: the call.
            known: programs for such calls that do not serve this one.

        Raises:
            MadtpError: the module cannot be rewritten for such calls, or no program can serve a single sample.
        """
        with CAPTURE_LOCK, progress_line(f"preparing {type(self.host).__name__} for a new kind of call"):
            # Another thread may have built it meanwhile.
            for program in self.matching(call):
                if all(program is not one for one in known):
                    return program
            with outside_inference_mode(call) as usual, without_saved_tensors_hooks(), preserved_random_numbers():
                return self._built(usual)

    def _built(self, call: Call) -> Program:
        log.info("capturing %s for a new call signature", self.name)
        with suppress(CannotFlatten):  # the builder says best what is wrong
            call = call.flattened(self.sizes)
        call = call.with_leaves(with_marks(call.flat()[0]))
        program, doubled = self.builder.build(call, self.marked)
        self._bind(program)
        program = self.builder.checked(program, call, doubled=doubled)
        self._remember(program, call)
        return program

    def add(self, program: Program, call: Call) -> None:
        """Keep a program that was built elsewhere, as the one for calls like ``call``."""
        self._bind(program)
        self._remember(program, call.flattened(self.sizes))

    def serve_double_precision(self) -> None:
        """Let the programs serve calls in double precision from now on: the module has become so."""
        self.entries = {
            serial: replace(entry, signature=doubled(entry.signature)) for serial, entry in self.entries.items()
        }

    def _bind(self, program: Program) -> None:
        """Give a program the sizes and constants that it needs to run."""
        self.marked = {**self.marked, **program.marked}
        self.sizes = {*self.sizes, *program.sizes()}
        self.additions.bind(program.cost)
        for name, value in program.constants.items():
            self.additions.constants.register_buffer(name, value, persistent=False)

    def _remember(self, program: Program, call: Call) -> None:
        serial = self.additions.programs
        self.additions.programs += 1
        kind = signature(call, program.dynamic, self.module_states())
        twin = next((one for one in self.entries.values() if differs_in_attributes(one.signature, kind)), None)
        self._follow_tree()
        if twin is not None and twin.program.computes_as(program):
            # Then attributes differ that the graph does not depend on: the twin serves such calls.
            twins = [one for one in self.entries.values() if one.program is twin.program]
            if len(twins) < ALIKE:
                self.entries = {**self.entries, serial: replace(twin, signature=kind)}
            else:  # such as a counter
                self._ignore_differences(twin.signature.modules)
            return
        uncalled = list(self._uncalled_modules(program))
        entry = CachedProgram(program, kind, classes_of(uncalled), hooks_of(uncalled, self.additions.own_hooks))
        self.entries = {**self.entries, serial: entry}

    def ignore_own_changes(self, before: ModuleState) -> None:
        """After the original has run: attributes that it has changed itself, such as counters, do not matter from now on."""
        if self.module_states().attributes != before.attributes:
            self._ignore_differences(before)

    def _ignore_differences(self, other: ModuleState) -> None:
        ignored = self.module_states.ignore_differences(other)
        log.info("%s: changes of %s do not matter", self.name, ", ".join(ignored.values()))
        self.entries = {
            serial: replace(entry, signature=without_attributes(entry.signature, ignored))
            for serial, entry in self.entries.items()
        }

    def _uncalled_modules(self, program: Program) -> Iterator[tuple[str, nn.Module]]:
        """Modules whose place a program takes: neither they nor what holds them is called."""
        called = {str(node.target) for node in program.graph.nodes if node.op == "call_module"}
        inside = tuple(f"{path}." for path in called)
        for path, module in self.module.named_modules():
            full = self._from_root(path)
            if path and path.partition(".")[0] != PREFIX and full not in called and not full.startswith(inside):
                yield full, module

    def run(self, program: Program, call: Call) -> object:
        """Run a program and record it; returns what the module returns."""
        control = self.additions.control
        self.latest = program
        given = call.flattened(program.given).flat()[0]
        continues = any(isinstance(one, CachedTokens) for one in given)
        leaves = with_marks(given)
        if control.gradient_checkpointing and torch.is_grad_enabled():
            if program.checkpointed_forward is None:
                program.checkpointed_forward = checkpointed(program.graph, self.host, self.name)
            result = program.run_checkpointed(self.host, leaves)
        else:
            result = program.run(self.host, leaves)
        self.unwritten.mark(self.host)
        result = as_under_autocast(
            result, leaves, program.autocast_dtypes, lambda: self.builder.run_evaluating(call, program)
        )
        states = {name: control.record.states[name] for name in program.sites if name in control.record.states}
        if isinstance(program, SingleSampleProgram):
            leaves = with_doubled_leaves(leaves)
            control.record.states.update(first_samples(states))
        control.record.runs.append(Run(program, tuple(_without_values(x) for x in leaves), states))
        if program.returned is None:
            return result
        assert isinstance(result, (tuple, list))
        plain, tensors = result
        if continues:
            paths = zip(program.returned.paths(), tensors, strict=True)
            tensors = [self._without_marked(x, path) if isinstance(x, Tensor) else x for path, x in paths]
        passed = objects_in((call.args, call.kwargs))
        closed: object = program.returned.close(plain, tensors, passed)
        if types := program.cache_types():
            filled = {id(one): one for one in (*passed, *objects_in(closed)) if type(one) in types}
            control.record.cache_bytes = bytes_of_caches(filled.values())
        return closed

    def _without_marked(self, values: Tensor, path: str) -> Tensor:
        axes = self.marked.get(path)
        return values if axes is None or isinstance(values, CachedTokens) else without_marked(values, axes)

    def run_compiled(self, call: Call) -> object:
        """Run a program for calls like ``call`` while a compiler follows: the one that ran last, if it is for such calls.

        Nothing is recorded.

        Raises:
            ExportError: no program serves the call, or it takes objects such as key/value caches.
        """
        leaves = call.flat()[0]
        modules = self.module_states()
        entries = sorted(self.entries.values(), key=lambda entry: entry.program is not self.latest)
        for cached in entries:
            program = cached.program
            # A compiler may leave sizes free; those of an export are known.
            if is_exporting() and not has_free_sizes(leaves) and not program.serves(leaves):
                continue
            if program.returned is None and signature(call, program.dynamic, modules) == cached.signature:
                return program.run(self.host, leaves)
        raise ExportError(
            "no program serves this call: call the model once with such inputs before it is compiled or exported. Calls that "
            "take or return key/value caches cannot be compiled."
        )


def _without_values(leaf: object) -> object:
    return torch.empty(leaf.shape, device="meta") if isinstance(leaf, Tensor) else leaf
