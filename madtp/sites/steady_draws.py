"""Runs whose random numbers do not depend on the order in which they are drawn: :class:`SteadyDraws`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
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


def draws_can_be_steady(tensors: Sequence[Tensor]) -> bool:
    """Whether all random numbers are drawn by operations of their own: on GPUs, fused attention draws inside."""
    return all(one.device.type == "cpu" for one in tensors)
