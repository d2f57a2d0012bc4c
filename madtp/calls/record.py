"""A call of a model as JSON: enough to make another call like it, without the inputs themselves.

Start at :func:`record_call` and :func:`replay_call`. A saved model is rewritten again when it is loaded, and a rewrite needs a
call. Of integers the values matter (token ids, masks), so they are recorded; of images and the like only shape, mean and
standard deviation are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from madtp.calls.call import Call
from madtp.errors import ExampleInputsError
from madtp.files.limits import count

Record: TypeAlias = Mapping[str, Any]
"""A value as JSON: an object of one key, which says what kind of value it is."""

# Largest number of elements up to which values are recorded.
KEPT = 16384  # integers and booleans
KEPT_FLOATS = 256


def record_call(call: Call) -> dict[str, Any]:
    """Return the call as JSON values."""
    return {"args": [_record(a) for a in call.args], "kwargs": {k: _record(v) for k, v in call.kwargs.items()}}


def replay_call(recorded: Record) -> Call:
    """Return a call like the recorded one; the same record gives the same call.

    Raises:
        ExampleInputsError: the record is malformed, or stands for an object that JSON cannot hold.
    """
    generator = torch.Generator().manual_seed(0)
    try:
        args = tuple(_replay(a, generator) for a in recorded["args"])
        return Call(args, {str(k): _replay(v, generator) for k, v in recorded["kwargs"].items()})
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError, OverflowError) as error:
        raise ExampleInputsError(f"the recorded example call is malformed: {type(error).__name__}: {error}") from error


def recorded_bytes(recorded: Record) -> int:
    """Return how much memory the tensors of a recorded call take, without making them.

    Raises:
        ValueError: the record is malformed.
    """
    total, waiting = 0, [recorded]
    while waiting:
        one = waiting.pop()
        if isinstance(one, Mapping):
            if isinstance(one.get("tensor"), Mapping):
                total += _tensor_bytes(one["tensor"])
            waiting.extend(one.values())
        elif isinstance(one, list):
            waiting.extend(item for item in one if isinstance(item, Mapping | list))
    return total


def _tensor_bytes(recorded: Record) -> int:
    shape, dtype = recorded.get("shape"), getattr(torch, str(recorded.get("dtype")), None)
    if not isinstance(shape, list) or not isinstance(dtype, torch.dtype):
        raise ValueError(f"a recorded tensor has the shape {shape!r} and the dtype {dtype!r}")
    return math.prod(count(size, "a size") for size in shape) * dtype.itemsize


def _record(value: object) -> Record:
    if isinstance(value, Tensor):
        return {"tensor": _record_tensor(value.detach().cpu())}
    if value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value)):
        return {"value": value}
    if type(value) is tuple:
        return {"tuple": [_record(v) for v in value]}
    if type(value) is list:
        return {"list": [_record(v) for v in value]}
    if type(value) is dict and all(isinstance(k, str) for k in value):
        return {"dict": {k: _record(v) for k, v in value.items()}}
    return {"object": f"{type(value).__module__}.{type(value).__qualname__}"}


def _record_tensor(value: Tensor) -> Record:
    recorded: dict[str, object] = {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    if value.is_complex():
        return recorded
    if not value.is_floating_point():
        if value.numel() <= KEPT:
            return {**recorded, "values": value.flatten().tolist()}
        return {**recorded, "low": int(value.min()), "high": int(value.max())}
    wide = value.double()
    if not bool(wide.isfinite().all()):
        return recorded
    if value.numel() <= KEPT_FLOATS:
        return {**recorded, "values": wide.flatten().tolist()}
    return {**recorded, "mean": float(wide.mean()), "spread": float(wide.std())}


def _replay(recorded: Record, generator: torch.Generator) -> object:
    ((kind, content),) = recorded.items()
    if kind == "value":
        if content is not None and not isinstance(content, (bool, int, float, str)):
            raise TypeError(f"a value is a {type(content).__name__}")
        return content
    if kind == "tensor":
        return _replay_tensor(content, generator)
    if kind in ("tuple", "list"):
        items = [_replay(c, generator) for c in content]
        return tuple(items) if kind == "tuple" else items
    if kind == "dict":
        return {k: _replay(v, generator) for k, v in content.items()}
    if kind == "object":
        raise ExampleInputsError(f"the example call holds a {content}, which cannot be stored; pass example_inputs.")
    raise ValueError(f"unknown kind {kind!r}")


def _replay_tensor(recorded: Record, generator: torch.Generator) -> Tensor:
    dtype = getattr(torch, recorded["dtype"])
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{recorded['dtype']!r} is not a dtype")
    shape = recorded["shape"]
    if "values" in recorded:
        return torch.tensor(recorded["values"], dtype=dtype).reshape(shape)
    if "low" in recorded:
        made = torch.randint(recorded["low"], recorded["high"] + 1, shape, generator=generator)
        return made.to(dtype)
    deviation, mean = float(recorded.get("spread", 1.0)), float(recorded.get("mean", 0.0))
    return (torch.randn(shape, generator=generator) * deviation + mean).to(dtype)
