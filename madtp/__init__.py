"""madtp: token pruning for vision-language transformers that nobody prepared for it.

Start at :func:`rewrite`. docs/method.md holds the mathematics; the compiler lies in the package ``rewriters``, models
and data in ``zoo``. Names are imported when first used, so that the command line answers without waiting for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from madtp.api import Plan, count_macs, rewrite
    from madtp.config import PruningConfig
    from madtp.errors import MadtpError
    from madtp.pruned import PrunedModel
    from madtp.saving.checkpoint import load, save
    from madtp.saving.export import export
    from madtp.tuning.calibration import calibrate
    from madtp.tuning.freezing import freeze
    from madtp.tuning.teaching import teach

__version__ = "0.1.0"

__all__ = [
    "MadtpError",
    "Plan",
    "PrunedModel",
    "PruningConfig",
    "__version__",
    "calibrate",
    "count_macs",
    "export",
    "freeze",
    "load",
    "rewrite",
    "save",
    "teach",
]

_HOMES = {
    "calibrate": "madtp.tuning.calibration",
    "count_macs": "madtp.api",
    "export": "madtp.saving.export",
    "freeze": "madtp.tuning.freezing",
    "load": "madtp.saving.checkpoint",
    "save": "madtp.saving.checkpoint",
    "rewrite": "madtp.api",
    "teach": "madtp.tuning.teaching",
    "PruningConfig": "madtp.config",
    "MadtpError": "madtp.errors",
    "Plan": "madtp.api",
    "PrunedModel": "madtp.pruned",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'madtp' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
