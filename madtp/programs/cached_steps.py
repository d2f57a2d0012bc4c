"""Calls that go on from a key/value cache: :class:`CachedSteps` runs them by the host's own code.

Such a call has no tokens to prune, so it needs no program: the host computes it as it does without pruning, and cached keys and
values of survivors (:class:`~madtp.tokens.cached_tokens.CachedTokens`) follow what it does with them. A step costs what it
costs the host, less the attention to dropped tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Mapping
from contextlib import nullcontext
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from madtp.calls.objects import CONSTANTS, is_object, leaves_of
from madtp.calls.structures import unflatten
from madtp.errors import ContinuationError
from madtp.programs.originals import original_of
from madtp.sites.additions import additions_of
from madtp.sites.control import PruningControl
from madtp.sites.preserved_state import trial_run
from madtp.tokens.cached_tokens import (
    CachedTokens,
    NotFollowed,
    dropped_as_zeros,
    holds_cached_tokens,
    strictly_followed,
    tensors_in,
)

Forward: TypeAlias = Callable[..., Any]
CHANGED = (
    "{} reads the key/value cache of a pruned call by {}, which is not followed, and which its calls before did not do. "
    "Start again with a new cache."
)


class CachedSteps:
    """Runs calls of one module that go on from a key/value cache.

    Attributes:
        module: the module, which may be a pruned model.
        host: the pruned model.
        control: its control.
        followed: by kind of call, whether what the module does with cached tokens can be followed.
        returns_weights: the kinds of calls that return weights of attentions.
    """

    def __init__(self, module: nn.Module, host: nn.Module, control: PruningControl) -> None:
        """Make the steps of a module; see above for the arguments."""
        self.module, self.host, self.control = module, host, control
        self.followed: dict[Hashable, bool] = {}
        self.returns_weights: set[Hashable] = set()

    def serve(self, args: tuple[object, ...], kwargs: Mapping[str, object]) -> bool:
        """Whether :meth:`run` can run a call. The first call of a kind is tried out, on copies of its caches."""
        caches = [one for one in (*args, *kwargs.values()) if is_object(one)]
        return any(map(holds_cached_tokens, caches)) and self._follows(args, kwargs)

    def _follows(self, args: tuple[object, ...], kwargs: Mapping[str, object]) -> bool:
        kind = _kind(args, kwargs)
        if kind not in self.followed:
            self.followed[kind] = self._can_be_followed(args, kwargs)
        return self.followed[kind]

    def serve_text(self, args: tuple[object, ...], kwargs: Mapping[str, object]) -> bool:
        """Whether :meth:`run` can run a call that hands on nothing to prune: a cache, and no features or pixels.

        A cache that was filled without pruning is an object that the model has returned.
        """
        given = leaves_of((args, dict(kwargs)))
        pruned = [one for one in given if is_object(one) and holds_cached_tokens(one)]
        unpruned = [one for one in given if is_object(one) and self.control.has_returned(one)]
        others = [one for one in given if not any(one is cache for cache in (*pruned, *unpruned))]
        if any(x.is_floating_point() and x.dim() > 1 for one in others for x in tensors_in(one)):
            return False
        return self._follows(args, kwargs) if pruned else any(map(_is_filled, unpruned))

    def run(self, original: Forward, args: tuple[object, ...], kwargs: Mapping[str, object]) -> object:
        """Run a call that is served by the module's own forward.

        Raises:
            ContinuationError: it does something else with cached tokens than in the calls before.
        """
        tracker = self.control.scope.tracker
        try:
            unfollowed = nullcontext() if tracker is None else tracker.set_aside()
            with unfollowed, self.control.following_caches(), strictly_followed():
                result = original(*args, **kwargs)
        except NotFollowed as error:
            self.followed[_kind(args, kwargs)] = False
            raise ContinuationError(CHANGED.format(type(self.module).__name__, error)) from error
        weights = self.returns_weights and _kind(args, kwargs) in self.returns_weights
        return _with_full_weights(result) if weights else result

    def _can_be_followed(self, args: tuple[object, ...], kwargs: Mapping[str, object]) -> bool:
        original = original_of(self.module, additions_of(self.host).own_hooks)
        own_args, own_kwargs = with_own_caches((args, dict(kwargs)))
        try:
            with torch.no_grad(), trial_run(self.module, (own_args, own_kwargs)), strictly_followed():
                result = original(*own_args, **own_kwargs)
        except NotFollowed:
            return False
        except Exception:  # if it is the model's own, the call itself raises it
            return self._fails_with_all_tokens(args, kwargs)
        kept = [x for one in (*own_args, *own_kwargs.values()) if is_object(one) for x in tensors_in(one)]
        returned = [x for x in pytree.tree_leaves(result) if isinstance(x, CachedTokens)]
        others = [x for x in returned if not any(x is one for one in kept)]
        if others:
            self.returns_weights.add(_kind(args, kwargs))
        return all(x.weights for x in others)

    def _fails_with_all_tokens(self, args: tuple[object, ...], kwargs: Mapping[str, object]) -> bool:
        original = original_of(self.module, additions_of(self.host).own_hooks)
        own_args, own_kwargs = with_own_caches((args, dict(kwargs)))
        try:
            with torch.no_grad(), trial_run(self.module, (own_args, own_kwargs)), dropped_as_zeros():
                original(*own_args, **own_kwargs)
        except Exception:
            return True
        return False


def with_own_caches(
    given: tuple[tuple[object, ...], dict[str, object]],
) -> tuple[tuple[object, ...], dict[str, object]]:
    """Return arguments with copies of the caches among them."""
    args, kwargs = given
    memo: dict[int, object] = {}
    for one in (*args, *kwargs.values()):
        if is_object(one):  # gradients must not keep tensors from being copied
            memo.update({id(x): x.detach().clone() for x in tensors_in(one) if not isinstance(x, CachedTokens)})
    own = [copy.deepcopy(one, memo) if is_object(one) else one for one in args]
    return tuple(own), {name: copy.deepcopy(one, memo) if is_object(one) else one for name, one in kwargs.items()}


def _kind(args: tuple[object, ...], kwargs: Mapping[str, object]) -> Hashable:
    """What tells calls apart that may read their caches in different ways; positions and lengths do not."""
    return tuple((name, type(one), _told(one)) for name, one in (*enumerate(args), *sorted(kwargs.items())))


def _told(value: object) -> Hashable:
    if isinstance(value, Tensor):
        return tuple(min(size, 2) for size in value.shape)
    exact = isinstance(value, CONSTANTS) and not (type(value) is int or type(value) is float)
    return value if exact else None


def _with_full_weights(result: object) -> object:
    """A result in which weights of attentions have an entry for each token."""
    leaves, spec = pytree.tree_flatten(result)
    full = [x.full_weights() if isinstance(x, CachedTokens) and x.weights else x for x in leaves]
    return unflatten(full, spec)


def _is_filled(cache: object) -> bool:
    """Whether a cache holds keys and values of earlier tokens."""
    return any(x.dim() > 2 and x.numel() > 0 for x in tensors_in(cache))
