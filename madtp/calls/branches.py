"""What a program took for granted: the answers of Python's ``if`` on tensors, checked while it runs.

Start at :func:`expect`, which the graph of such a program calls (see ``rewriters/capture/python_branches.py``). A call in which
Python would have gone another way stops there, and another program, or the original, serves it.
"""

from __future__ import annotations

from torch import Tensor

from madtp.errors import MadtpError


class OtherBranch(MadtpError):
    """On these inputs the model's Python goes another way than when the program was captured."""


def expect(holds: Tensor) -> None:
    """Stop unless the answer is what it was when the program was captured.

    Raises:
        OtherBranch: it is not.
    """
    if not bool(holds):
        raise OtherBranch(
            "the model's Python goes another way on these inputs than it went when the program was captured."
        )
