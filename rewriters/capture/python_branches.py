"""Python branches on the value of a tensor, fixed to the outcome that they have on the example inputs.

Start at :func:`record_answers`. No graph can hold such an ``if``. The model is run once, and each answer is recorded by the
line of code that asks. Tracing then gives the same answers, and leaves a check of each in the graph. Only yes and no are
fixed: numbers that Python reads from tensors (sizes, lengths) differ from call to call.
"""

from __future__ import annotations

import os
import sys
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from madtp.calls.branches import expect
from madtp.calls.call import Call
from madtp.sites.preserved_state import trial_run

aten = torch.ops.aten
# What export would not write itself, so that its own assertions are told from these.
MARK = "the answer that Python got here when this was captured"
_OWN = (os.path.dirname(torch.__file__), __file__)

# File and line number.
Line = tuple[str, int]
Answers = Mapping[Line, tuple[bool, ...]]


class _RecordingAnswers(TorchFunctionMode):
    """Records every yes or no that Python asks of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.answers: dict[Line, list[bool]] = defaultdict(list)

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if _asks(func, args):
            self.answers[_asking_line()].append(bool(result))
        return result


class ReplayingAnswers(TorchFunctionMode):
    """Gives Python the recorded answers, line by line, and leaves a check of each in the graph."""

    def __init__(self, answers: Answers) -> None:
        super().__init__()
        self.remaining = {line: list(given) for line, given in answers.items()}

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        remaining = self.remaining.get(_asking_line()) if _asks(func, args) else None
        if not remaining:
            return func(*args, **(kwargs or {}))
        answer = remaining.pop(0)
        aten._assert_async.msg(args[0].ne(0) if answer else args[0].eq(0), MARK)
        return answer


def record_answers(model: nn.Module, call: Call) -> Answers:
    """The answers that the model's Python gets on ``call``; empty if it asks nothing."""
    with torch.no_grad(), trial_run(model, (call.args, call.kwargs)), _RecordingAnswers() as recording:
        model(*call.args, **call.kwargs)
    return {line: tuple(given) for line, given in recording.answers.items()}


def keep_checks(graph: fx.Graph) -> None:
    """Turn the checks of answers into calls of :func:`madtp.calls.branches.expect`, which survive."""
    for node in graph.nodes:
        if node.target is aten._assert_async.msg and node.args[1] == MARK:
            node.target, node.args = expect, node.args[:1]


def _asks(func: Any, args: tuple[Any, ...]) -> bool:
    name = getattr(func, "__name__", "")
    if not args or not isinstance(args[0], Tensor):
        return False
    return name == "__bool__" or (name == "item" and args[0].dtype == torch.bool)


def _asking_line() -> Line:
    """The line of the model's code that runs."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_OWN):
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno
