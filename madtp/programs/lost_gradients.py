"""Which parameters would get no gradient from a program: :func:`lost_gradients`, and :func:`lost_gradients_remark` on them.

No backward pass is run: what autograd has recorded of a forward tells what it would reach.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils import _pytree as pytree

from madtp.calls.branches import OtherBranch
from madtp.calls.call import Call
from madtp.calls.saved_tensors import without_saved_tensors_hooks

SHOWN = 3


def lost_gradients(
    module: nn.Module, call: Call, original: Callable[[Call], object], program: Callable[[Call], object]
) -> tuple[str, ...]:
    """Return the names of the parameters and inputs that the original passes gradients to, and the program does not.

    Args:
        module: holds the parameters.
        call: a call that both serve.
        original: runs the original.
        program: runs the program, pruning off.
    """
    named = {id(one): name for name, one in module.named_parameters() if one.requires_grad}
    wanted = any(x.requires_grad for x in call.tensors())
    if not named and not wanted:
        return ()
    copies: dict[int, object] = {}
    leaves = [copies.setdefault(id(x), _leaf(x)) for x in call.flat()[0]]
    named |= {id(x): f"input {at}" for at, x in enumerate(leaves) if isinstance(x, Tensor) and x.requires_grad}
    # Some models write to their inputs, which autograd allows for results alone.
    clones: dict[int, object] = {}
    given = [clones.setdefault(id(x), x.clone()) if isinstance(x, Tensor) and x.requires_grad else x for x in leaves]
    own = call.with_leaves(given)
    with torch.enable_grad(), without_saved_tensors_hooks():
        try:
            expected = _reached(original(own))
        except Exception:  # a model for inference alone
            return ()
        try:
            found = _reached(program(own))
        except OtherBranch:
            return ()
        except RuntimeError:  # autograd refuses what the graph does
            found = set()
    return tuple(name for key, name in named.items() if key in expected and key not in found)


def lost_gradients_remark(names: Sequence[str]) -> str:
    """Say that programs pass no gradients to these parameters and inputs."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return (
        f"a program passes no gradients to {', '.join(names[:SHOWN])}{more}, to which the model does: it holds a value that "
        "the model computed before the rewrite; under torch.no_grad() such calls are pruned"
    )


def _leaf(value: object) -> object:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.detach().requires_grad_()


def _reached(output: object) -> set[int]:
    """The ids of the tensors to which a backward pass from ``output`` would bring gradients."""
    todo: list[Node] = [
        x.grad_fn for x in pytree.tree_leaves(output) if isinstance(x, Tensor) and x.grad_fn is not None
    ]
    seen: set[Node] = set(todo)
    found: set[int] = set()
    while todo:
        node = todo.pop()
        variable = getattr(node, "variable", None)
        if variable is not None:
            found.add(id(variable))
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                todo.append(following)
    return found
