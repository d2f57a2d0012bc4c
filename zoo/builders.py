"""Models of the user's own code, named ``module:function``: :func:`build_own`.

The function takes no arguments and returns a model, or a pair of a model and its example inputs.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from madtp.errors import ConfigError, UnknownModelError
from zoo.suggestions import did_you_mean

_BUILDER = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
_LIBRARIES = ("hf", "timm", "open_clip", "zoo", "hf_hub")
"""What stands in front of the colon in names of other kinds."""


def names_builder(name: str) -> bool:
    """Whether a name has the form ``module:function``."""
    return _BUILDER.fullmatch(name) is not None and name.partition(":")[0] not in _LIBRARIES


def find_builder(name: str) -> Callable[[], object]:
    """Return the function behind ``module:function``.

    Raises:
        UnknownModelError: There is no such module or function.
        ConfigError: The module cannot be imported.
    """
    module_name, _, function = name.partition(":")
    module = import_own(module_name, UnknownModelError)
    made = getattr(module, function, None)
    if callable(made):
        return made  # type: ignore[no-any-return]
    known = [one for one, value in vars(module).items() if callable(value) and not one.startswith("_")]
    advice = did_you_mean(function, known, otherwise="Give a function that takes no arguments and returns the model.")
    raise UnknownModelError(f"the module {module_name!r} has no function {function!r}. {advice}")


def build_own(name: str) -> tuple[nn.Module, Mapping[str, Any] | tuple[Any, ...] | None]:
    """Call the function behind ``module:function``.

    Returns:
        The model in eval mode, and its example inputs; None where the function returns a model alone.

    Raises:
        UnknownModelError: There is no such module or function.
        ConfigError: The function fails, or returns something else.
    """
    build = find_builder(name)
    try:
        made = build()
    except Exception as error:
        raise ConfigError(f"{name} failed: {type(error).__name__}: {error}") from error
    model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module) or not (inputs is None or isinstance(inputs, (Mapping, tuple))):
        raise ConfigError(
            f"{name} returned {_described(made)}; it has to return an nn.Module, or a pair of one and its example inputs: a "
            "dict of keyword arguments or a tuple of positional ones."
        )
    return model.eval(), inputs


def import_own(name: str, missing: type[Exception] = ConfigError) -> Any:
    """Import a module of the user's.

    Args:
        name: Of the module.
        missing: The error where there is none of that name.

    Raises:
        ConfigError: The module cannot be imported.
    """
    unknown = (
        f"there is no module {name!r}. Give a module as `import` would, such as my_models for my_models.py in the folder that "
        "you are in."
    )
    if not all(part.isidentifier() for part in name.split(".")):
        raise missing(unknown)
    try:
        return importlib.import_module(name)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}."):
            raise missing(unknown) from error
        raise ConfigError(f"the module {name!r} cannot be imported: {type(error).__name__}: {error}") from error


def _described(made: object) -> str:
    if isinstance(made, tuple):
        return f"({', '.join(type(one).__name__ for one in made)})"
    return type(made).__name__
