"""Chains: modules that the host calls one after the other run as one program. Start at :class:`PrunedChain`.

Each module's forward is a :class:`ChainLink`. All but the last only keep how they are called, and return a deferred tensor; the
last runs the program of the whole chain. Where the host does anything else with a deferred tensor, the modules so far run as in
the original, and so do those after them. What is under way lies in the deferred tensors: calls in several threads do not meet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from madtp.calls.call import Call, normalise_call
from madtp.calls.compiling import is_compiling
from madtp.calls.environment import CallEnvironment
from madtp.calls.objects import object_kind
from madtp.errors import ExampleInputsError, ExportError, MadtpError
from madtp.programs.cached_program import Unserved
from madtp.programs.chain_outputs import LinkOutput, LinkOutputs, kind_of
from madtp.programs.chained_modules import Chain, LinkCall, called_in_turn, chained_call
from madtp.programs.deferred import Deferred, Form, deferred, deferred_in, settled
from madtp.programs.notes import Notes
from madtp.programs.program_cache import MANY_KINDS, ProgramCache
from madtp.programs.region import PrunedRegion
from madtp.programs.replaced_forward import ReplacedForward
from madtp.sites.control import PruningControl

READ = "what {} returns is read by more than the next block"
READ_AFTERWARDS = "what {} returns is read after the blocks have run as one, and computed once more for that"
OUTSIDE = "{} was called outside of a call of the model"
OTHER_INPUT = "{} was not called with what {} returned"
ENVIRONMENT = (
    "gradients, autocast or a checkpoint begin or end between {} and {}; in place of the model's own checkpoints, set "
    "pruned.madtp.gradient_checkpointing"
)
HOLDS_STATE = "{} was called with a {}, which later calls may read again"
NO_START = "{} was called without the tensor that goes through the blocks"
CHANGED = "a tensor that {} was called with was changed in place before {} was called"


class ChainLink(ReplacedForward):
    """The forward of a module of a chain.

    Attributes:
        chain: the chain.
        number: place of the module in it.
        name: path of the module.
    """

    def __init__(self, chain: PrunedChain, number: int, name: str, module: nn.Module) -> None:
        """Take the place of the forward of ``module``; see above for the other arguments."""
        super().__init__(module)
        self.chain, self.number, self.name = chain, number, name

    def __call__(self, *args: object, **kwargs: object) -> object:
        return _called(self.chain, self, args, kwargs)


@dataclass(eq=False)
class Step:
    """A call of a module of a chain that waits: the promise of the deferred tensor that was returned.

    Attributes:
        link: the module's forward.
        call: how it was called.
        hidden: the tensor in its call that the module before returned.
        environment: modes of torch around the call.
        output: what it returns.
        versions: the tensors of the call, and how often each had been changed in place.
        served: a program has taken the module's place.
        computed: what goes on of what the module returns, once somebody has read it.
        example: the same, where it had to be computed aside to know its form.
    """

    link: ChainLink
    call: Call
    hidden: Tensor
    environment: CallEnvironment
    output: LinkOutput
    versions: tuple[tuple[Tensor, int], ...]
    served: bool = False
    computed: Tensor | None = None
    example: Tensor | None = None

    @property
    def before(self) -> Step | None:
        """The step of the module before."""
        step = self.hidden.promise if isinstance(self.hidden, Deferred) else None
        return step if isinstance(step, Step) else None

    def steps(self) -> list[Step]:
        """All steps of the chain so far, the first one first."""
        found = [self]
        while (before := found[-1].before) is not None:
            found.append(before)
        return found[::-1]

    def value(self) -> Tensor:
        """What goes on of what the module returns, computed by the original modules, with a note."""
        if self.computed is None:
            self.link.chain.note((READ_AFTERWARDS if self.served else READ).format(self.link.name))
            if self.served:
                self.link.chain.control.scope.computed_twice.add(str(self.link.chain.chain))
            for step in self.steps():
                step.compute()
        assert self.computed is not None
        return self.computed

    def compute(self) -> None:
        """Run the original module, after those before it."""
        if self.computed is not None:
            return
        self.require_unchanged()
        hidden = self.hidden if self.before is None else self.before.computed
        leaves = [hidden if leaf is self.hidden else leaf for leaf in self.call.flat()[0]]
        call = self.call.with_leaves(leaves)
        with self.environment.again():
            result = self.link.original(*call.args, **call.kwargs)
        self.computed = self.output.hidden_in(result, self.link.name)

    def aside(self) -> Tensor:
        """What goes on of what the module returns, computed by the original modules for nobody else to see."""
        if self.example is None:
            hidden = self.hidden if self.before is None else self.before.aside()
            call = self.call.with_leaves([hidden if leaf is self.hidden else leaf for leaf in self.call.flat()[0]])
            self.example, _ = self.link.chain.outputs.found_out(self.link.name, self.link.module, call, hidden)
        return self.example

    def require_unchanged(self) -> None:
        """Check that what the module was called with holds the values that it had then.

        Raises:
            MadtpError: it does not.
        """
        if any(tensor._version != version for tensor, version in self.versions):
            reason = CHANGED.format(self.link.name, self.link.chain.links[-1].name)
            self.link.chain.note(reason)
            raise MadtpError(f"{reason}. Give the block a copy of it.")


class PrunedChain:
    """Runs a program in place of modules that the host calls one after the other.

    Attributes:
        links: the forwards of the modules.
        region: runs programs of them all.
    """

    def __init__(
        self, chain: Chain, programs: ProgramCache, control: PruningControl, notes: Notes, embeddings: str
    ) -> None:
        """Take the places of the modules' forwards.

        Args:
            chain: the modules.
            programs: the programs of the chain.
            control: the control of the pruned model.
            notes: take remarks on calls that run unpruned.
            embeddings: see :class:`~madtp.programs.region.PrunedRegion`.
        """
        self.chain, self.control, self.notes = chain, control, notes
        modules = [programs.module.get_submodule(name) for name in chain.names]
        self.links = [ChainLink(self, *each) for each in zip(range(len(modules)), chain.names, modules, strict=True)]
        self.outputs = LinkOutputs(programs.additions)
        self.region = PrunedRegion(programs, control, notes, embeddings=embeddings, original=self._dense)
        for link in self.links:
            link.module.__dict__["forward"] = link

    def note(self, reason: str) -> None:
        """Remark that the present call runs unpruned."""
        self.control.scope.interrupted.add(str(self.chain))
        self.notes.unpruned(str(self.chain), reason)

    def called(self, link: ChainLink, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        """A call of a module: what its forward returns, deferred where the next module is to go on with it."""
        if self.control.scope.runs_original or _in_backward():
            return link.original(*settled(args), **settled(kwargs))
        if is_compiling():
            raise ExportError(
                f"the model's Python calls {self.chain} one by one, and a program runs them at once, which an export does not "
                "follow. Export a module that holds them."
            )
        if not link.number:  # what another chain has deferred
            args, kwargs = settled((args, kwargs))
        try:
            call = normalise_call(link.module, args, kwargs, link.parameters)
        except ExampleInputsError:  # the original says best what is wrong
            return link.original(*settled(args), **settled(kwargs))
        try:
            return self._taken(link, call)
        except Unserved as error:
            if str(error):
                self.note(str(error))
        for one in deferred_in((call.args, call.kwargs)):
            if isinstance(one.promise, Step) and one.promise.link.chain is self:
                for step in one.promise.steps():
                    step.compute()
        return link.original(*settled(args), **settled(kwargs))

    def _taken(self, link: ChainLink, call: Call) -> object:
        """What a module returns in a chain.

        Raises:
            Unserved: the call does not belong to a chain; without a message, if that was noted before.
        """
        kind = object_kind((call.args, call.kwargs))
        if kind is not None:
            raise Unserved(HOLDS_STATE.format(link.name, kind))
        leaves, spec = call.flat()
        with torch._C.DisableTorchFunction():  # what follows the host's tensors has nothing to see here
            hidden = self._hidden(link, call, leaves)
        if any(isinstance(leaf, Deferred) and leaf is not hidden for leaf in leaves):
            leaves = [leaf if leaf is hidden else settled(leaf) for leaf in leaves]
            call = call.with_leaves(leaves)
        if link is self.links[-1]:
            return self._run(link, call, hidden)
        with torch._C.DisableTorchFunction():
            step = self._step(link, call, hidden, leaves, str(spec))
            output = step.output
            form = Form(hidden.shape, output.dtype, output.device)
            sources = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            waits = deferred(step, form, [*sources, *link.module.parameters()])
        if self.control.scope.tracker is not None:
            self.control.scope.tracker.tag_result([hidden], waits)
        return output.holding(waits)

    def _hidden(self, link: ChainLink, call: Call, leaves: Sequence[object]) -> Tensor:
        """The tensor of a call that goes through the chain.

        Raises:
            Unserved: the call does not continue the chain.
        """
        if not self.control.scope.calls:
            raise Unserved(OUTSIDE.format(link.name))
        if not link.number:
            self.region.programs.require_no_hooks()
            start = call.leaf_at(self.chain.start)
            if not isinstance(start, Tensor):
                raise Unserved(NO_START.format(link.name))
            return start
        before = self.links[link.number - 1]
        waiting = {id(one): one for one in leaves if isinstance(one, Deferred) and _is_step_of(one.promise, before)}
        if len(waiting) != 1:
            interrupted = str(self.chain) in self.control.scope.interrupted
            raise Unserved("" if interrupted else OTHER_INPUT.format(link.name, before.name))
        (hidden,) = waiting.values()
        step = hidden.promise
        assert isinstance(step, Step)
        if any(one.computed is not None for one in step.steps()):
            raise Unserved
        changed = hidden.requires_grad != hidden.needs_gradients
        if changed or step.environment != CallEnvironment.now(hidden.device.type):
            raise Unserved(ENVIRONMENT.format(before.name, link.name))
        return hidden

    def _step(self, link: ChainLink, call: Call, hidden: Tensor, leaves: Sequence[object], structure: str) -> Step:
        """A call of a module but the last, to keep.

        Raises:
            Unserved: it is not known what the module returns.
        """
        plain = [leaf for leaf in leaves if isinstance(leaf, Tensor) and not isinstance(leaf, Deferred)]
        versions = tuple((one, one._version) for one in plain if not one.is_inference())
        environment = CallEnvironment.now(hidden.device.type)
        kind = kind_of(link.module, leaves, structure, hidden, environment)
        output, example = self.outputs.known.get((link.number, kind)), None
        if output is None:
            self._require_room(link)
            before = hidden.promise if isinstance(hidden, Deferred) else None
            value = before.aside() if isinstance(before, Step) else hidden
            known = call.with_leaves([value if leaf is hidden else leaf for leaf in leaves])
            example, output = self.outputs.found_out(link.name, link.module, known, value)
            self.outputs.known[link.number, kind] = output
        return Step(link, call, hidden, environment, output, versions, example=example)

    def _require_room(self, link: ChainLink) -> None:
        """Check that a module was not called in so many ways that no program is built for a further one.

        Raises:
            Unserved: it was.
        """
        most = self.control.config.max_programs
        if sum(number == link.number for number, _ in self.outputs.known) >= most:
            raise Unserved(MANY_KINDS.format(most, 2 * most))

    def _run(self, link: ChainLink, call: Call, hidden: Tensor) -> object:
        """Run a program of the whole chain."""
        assert isinstance(hidden, Deferred)
        assert isinstance(hidden.promise, Step)
        steps = hidden.promise.steps()
        with torch._C.DisableTorchFunction():
            for step in steps:
                step.require_unchanged()
        calls = [*(LinkCall(step.call, step.hidden) for step in steps), LinkCall(call, hidden)]
        together = chained_call(calls, [step.output.place for step in steps])
        result = self.region(**together.kwargs)
        for step in steps:
            step.served = True
        return result

    def _dense(self, hidden: Tensor, given: list[Tensor], calls: list[Any], places: list[int]) -> object:
        """What :meth:`ChainedModules.forward` returns, computed by the original modules."""
        return called_in_turn([link.original for link in self.links], hidden, given, calls, places)


# A compiler breaks the graph around it.
_called: Callable[..., object] = torch.compiler.disable(
    PrunedChain.called, reason="blocks that the model calls one by one run as one program"
)


def _is_step_of(promise: object, link: ChainLink) -> bool:
    return isinstance(promise, Step) and promise.link is link


def _in_backward() -> bool:
    """Whether a backward pass is under way: what runs in it are checkpoints, which compute their modules once more."""
    return bool(torch._C._current_graph_task_id() != -1)
