"""Runs whose random numbers do not depend on the order in which they are drawn: :func:`comparable_draws`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode


class SteadyDraws(TorchDispatchMode):
    """Each operation inside the block draws as if it were the first, and dropout keeps everything.

    So two models that compute the same can be compared in training, though a program may draw in another order, or in tensors
    of another form. Put the generator back afterwards (:func:`~madtp.sites.preserved_state.trial_run`).
    """

    def __init__(self) -> None:
        TorchDispatchMode.__init__(self)

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **(kwargs or {}))
        torch.manual_seed(0)
        result: Any = func(*args, **(kwargs or {}))
        if "bernoulli" in func.overloadpacket.__name__ and isinstance(result, Tensor):
            return result.fill_(1)
        return result


def is_training(model: nn.Module) -> bool:
    """Return whether a model, or a part of it, is in training mode."""
    return any(module.training for module in model.modules())


def values_are_comparable(model: nn.Module, inputs: Sequence[Tensor]) -> bool:
    """Return whether runs of a model on ``inputs`` can be made to draw alike (:func:`comparable_draws`).

    In training that takes random numbers that operations of their own draw. On GPUs, fused attention draws inside.
    """
    return not is_training(model) or all(one.device.type == "cpu" for one in (*model.parameters(), *inputs))


def comparable_draws(model: nn.Module, inputs: Sequence[Tensor]) -> AbstractContextManager[object]:
    """Return a context in which runs of a model are compared: draws are steady in training, where they can be."""
    return SteadyDraws() if is_training(model) and values_are_comparable(model, inputs) else nullcontext()
