"""What surrounds a call and decides what it computes: :class:`CallEnvironment`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch

from madtp.calls.saved_tensors import without_saved_tensors_hooks


@dataclass(frozen=True)
class CallEnvironment:
    """Modes of torch around a call.

    Attributes:
        gradients: whether gradients are on.
        inference: whether inference mode is on.
        autocast: the dtype of autocast for the CPU and the device of the call; None where it is off.
        saved_tensors_hooks: what autograd calls for the tensors that it saves, as checkpoints do.
    """

    gradients: bool
    inference: bool
    autocast: tuple[tuple[str, torch.dtype | None], ...]
    saved_tensors_hooks: tuple[object, ...]

    @classmethod
    def now(cls, device: str) -> CallEnvironment:
        """The environment of a call that is made now, on a type of device."""
        devices = [one for one in dict.fromkeys(("cpu", device)) if one != "meta"]
        return cls(
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            tuple((one, torch.get_autocast_dtype(one) if torch.is_autocast_enabled(one) else None) for one in devices),
            tuple(torch._C._autograd._top_saved_tensors_default_hooks(False) or ()),
        )

    @contextmanager
    def again(self) -> Iterator[None]:
        """Compute inside the block as in a call in this environment, but for hooks on saved tensors."""
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(self.inference))
            stack.enter_context(torch.set_grad_enabled(self.gradients))
            stack.enter_context(without_saved_tensors_hooks())
            for device, dtype in self.autocast:
                stack.enter_context(torch.autocast(device, dtype=dtype, enabled=dtype is not None))
            yield
