"""Hooks of modules: whose they are (:class:`OwnHooks`), which there are (:func:`hooks_of`), and copies without them.

A graph takes the place of many modules, and calls few of them. Hooks of the others do not run. Those that are part of how a
model computes are traced with it. Those that users register to look at it, or to change it, need the modules themselves.
"""

from __future__ import annotations

import functools
import math
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import nn
from torch.utils.hooks import RemovableHandle

from madtp.calls.copies import share

KINDS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
# Hooks by which torch computes a weight from others.
FOLLOWED = "torch.nn.utils."
LIBRARIES = tuple({sysconfig.get_path(name) for name in ("purelib", "platlib", "stdlib")})

Hook = Callable[..., object]


@dataclass(frozen=True)
class OwnHooks:
    """Which hooks are part of a model: those of the library that its modules come from, and those without which it computes
    something else.

    Attributes:
        needed: the code of the latter; see :func:`code_of`.
    """

    needed: frozenset[object] = frozenset()

    def holds(self, hook: Hook, module: nn.Module) -> bool:
        """Whether a hook of a module is part of the model."""
        home = f"{getattr(hook, '__module__', None) or type(hook).__module__}."
        if home.startswith(FOLLOWED) or code_of(hook) in self.needed:
            return True
        library = home.partition(".")[0]
        return library == type(module).__module__.partition(".")[0] and library != "torch" and _is_installed(library)


def code_of(hook: Hook) -> object:
    """Return what hooks have in common that do the same: their code, or their class."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    function = getattr(hook, "__func__", hook)
    return getattr(function, "__code__", type(hook))


def without_hooks(module: nn.Module, own: OwnHooks, leave_out: object = None) -> nn.Module:
    """Return a copy that shares the parameters and has the model's own hooks alone.

    Args:
        module: the module.
        own: the hooks to keep.
        leave_out: code of hooks that are left out even so.
    """

    def drop(copy: nn.Module) -> None:
        drop_hooks(copy, own, leave_out)

    return share(module, drop)


def drop_hooks(module: nn.Module, own: OwnHooks, leave_out: object = None) -> None:
    """Take hooks away from a module, but for the model's own; see :func:`without_hooks`."""
    for hooks in _kinds(module):
        for number, hook in list(hooks.items()):
            if code_of(hook) == leave_out or not own.holds(hook, module):
                del hooks[number]


@dataclass(frozen=True)
class HookedModules:
    """Looks for hooks on modules that are not the model's own, as quickly as every call needs it.

    Attributes:
        modules: the modules, by path.
        hooks: the hooks of each kind of these modules, one after the other.
        own: the model's own.
    """

    modules: tuple[tuple[str, nn.Module], ...]
    hooks: tuple[Mapping[int, Hook], ...]
    own: OwnHooks

    def __call__(self, before: float = math.inf) -> list[str]:
        """The paths of the modules that have such hooks now.

        Args:
            before: hooks of this number and later ones do not count; see :func:`next_hook`.
        """
        return list(dict.fromkeys(path for path, _ in self.found(before))) if any(self.hooks) else []

    def found(self, before: float = math.inf) -> Iterator[tuple[str, Hook]]:
        """These hooks, and the paths of their modules."""
        for at, hooks in enumerate(self.hooks):
            path, module = self.modules[at // len(KINDS)]
            for number, hook in hooks.items():
                if number < before and not self.own.holds(hook, module):
                    yield path, hook


def hooks_of(modules: Iterable[tuple[str, nn.Module]], own: OwnHooks) -> HookedModules:
    """Return what looks for hooks on named modules."""
    named = tuple(modules)
    return HookedModules(named, tuple(hooks for _, module in named for hooks in _kinds(module)), own)


def next_hook() -> int:
    """Return the number that torch gives the next hook: those that a model registers while it runs are its own."""
    return RemovableHandle.next_id


def _kinds(module: nn.Module) -> list[dict[int, Hook]]:
    return [module.__dict__[kind] for kind in KINDS]


@functools.cache
def _is_installed(library: str) -> bool:
    """Whether a top-level module is an installed library, and not a program or project of the user."""
    file = getattr(sys.modules.get(library), "__file__", None)
    return file is not None and file.startswith(LIBRARIES)
