"""Count multiply-accumulates while eager code runs: what no captured graph prices in closed form.

Start at :class:`Counter`. It follows the convention of ``madtp/cost/table.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from madtp.calls.call import Call
from madtp.calls.fast_path import spelled_out

aten = torch.ops.aten
# Not in the registry of older releases of torch.
CPU_ATTENTION = aten._scaled_dot_product_flash_attention_for_cpu
# Per element: with and without affine parameters.
NORMS = {aten.native_layer_norm: (5, 4), aten.native_group_norm: (5, 4), aten._fused_rms_norm: (5, 4)}


class Counter(TorchDispatchMode):
    """Adds up multiply-accumulates of what runs inside the block while ``paused()`` is false.

    Attributes:
        total: What was counted so far.
    """

    def __init__(self, paused: Callable[[], bool]) -> None:
        TorchDispatchMode.__init__(self)
        self.paused = paused
        self.total = 0.0

    def __enter__(self) -> Counter:
        self.open = ExitStack()
        self.open.enter_context(spelled_out())
        TorchDispatchMode.__enter__(self)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        TorchDispatchMode.__exit__(self, exc_type, exc_value, traceback)
        self.open.close()

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        result: object = func(*args, **kwargs)
        if not self.paused():
            self.total += _amount(func, args, kwargs, result)
        return result


def count_eagerly(model: nn.Module, call: Call) -> float:
    """Multiply-accumulates per sample of one run of a model, without gradients."""
    with torch.no_grad(), Counter(lambda: False) as counter:
        model(*call.args, **call.kwargs)
    return counter.total / call.samples()


def _amount(func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], result: object) -> float:
    packet = getattr(func, "_overloadpacket", func)
    if packet is CPU_ATTENTION:
        query, key, value = (tuple(tensor.shape) for tensor in args[:3])
        return float(math.prod(query[:3]) * key[2] * (query[3] + value[3]))
    if packet in flop_registry:
        # The registry counts a multiplication and an addition as two.
        return float(flop_registry[packet](*args, **kwargs, out_val=result) / 2)
    if packet in NORMS:
        affine, plain = NORMS[packet]
        return float(math.prod(args[0].shape) * (affine if any(isinstance(a, Tensor) for a in args[1:4]) else plain))
    return 0.0
