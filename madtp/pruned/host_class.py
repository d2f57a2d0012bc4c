"""The class of a pruned model, which is made for each host: :func:`pruned_class`."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from madtp.calls.compiling import is_compiling
from madtp.config import PruningConfig
from madtp.errors import ConfigError
from madtp.programs.host_forward import HostForward
from madtp.programs.host_methods import as_one_call
from madtp.programs.notes import noting_unpruned_blocks
from madtp.programs.replaced_forward import HOST_CLASS
from madtp.programs.whole_forward import WholeForward
from madtp.pruned.model import PrunedModel

SETTINGS = ("temperature", "gain", "gradient_checkpointing")
"""Short forms that can be set."""
SHORT_FORMS = (
    *SETTINGS,
    "report",
    "example",
    "alignment_loss",
    "aside",
    "code",
    "dense",
    "kept_tokens",
    "macs",
    "macs_by_module",
    "surviving",
    "cache_bytes",
    "token_counts",
)
"""Names of the handle that a pruned model has itself, where the host has no such name.

``config`` is none: other libraries take a model's ``config`` for one of theirs, and write to it.
"""


def pruned_class(host: nn.Module) -> type[PrunedModel]:
    """Return the class of the pruned model of a host: a :class:`PrunedModel` of the host's class, and with its name.

    Args:
        host: the module that becomes the pruned model.
    """
    own = type(host)
    members: dict[str, Any] = {HOST_CLASS: own, "__module__": own.__module__, "__qualname__": own.__qualname__}
    members["__doc__"] = own.__doc__
    members["forward"] = _forward_like(host.forward)
    members["__init__"] = _refusing_init(own)
    for name, function in _methods(own, types.FunctionType):
        members[name] = _one_call(name, function)
    for name, _ in _methods(own, classmethod):
        members[name] = staticmethod(getattr(own, name))  # it makes hosts, not pruned models
    if "save_pretrained" in members:
        members["save_pretrained"] = _describing(members["save_pretrained"])
    for name in SHORT_FORMS:
        if not hasattr(host, name):
            members[name] = _short_form(name)
    if not hasattr(host, "config"):
        members["config"] = _config_of_the_host()
    if not hasattr(host, "dense_macs"):
        members["dense_macs"] = _dense_macs
    made = types.new_class(own.__name__, (PrunedModel, own), exec_body=lambda namespace: namespace.update(members))
    assert issubclass(made, PrunedModel)
    return made


def _forward_like(original: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of pruned models with the name, the signature and the docstring of another, which is bound."""

    # A copy, not a function that calls it: compilers break at every function around one that they do not follow.
    code = PrunedModel.forward
    forward = types.FunctionType(
        code.__code__.replace(), code.__globals__, "forward", code.__defaults__, code.__closure__
    )
    functools.update_wrapper(forward, original)
    del forward.__wrapped__  # type: ignore[attr-defined]  # it would keep the host alive
    given = inspect.signature(original)
    this = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    only = any(one.kind is inspect.Parameter.POSITIONAL_ONLY for one in given.parameters.values())
    this = this if only else this.replace(kind=inspect.Parameter.POSITIONAL_OR_KEYWORD)
    forward.__signature__ = given.replace(parameters=[this, *given.parameters.values()])  # type: ignore[attr-defined]
    return forward


def _refusing_init(host: type[nn.Module]) -> Callable[..., None]:
    def __init__(self: PrunedModel, *args: Any, **kwargs: Any) -> None:
        raise TypeError(
            f"pruned models are made by madtp.rewrite; {host.__module__}.{host.__qualname__} makes unpruned ones."
        )

    return __init__


def _methods(host: type[nn.Module], kind: type) -> Iterator[tuple[str, Any]]:
    """The host's public methods of a kind that are not those of any module."""
    for name in dir(host):
        if name.startswith("_") or name == "forward" or hasattr(nn.Module, name):
            continue
        found = next((vars(kind)[name] for kind in host.__mro__ if name in vars(kind)), None)
        if isinstance(found, kind):
            yield name, found


