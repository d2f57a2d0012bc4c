"""Which hooks a model needs: :func:`needed_hooks`."""

from __future__ import annotations

import torch
from torch import nn

from madtp.calls.call import Call
from madtp.calls.compare import compare
from madtp.calls.hooks import OwnHooks, code_of, hooks_of, without_hooks
from madtp.errors import RewriteError
from madtp.sites.preserved_state import trial_run


def needed_hooks(model: nn.Module, call: Call) -> OwnHooks:
    """Return the hooks without which a model computes something else, or nothing.

    Each is left out in turn, with all others that have its code; a copy of the model runs. Hooks that only look on are not
    needed: they would see what tracing computes.

    Args:
        model: the model; it is not changed.
        call: the example call.
    """
    codes = {code_of(hook) for _, hook in hooks_of(model.named_modules(), OwnHooks()).found()}
    every = OwnHooks(frozenset(codes))
    if not codes:
        return every
    expected = _outcome(without_hooks(model, every), call)
    return OwnHooks(
        frozenset(code for code in codes if not _same(expected, _outcome(without_hooks(model, every, code), call)))
    )


def _outcome(model: nn.Module, call: Call) -> object:
    with torch.no_grad(), trial_run(model, (call.args, call.kwargs)):
        try:
            return model(*call.args, **call.kwargs)
        except Exception as error:  # it misses what the hook does
            return error


def _same(expected: object, found: object) -> bool:
    if isinstance(expected, Exception) or isinstance(found, Exception):
        return False
    try:
        compare(expected, found)
    except RewriteError:
        return False
    return True
