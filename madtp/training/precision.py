"""The precision in which a device trains fastest: :func:`precision_on`."""

from __future__ import annotations

import torch


def precision_on(device: torch.device, wanted: str) -> str:
    """Resolve ``"auto"`` for a device; other values are returned unchanged.

    A CPU that has to emulate products in bfloat16 takes twice as long as in float32; one with AMX or AVX512_BF16 is several
    times as fast.

    Args:
        device: the device that trains.
        wanted: ``"auto"``, ``"float32"`` or ``"bfloat16"``.

    Returns:
        ``"float32"`` or ``"bfloat16"``.
    """
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and _multiplies_bfloat16()
    return "bfloat16" if fast else "float32"


def _multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for products in bfloat16."""
    asked = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return any(has() for has in asked if has is not None)
