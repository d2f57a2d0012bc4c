"""Who reads what modules return, in one real run of a model: :class:`Readers`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from madtp.programs.deferred import METADATA


class Readers(TorchFunctionMode):
    """Notes, while it is active, which modules are at work when a function takes a tensor that is watched.

    Args:
        active: Paths of the modules at work, outermost first; it changes as the model runs.
    """

    def __init__(self, active: Sequence[str]) -> None:
        super().__init__()
        self._active = active
        # The tensors are kept, as ids of tensors that are gone are used again.
        self._watched: dict[int, tuple[Tensor, set[tuple[str, ...]]]] = {}

    def watch(self, values: object) -> None:
        """Watch the tensors in nested containers from now on."""
        for leaf in pytree.tree_leaves(values):
            if isinstance(leaf, Tensor):
                self._watched[id(leaf)] = leaf, set()

    def of(self, tensor: Tensor) -> set[tuple[str, ...]]:
        """The modules at work whenever a tensor was read."""
        return self._watched[id(tensor)][1] if id(tensor) in self._watched else set()

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Iterable[type],
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        if func not in METADATA:
            for leaf in pytree.tree_leaves((args, kwargs)):
                if isinstance(leaf, Tensor) and id(leaf) in self._watched:
                    self._watched[id(leaf)][1].add(tuple(self._active))
        return func(*args, **(kwargs or {}))
