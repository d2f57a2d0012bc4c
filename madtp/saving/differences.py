"""What differs between two configs, in words: :func:`differences`, for runs that resume."""

from __future__ import annotations

from collections.abc import Collection, Mapping

_SHOWN = 8
_LONGEST = 80


def differences(stored: Mapping[str, object], here: Mapping[str, object], free: Collection[str] = ()) -> str:
    """Return a phrase for each value that two configs do not share; "" where they agree.

    Args:
        stored: values in JSON form, with tables in tables.
        here: those of this run.
        free: dotted names of values that may differ.
    """
    there, own = _flat(stored), _flat(here)
    found = [
        f"{name} is {_shown(there, name)} there and {_shown(own, name)} here"
        for name in sorted({*there, *own} - set(free))
        if there.get(name) != own.get(name) or (name in there) != (name in own)
    ]
    more = [f"and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
    return "; ".join([*found[:_SHOWN], *more])


def _flat(config: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Return the values of nested tables by their dotted names."""
    flat: dict[str, object] = {}
    for name, value in config.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) and value else {f"{prefix}{name}": value}
    return flat


def _shown(values: Mapping[str, object], name: str) -> str:
    text = repr(values[name]) if name in values else "not set"
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."
