"""Run a model without a trace: :func:`trial_run`; :func:`preserved_state` where values are not at stake.

What a rewrite tries out must leave the model, its inputs and the random numbers that come next as they were, and so must every
run that only compares. Models write to more than they return: running statistics and counters, parameters of a momentum copy,
masks that they cache, their inputs.
"""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, UntypedStorage, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from madtp.calls.held_containers import containers_in
from madtp.sites.additions import PREFIX
from madtp.sites.steady_draws import is_training

AUTOCAST = {"cpu": torch._C.DispatchKey.AutocastCPU, "cuda": torch._C.DispatchKey.AutocastCUDA}
# Fused operations, inside which autocast casts.
FUSED = (torch.ops.aten._transformer_encoder_layer_fwd.default, torch.ops.aten._native_multi_head_attention.default)


@dataclass
class Trial:
    """What a run changed that was put back.

    Attributes:
        written: by address, the tensors that lay there before and were written to, with the values that were written.
        filled: whether a container among the inputs, such as a dictionary, was changed.
    """

    written: dict[int, Tensor] = field(default_factory=dict)
    filled: bool = False


@contextmanager
def trial_run(model: nn.Module, inputs: object) -> Iterator[Trial]:
    """Restore, on leaving, all that running a model changes. So the next such block draws the same random numbers.

    Args:
        model: the model, or the module of it that runs.
        inputs: what it is called with, in any structure.
    """
    trial = Trial()
    with preserved_state(model), _preserved_values(model, inputs, trial):
        yield trial


@contextmanager
def undone_after(error: type[Exception], model: nn.Module, inputs: object) -> Iterator[None]:
    """Undo, where the block raises ``error``, what it has written to tensors and drawn.

    Args:
        error: the kind of error.
        model: the model that runs.
        inputs: what it is called with, in any structure.
    """
    writes, drawn = _Writes(_tensors_of(model, inputs)), torch.get_rng_state()
    try:
        with writes:
            yield
    except error:
        writes.undo()
        torch.set_rng_state(drawn)
        raise


@contextmanager
def preserved_state(model: nn.Module) -> Iterator[None]:
    """Restore attributes, running statistics, which tensors and flags parameters have, and the generators of random numbers.

    Values that a run writes into parameters and other tensors stay; see :func:`trial_run`.
    """
    with preserved_random_numbers(), preserved_attributes(model), _preserved_parameters(model):
        yield


def random_states() -> tuple[object, ...]:
    """Return the states of the generators of Python and NumPy, to compare."""
    numpy = sys.modules.get("numpy.random")
    if numpy is None:
        return (random.getstate(),)
    kind, keys, *others = numpy.get_state()
    return random.getstate(), kind, keys.tobytes(), *others


@contextmanager
def preserved_random_numbers() -> Iterator[None]:
    """Let generators of torch, Python and NumPy go on from where they were."""
    numpy = sys.modules.get("numpy.random")
    before = random.getstate(), None if numpy is None else numpy.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        random.setstate(before[0])
        if numpy is not None:
            numpy.set_state(before[1])


@contextmanager
def preserved_attributes(model: nn.Module) -> Iterator[None]:
    """Restore the attributes of all modules, the contents of plain containers and the values of tensors among them included.

    A trace writes to such tensors, as they are constants to it.
    """
    attributes = [vars(module) for module in _host_modules(model)]
    seen: set[int] = set()
    before = [(values, _contents(values, seen)) for values in attributes]
    tensors = [x for values in attributes for x in values.values() if isinstance(x, Tensor) and _storage(x) is not None]
    kept = [(x, x._version, x.detach().clone()) for x in tensors if not x.is_inference()]
    try:
        yield
    finally:
        with torch.no_grad():
            for x, version, value in kept:
                if x._version != version:
                    x.copy_(value)
        for present, (values, contents) in before:
            _restore_names(present, values)
            for container, content in contents:
                _put_back(container, content)


@contextmanager
def _preserved_parameters(model: nn.Module) -> Iterator[None]:
    parameters = [(one, one.data, one.requires_grad) for one in model.parameters()]
    # Batch norm does not declare that it writes to its statistics.
    statistics = (
        [(one, one.clone()) for one in model.buffers() if one.is_floating_point()] if is_training(model) else []
    )
    plain = [one for one in model.buffers() if not one.requires_grad]
    try:
        yield
    finally:
        with torch.no_grad():
            for one, data, wanted in parameters:
                if one.data_ptr() != data.data_ptr() or one.shape != data.shape or one.dtype != data.dtype:
                    one.data = data
                if one.requires_grad != wanted:
                    one.requires_grad_(wanted)
            for buffer, values in statistics:
                if not torch.equal(buffer, values):
                    buffer.data.copy_(values)  # autograd may have saved the buffer
            for buffer in plain:
                if buffer.requires_grad:  # something with gradients was written to it
                    buffer.detach_()


