"""Small models of transformers' classes: the default configuration of the class, shrunk, with random weights.

Start with :func:`build`. ``overrides.py`` holds what the names of fields cannot tell.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from zoo.small.overrides import BUILDERS, FIELDS
from zoo.small.shrink import sections, shrink

# Fields that are given to a class although it does not declare them; it derives all others itself.
_GIVEN = frozenset({"model_type", "out_features", "out_indices", "return_class_token"})


def has(name: str) -> bool:
    """Whether the installed release has a model class of that name."""
    import transformers

    return hasattr(getattr(transformers, name, None), "config_class")


def generates(name: str) -> bool:
    """Whether the installed release has a model class of that name that writes text."""
    import transformers

    kind = getattr(transformers, name, None)
    return isinstance(kind, type) and issubclass(kind, transformers.GenerationMixin)


def build(name: str) -> nn.Module:
    """Build the class of that name with a small configuration.

    Raises:
        LookupError: This release of transformers has no such class.
    """
    import transformers

    kind = getattr(transformers, name, None)
    if kind is None:
        raise LookupError(f"transformers {transformers.__version__} has no {name}.")
    model: nn.Module = kind(small_config(kind))
    return model


def small_config(kind: Any) -> Any:
    """Return the configuration that a class of transformers takes, made small."""
    config_class = kind.config_class
    builder = BUILDERS.get(config_class.__name__)
    if builder is not None:
        return builder()
    return config_class.from_dict(_merge(small_fields(config_class), FIELDS.get(kind.__name__, {})))


def small_fields(config_class: Any) -> dict[str, Any]:
    """Return the fields of the default configuration, made small."""
    return _linked(config_class, shrink(config_class().to_dict()))


def _linked(config_class: Any, fields: dict[str, Any]) -> dict[str, Any]:
    """The fields with what only their class can tell, those of nested configurations before those around them."""
    for name, general in getattr(config_class, "sub_configs", {}).items():
        nested = fields.get(name)
        if isinstance(nested, dict):
            fields[name] = _linked(_class_of(nested, general), nested)
    known = getattr(config_class, "__dataclass_fields__", fields)
    fields = {name: value for name, value in fields.items() if name in known or name in _GIVEN}
    turned = "mrope_section" in getattr(config_class, "ignore_keys_at_rope_validation", ())
    if turned and "rope_type" in (fields.get("rope_parameters") or {}):
        fields = _merge(fields, {"rope_parameters": {"mrope_section": sections(fields)}})
    return _merge(fields, FIELDS.get(config_class.__name__, {}))


def _class_of(fields: Mapping[str, Any], general: Any) -> Any:
    """The class of a nested configuration: that of its model type, where transformers has one."""
    import transformers

    kind = str(fields.get("model_type"))
    known = transformers.CONFIG_MAPPING  # which is filled on demand, so its `get` would find nothing
    return known[kind] if kind in known else general  # noqa: SIM401


def _merge(fields: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``fields`` with ``changes`` put in, nested dictionaries merged."""
    merged = dict(fields)
    for name, value in changes.items():
        known = merged.get(name)
        merged[name] = _merge(known, value) if isinstance(known, Mapping) and isinstance(value, Mapping) else value
    return merged
