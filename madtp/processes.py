"""Processes that work together, as torchrun or accelerate start them. Start at :func:`joined` and :class:`Processes`.

Both launchers describe the processes in the same environment variables (``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``,
``MASTER_ADDR``, ``MASTER_PORT``), which torch.distributed reads. Nothing else of them is needed.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from madtp.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process among those that work together.

    All processes have to call the same methods, in the same order. A process that is alone does not communicate.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes.
    """

    rank: int = 0
    size: int = 1

    @property
    def main(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def mean(self, values: Tensor) -> Tensor:
        """The mean of a tensor over all processes."""
        return values if self.size == 1 else self._reduced(values, dist.ReduceOp.SUM) / self.size

    def largest(self, values: Tensor) -> Tensor:
        """The largest value over all processes, entry by entry."""
        return values if self.size == 1 else self._reduced(values, dist.ReduceOp.MAX)

    def gather(self, value: T) -> list[T]:
        """The values of all processes, by rank. A value is anything that can be pickled."""
        if self.size == 1:
            return [value]
        values = [value] * self.size
        dist.all_gather_object(values, value)
        return values

    def from_main(self, value: T) -> T:
        """The main process's value."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def spread(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite the tensors of all processes with those of the main process."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), src=0)

    def wait(self) -> None:
        """Wait until all processes have called this."""
        if self.size > 1:
            dist.barrier()

    def share(self, things: Sequence[T]) -> Sequence[T]:
        """The part of a sequence that this process takes: every ``size``-th entry."""
        return things[self.rank :: self.size]

    @staticmethod
    def _reduced(values: Tensor, how: dist.ReduceOp.RedOpType) -> Tensor:
        result = values.clone()
        dist.all_reduce(result, op=how)
        return result


ALONE = Processes()


def current() -> Processes:
    """This process in the group that it has joined; alone if there is none."""
    if not (dist.is_available() and dist.is_initialized()):
        return ALONE
    return Processes(dist.get_rank(), dist.get_world_size())


def launched() -> Processes:
    """This process among those that a launcher has started; alone if none has."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    return Processes(int(os.environ.get("RANK", "0")), size) if size > 1 else ALONE


def usable_device(device: str) -> torch.device:
    """Return a device by its name, once a tensor has been there and back.

    Raises:
        ConfigError: torch does not know it, or this machine does not have it; the message names those that it has.
    """
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"device is {device!r}, which names no device; {_devices_here()}.") from error
    try:
        torch.zeros(1, device=found).cpu()
    except Exception as error:  # what a missing device raises depends on its kind
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise ConfigError(f"device is {device!r}, which cannot be used here ({reason}); {_devices_here()}.") from error
    return found


def _devices_here() -> str:
    kind = torch.accelerator.current_accelerator(check_available=True)
    others = [f"{kind.type}:{number}" for number in range(torch.accelerator.device_count())] if kind else []
    return f"this machine has {', '.join(['cpu', *others])}"


@contextmanager
def joined(device: str) -> Iterator[tuple[Processes, str]]:
    """Join the processes that a launcher has started with this one, for the block.

    A group that exists already is used and left as it is. A process that no launcher has started is alone.

    Args:
        device: ``"cpu"``, or ``"cuda"`` for one GPU per process, which ``LOCAL_RANK`` chooses.

    Yields:
        The processes, and the device of this one.

    Raises:
        ConfigError: this machine does not have the device.
    """
    own = launched().size > 1 and not dist.is_initialized()
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    usable_device(device)
    if device.startswith("cuda:") and (own or current().size > 1):
        torch.cuda.set_device(device)
    if own:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo")
    try:
        yield current(), device
    finally:
        if own:
            dist.destroy_process_group()
