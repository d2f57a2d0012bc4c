"""Methods of the host other than ``forward``, as methods of the pruned model: :func:`as_one_call`."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from madtp.calls.objects import object_kind
from madtp.errors import ContinuationError
from madtp.programs.deferred import settled
from madtp.sites.control import PruningControl

log = logging.getLogger("madtp")


def as_one_call(
    method: Callable[..., Any], control: PruningControl, around: Callable[[], AbstractContextManager[None]]
) -> Callable[..., Any]:
    """Make a method of the host count as one call: the record of the last forward spans all that it runs.

    Where a pruned key/value cache cannot be continued, the method runs once more without pruning.

    Args:
        method: bound to the host.
        control: the control of the pruned model.
        around: gives the context that the method runs in.
    """

    @functools.wraps(method)
    def called(*args: Any, **kwargs: Any) -> Any:
        with control.call(), around():
            try:
                return settled(method(*args, **kwargs))
            except ContinuationError as error:
                if object_kind((args, kwargs)) is not None:
                    raise
                log.warning("%s runs once more, unpruned: %s", method.__name__, error)
            with control.running_original():
                return method(*args, **kwargs)

    return called
