"""Verify: invariants checked on every rewrite.

Start at :data:`CHECKS`. The cheap ones run here; the tests run all invariants of the design on many models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from madtp.calls import Call
from madtp.control import PruningControl
from madtp.errors import RewriteError
from madtp.program import Program
from rewriters.plan import Plan
from rewriters.replay import batch_mates_do_not_matter, dropping_equals_hiding, first_sample

RELATIVE = {torch.float32: 1e-4, torch.float64: 1e-8}
COARSE = 5e-2
# MACs a sample from which on one comparison has to do: further ones would cost seconds.
EXPENSIVE = 2e10


@dataclass
class Case:
    """What a check may look at: the original, the program, the tree it runs on, the control of its sites, the example
    call, the plan."""

    model: nn.Module
    program: Program
    root: nn.Module
    control: PruningControl
    call: Call
    plan: Plan


def graph_is_sound(case: Case) -> None:
    """The graph is well formed and names only modules and parameters that exist."""
    case.program.graph.lint()
    for node in case.program.graph.nodes:
        if node.op in ("get_attr", "call_module"):
            value: Any = case.root
            for part in str(node.target).split("."):
                if not hasattr(value, part):
                    raise RewriteError(f"the graph names {node.target}, which the model does not have.")
                value = getattr(value, part)


def inactive_equals_original(case: Case) -> None:
    """With pruning off, the program computes what the model computes, at the example's batch size and for one
    sample."""
    if any(m.training for m in case.model.modules()):
        return
    calls = [case.call]
    if _is_cheap(case) and _batch_is_free(case):
        calls.append(first_sample(case.call))
    temperature = case.control.temperature
    case.control.temperature = 0.0
    try:
        with torch.no_grad():
            for call in calls:
                expected = case.model(*call.args, **call.kwargs)
                actual = case.program.run(case.root, call.flat()[0])
                compare(expected, actual)
    finally:
        case.control.temperature = temperature


def pruned_keeps_shapes(case: Case) -> None:
    """With pruning on, outputs have the structure, shapes and dtypes of the original's."""
    with torch.no_grad():
        pruned = case.program.run(case.root, case.call.flat()[0])
    wanted = [n.meta.get("val") if isinstance(n, fx.Node) else n for n in _outputs(case.program.graph)]
    for expected, actual in zip(wanted, pytree.tree_flatten(pruned)[0], strict=True):
        if isinstance(expected, Tensor) and [int(n) for n in map(_number, expected.shape)] != list(actual.shape):
            raise RewriteError(f"an output has shape {tuple(actual.shape)}, the model's has {tuple(expected.shape)}.")


def decisions_hold(case: Case) -> None:
    """With pruning on, a decision gives one result however it is carried out (see ``replay.py``)."""
    misaligned = case.control.config.mask_order == "sorted"
    if any(m.training for m in case.model.modules()) or not _is_cheap(case) or misaligned:
        return
    dropping_equals_hiding(case.program, case.root, case.control, case.call)
    if case.control.config.batching == "ragged" and _batch_is_free(case):
        batch_mates_do_not_matter(case.program, case.root, case.control, case.call, case.plan)


def _is_cheap(case: Case) -> bool:
    return sum(case.program.cost.price(case.call.flat()[0], {}, False).values()) < EXPENSIVE


def _batch_is_free(case: Case) -> bool:
    leaves = zip(case.program.dynamic, case.call.flat()[0], strict=True)
    return all(0 in free for free, leaf in leaves if isinstance(leaf, Tensor))


def _number(size: Any) -> int:
    return size if isinstance(size, int) else int(size.node.hint)


def _outputs(graph: fx.Graph) -> Sequence[Any]:
    output = next(n for n in graph.nodes if n.op == "output")
    return list(output.args[0])  # type: ignore[arg-type]


def compare(expected: Any, actual: Any) -> None:
    """Raise :class:`RewriteError` unless two output structures agree to float tolerance."""
    first, _ = pytree.tree_flatten(expected)
    second, _ = pytree.tree_flatten(actual)
    if len(first) != len(second) or type(expected) is not type(actual):
        raise RewriteError(
            f"the rewritten model returns {type(actual).__name__} with {len(second)} tensors, the original "
            f"{type(expected).__name__} with {len(first)}."
        )
    for position, (want, have) in enumerate(zip(first, second, strict=True)):
        if not isinstance(want, Tensor):
            continue
        if want.shape != have.shape:
            raise RewriteError(f"output {position} has shape {tuple(have.shape)} instead of {tuple(want.shape)}.")
        if not want.dtype.is_floating_point:
            if not torch.equal(want, have):
                raise RewriteError(f"output {position} differs from the original's.")
            continue
        scale = (
            want.detach().float().abs().nan_to_num(0, 0, 0).amax().clamp(min=1e-6) if want.numel() else torch.ones(())
        )
        error = ((want.float() - have.float()).abs() / scale).nan_to_num(0).amax() if want.numel() else torch.zeros(())
        if float(error) > RELATIVE.get(want.dtype, COARSE):
            raise RewriteError(
                f"with pruning off, output {position} differs from the original's by {float(error):.1e} of its scale. The "
                "rewritten graph would be wrong, so it is refused; please report the model."
            )


CHECKS: tuple[tuple[str, Callable[[Case], None]], ...] = (
    ("the graph is sound", graph_is_sound),
    ("pruning off equals the original", inactive_equals_original),
    ("pruning keeps output shapes", pruned_keeps_shapes),
    ("decisions hold", decisions_hold),
)


def verify(case: Case) -> None:
    """Run all checks; raises :class:`RewriteError`."""
    for name, check in CHECKS:
        try:
            check(case)
        except RewriteError:
            raise
        except Exception as error:
            raise RewriteError(f"the check '{name}' failed: {type(error).__name__}: {error}") from error
