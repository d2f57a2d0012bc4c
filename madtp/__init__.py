"""madtp: token pruning for vision-language transformers that nobody prepared for it.

Start at :func:`rewrite`. docs/method.md holds the mathematics; the compiler lies in the package ``rewriters``, models and data in ``zoo``.
"""

from __future__ import annotations

from madtp.api import count_macs, rewrite
from madtp.config import PruningConfig
from madtp.errors import MadtpError
from madtp.pruned import PrunedModel

__version__ = "0.1.0"

__all__ = ["MadtpError", "PrunedModel", "PruningConfig", "__version__", "count_macs", "rewrite"]
