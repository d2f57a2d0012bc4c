"""Which precision a device trains fastest in: :func:`precision_on`."""

from __future__ import annotations

import torch


def precision_on(device: torch.device, wanted: str) -> str:
    """What "auto" means on a device; what else is wanted is returned as it is.

    On CPUs without AMX, bfloat16 takes twice as long as float32: only tile instructions make it worth while.

    Args:
        device: that trains.
        wanted: "auto", "float32" or "bfloat16".
    """
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and _has_tiles()
    return "bfloat16" if fast else "float32"


def _has_tiles() -> bool:
    asked = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return asked is not None and bool(asked())
