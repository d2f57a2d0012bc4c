"""Attributes that the original's forward writes and programs do not: :class:`Unwritten` stands in them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from torch import nn

from madtp.errors import MadtpError

READ = (
    "{} is written by the original's forward, in whose place a program has run, which leaves no such values; what is read here "
    "would be that of another call. Return it from forward, or leave this part out of the rewrite (towers, layers)"
)


class Unwritten:
    """Stands in an attribute that a program has not written. Whoever reads values of it gets an error.

    Args:
        name: the attribute, by its path in the model.
    """

    def __init__(self, name: str) -> None:
        self.__dict__["name"] = name

    def _refuse(self, *args: object, **kwargs: object) -> NoReturn:
        raise MadtpError(READ.format(self.__dict__["name"]))

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)  # Python asks for these, such as those that copy
        self._refuse()

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> NoReturn:
        self._refuse()

    __getitem__ = __setitem__ = __iter__ = __len__ = __call__ = _refuse
    __add__ = __radd__ = __mul__ = __rmul__ = __sub__ = __rsub__ = __truediv__ = __matmul__ = _refuse

    def __bool__(self) -> bool:
        self._refuse()

    def __repr__(self) -> str:
        return f"<not written by programs: {self.__dict__['name']}>"


class UnwrittenAttributes:
    """The attributes of a model that programs do not write.

    Attributes:
        names: their names by the path of the module.
    """

    def __init__(self, names: Iterable[tuple[str, str]] = ()) -> None:
        self.names = tuple(names)

    def mark(self, host: nn.Module) -> None:
        """Put an :class:`Unwritten` into each, after a program has run."""
        for path, name in self.names:
            values = vars(host.get_submodule(path))
            if type(values.get(name)) is not Unwritten:
                values[name] = Unwritten(f"{path}.{name}".lstrip("."))
