"""Random vision-language transformers, written in the many ways that people write them.

Start at :class:`~random_vlts.design.Design`, which describes one; :func:`build` makes the module and :func:`inputs` its inputs.
``checks.py`` holds what must be true of each once it is rewritten, ``masked_oracle.py`` what the pruned model must compute, and
``python -m random_vlts --help`` (in the folder ``tests``) draws by the thousand.
"""

from random_vlts.design import Blocks, Design, designs, draw
from random_vlts.models import build, inputs

__all__ = ["Blocks", "Design", "build", "designs", "draw", "inputs"]
