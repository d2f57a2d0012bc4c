"""madtp: token pruning for vision-language transformers that nobody prepared for it.

Start at :func:`rewrite`. docs/method.md holds the mathematics; the compiler lies in the package ``rewriters``, models
and data in ``zoo``. Names are imported when first used, so that the command line answers without waiting for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from madtp.api import count_macs, rewrite
    from madtp.calibration import calibrate
    from madtp.checkpoint import load, save
    from madtp.config import PruningConfig
    from madtp.errors import MadtpError
    from madtp.freezing import freeze
    from madtp.pruned import PrunedModel
    from madtp.teaching import teach

__version__ = "0.1.0"

__all__ = [
    "MadtpError",
    "PrunedModel",
    "PruningConfig",
    "__version__",
    "calibrate",
    "count_macs",
    "freeze",
    "load",
    "rewrite",
    "save",
    "teach",
]

_HOMES = {
    "calibrate": "madtp.calibration",
    "count_macs": "madtp.api",
    "freeze": "madtp.freezing",
    "load": "madtp.checkpoint",
    "save": "madtp.checkpoint",
    "rewrite": "madtp.api",
    "teach": "madtp.teaching",
    "PruningConfig": "madtp.config",
    "MadtpError": "madtp.errors",
    "PrunedModel": "madtp.pruned",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'madtp' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
