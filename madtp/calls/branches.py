"""What a program takes for granted: the answers of Python's ``if`` on tensors, checked while it runs.

Start at :func:`expect`, which the graph of such a program calls (``rewriters/capture/python_branches.py``). A call for which
Python would take another branch stops there, and another program, or the original, serves it.
"""

from __future__ import annotations

from torch import Tensor

from madtp.errors import MadtpError


class OtherBranch(MadtpError):
    """On these inputs the model's Python takes another branch than when the program was captured."""


def expect(holds: Tensor) -> None:
    """Stop unless Python would take the branch that was captured.

    Args:
        holds: the condition of the branch, one element.

    Raises:
        OtherBranch: the condition is false.
    """
    if not bool(holds):
        raise OtherBranch(
            "the model's Python goes another way on these inputs than it went when the program was captured."
        )