@contextmanager
def _preserved_values(model: nn.Module, inputs: object, trial: Trial) -> Iterator[None]:
    writes = _Writes(_tensors_of(model, inputs))
    given = [(held, copy.copy(held)) for held in containers_in([inputs], set())]
    try:
        with writes:
            yield
    finally:
        trial.written = writes.now()
        writes.undo()
        for container, content in given:
            trial.filled |= _put_back(container, content)


def _tensors_of(model: nn.Module, inputs: object) -> list[Tensor]:
    """Parameters, buffers, attributes and inputs that are tensors."""
    attributes = [vars(module) for module in _host_modules(model)]
    inside = list(containers_in((value for one in attributes for value in one.values()), set()))
    held = [x for x in pytree.tree_leaves((attributes, inputs, inside)) if isinstance(x, Tensor)]
    return [*model.parameters(), *model.buffers(), *held]


class _Writes(TorchDispatchMode):
    """Keeps the values of tensors that are about to be overwritten.

    Attributes:
        storages: those of the tensors, by address.
        tensors: a tensor of each.
        kept: of each that was written to, its values before.
        autocast: what autocast dispatches by, for the devices for which it is on.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        held = [(storage, x) for x in tensors if (storage := _storage(x)) is not None]
        self.storages = {storage.data_ptr(): storage for storage, _ in held}
        self.tensors = {storage.data_ptr(): x for storage, x in held}
        self.kept: dict[int, UntypedStorage] = {}
        self.autocast = [key for device, key in AUTOCAST.items() if torch.is_autocast_enabled(device)]

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            for place, argument in enumerate(func._schema.arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    self._keep(args[place] if place < len(args) else kwargs.get(argument.name))
        if func in FUSED and self.autocast:
            with _reaching_inside(self.autocast):
                return func(*args, **kwargs)
        return func(*args, **kwargs)

    def _keep(self, written: object) -> None:
        for one in pytree.tree_leaves(written):
            storage = _storage(one) if isinstance(one, Tensor) else None
            if storage is not None and storage.data_ptr() in self.storages and storage.data_ptr() not in self.kept:
                self.kept[storage.data_ptr()] = storage.clone()

    def now(self) -> dict[int, Tensor]:
        """The tensors that were written to, with the values that they have now."""
        return {address: self.tensors[address].detach().clone() for address in sorted(self.kept)}

    def undo(self) -> None:
        """Write the values back."""
        for address, values in self.kept.items():
            self.storages[address].copy_(values)


@contextmanager
def _reaching_inside(autocast: Iterable[torch._C.DispatchKey]) -> Iterator[None]:
    """Let autocast reach the operations inside a fused one, from which a mode keeps it."""
    entered = torch._C._dispatch_tls_local_include_set()
    left = torch._C._dispatch_tls_local_exclude_set()
    for key in autocast:
        left = left.remove(key)
    with torch._C._ForceDispatchKeyGuard(entered, left):
        yield


def _storage(tensor: Tensor) -> UntypedStorage | None:
    """Where the values of a tensor lie; None where they lie in other tensors, or nowhere."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided or tensor.device.type == "meta":
        return None
    storage = tensor.untyped_storage()
    return storage if storage.data_ptr() else None


def _host_modules(model: nn.Module) -> list[nn.Module]:
    """The modules of a model, other than those that pruning has added."""
    added = model._modules.get(PREFIX)
    own = set() if added is None else set(added.modules())
    return [module for module in model.modules() if module not in own]


def _contents(attributes: dict[str, Any], seen: set[int]) -> tuple[dict[str, Any], list[tuple[Any, Any]]]:
    """The attributes of a module, and each container that it holds with a copy of what that holds."""
    return dict(attributes), [(held, copy.copy(held)) for held in containers_in(attributes.values(), seen)]


def _put_back(container: Any, content: Any) -> bool:
    """Give a container its content back; returns whether it held something else."""
    if isinstance(container, dict):
        same = list(container) == list(content) and all(container[name] is content[name] for name in content)
        _restore_names(container, content)
        return not same
    if _holds(container, content):
        return False
    container.clear()
    container.update(content) if isinstance(container, set) else container.extend(content)
    return True


def _restore_names(present: dict[Any, Any], before: dict[Any, Any]) -> None:
    # What has not changed is not touched: another thread may read it.
    for name in [name for name in present if name not in before]:
        del present[name]
    for name, value in before.items():
        if name not in present or present[name] is not value:
            present[name] = value


def _holds(container: Collection[Any], content: Collection[Any]) -> bool:
    if len(container) != len(content):
        return False
    if isinstance(container, set):
        return container == content
    return all(one is other for one, other in zip(container, content, strict=True))