def _one_call(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of the host that counts as one call of the pruned model."""

    @functools.wraps(method)
    def called(self: PrunedModel, *args: Any, **kwargs: Any) -> Any:
        control = self.madtp.control
        if is_compiling() or control.scope.calls or control.scope.runs_original:
            return method(self, *args, **kwargs)
        bound = types.MethodType(method, self)
        own = as_one_call(bound, control, _noting_unpruned_blocks(self, name))
        methods = self.madtp.methods
        with _following(self, (args, kwargs)):
            return own(*args, **kwargs) if methods is None else methods.run(bound, own, args, kwargs)

    return called


def _following(pruned: PrunedModel, given: object) -> AbstractContextManager[None]:
    """The context in which a method of the host is followed, if its forward is."""
    forward = pruned.madtp.forward_of_host
    if not isinstance(forward, HostForward) or not forward.follows_features:
        return nullcontext()
    tensors = [x for x in pytree.tree_leaves(given) if isinstance(x, Tensor)]
    images = any(x.is_floating_point() for x in tensors)
    return pruned.madtp.control.following(tensors) if images else nullcontext()


def _describing(save_pretrained: Callable[..., Any]) -> Callable[..., Any]:
    """The host's method, with a file in the folder that makes it one of a pruned model."""

    @functools.wraps(save_pretrained)
    def called(self: PrunedModel, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        from madtp.saving.host_folder import describing

        if not (args[0] if args else kwargs.get("is_main_process", True)):
            return save_pretrained(self, save_directory, *args, **kwargs)
        with describing(self, save_directory):
            return save_pretrained(self, save_directory, *args, **kwargs)

    return called


def _noting_unpruned_blocks(pruned: PrunedModel, method: str) -> Callable[[], AbstractContextManager[None]]:
    """The context for calls of a method: it notes blocks with sites that run as the original does."""
    handle = pruned.madtp
    if not isinstance(handle.forward_of_host, WholeForward):
        return nullcontext
    blocks = {site.name.partition("#")[0] for site in handle.report.sites}
    return functools.partial(
        noting_unpruned_blocks, pruned, blocks, control=handle.control, notes=handle.notes, method=method
    )


def _short_form(name: str) -> property:
    def read(self: PrunedModel) -> Any:
        for own in (self.__dict__, self._parameters, self._buffers, self._modules):
            if name in own:  # the host has made one since
                return own[name]
        return getattr(self.madtp, name)

    def write(self: PrunedModel, value: Any) -> None:
        # What the host's own code sets while it runs is the host's.
        settable = name in SETTINGS and name not in self.__dict__ and not self.madtp.control.scope.calls
        if settable:
            setattr(self.madtp, name, value)
        else:
            self.__dict__[name] = value

    return property(read, write, doc=f"Short for ``madtp.{name}``.")


def _config_of_the_host() -> property:
    """A ``config`` that others may give to a model, and that does not take pruning's without a word."""

    def read(self: PrunedModel) -> Any:
        if "config" in self.__dict__:
            return self.__dict__["config"]
        raise AttributeError("it has no config; that of pruning is pruned.madtp.config")

    def write(self: PrunedModel, value: Any) -> None:
        if isinstance(value, PruningConfig):
            raise ConfigError("config is the host's; set pruned.madtp.config.")
        self.__dict__["config"] = value

    return property(read, write, doc="The host's, if somebody has given it one.")


@torch.no_grad()
def _dense_macs(self: PrunedModel, *args: Any, **kwargs: Any) -> float:
    """Multiply-accumulates per sample of a call with all tokens kept. The call is run for that, but not recorded."""
    with self.madtp.aside(), self.madtp.dense():
        self.forward(*args, **kwargs)  # hooks that record calls are not to see it
        return self.madtp.macs()
