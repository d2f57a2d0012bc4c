"""Small models of transformers' classes: the default configuration of the class, shrunk, with random weights.

Start at :func:`build`. What field names cannot tell stands in `overrides.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from zoo.small.overrides import BUILDERS, FIELDS
from zoo.small.shrink import shrink


def has(name: str) -> bool:
    """Whether the installed release has a model class of that name."""
    import transformers

    return hasattr(getattr(transformers, name, None), "config_class")


def build(name: str) -> nn.Module:
    """The class of that name with a small configuration.

    Raises:
        LookupError: this release of transformers has no such class.
    """
    import transformers

    kind = getattr(transformers, name, None)
    if kind is None:
        raise LookupError(f"transformers {transformers.__version__} has no {name}.")
    return kind(small_config(kind))


def small_config(kind: Any) -> Any:
    """The configuration that a class of transformers takes, made small."""
    config_class = kind.config_class
    builder = BUILDERS.get(config_class.__name__)
    if builder is not None:
        return builder()
    return config_class.from_dict(_merge(small_fields(config_class), FIELDS.get(kind.__name__, {})))


def small_fields(config_class: Any) -> dict[str, Any]:
    """The fields of the default configuration, made small."""
    return _merge(shrink(config_class().to_dict()), FIELDS.get(config_class.__name__, {}))


def _merge(fields: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`fields` with `changes` put in, nested dictionaries merged."""
    merged = dict(fields)
    for name, value in changes.items():
        known = merged.get(name)
        merged[name] = _merge(known, value) if isinstance(known, Mapping) and isinstance(value, Mapping) else value
    return merged
