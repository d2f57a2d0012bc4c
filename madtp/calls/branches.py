"""What a program takes for granted: the answers of Python's ``if`` on tensors, checked while it runs.

Start at :func:`expect`, which the graph of such a program calls (``rewriters/capture/python_branches.py``). A call for which
Python would take another branch stops there, and another program, or the original, serves it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from madtp.calls.compiling import is_compiling
from madtp.errors import MadtpError

OTHER_WAY = "the model's Python goes another way on these inputs than it went when the program was captured."


class OtherBranch(MadtpError):
    """On these inputs the model's Python takes another branch than when the program was captured."""


def expect(holds: Tensor) -> None:
    """Stop unless Python would take the branch that was captured.

    Args:
        holds: the condition of the branch, one element.

    Raises:
        OtherBranch: the condition is false.
    """
    if is_compiling():  # a check that runs with the compiled graph
        torch._assert_async(holds, OTHER_WAY)
        return
    if not bool(holds):
        raise OtherBranch(OTHER_WAY)
