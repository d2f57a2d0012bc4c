"""Whether a module's forward reads what an earlier call has left in an attribute: :func:`reads_earlier`.

Keys and values that a module keeps for the next token are read that way; an attention map that is kept for people to look at is
not. A later call may do what no call has shown, so this follows the source of ``forward`` and of the methods that it calls.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterable
from functools import cache
from typing import TypeGuard

from torch import nn

_CHANGES = frozenset({"append", "extend", "insert", "clear", "update"})
"""Methods that change a container without telling what it held."""
_DEEPEST = 8
"""Methods that call each other are followed so far."""


def reads_earlier(module: nn.Module, name: str) -> bool:
    """Whether ``module.forward`` may read the attribute ``name`` before it has set it.

    True also where the source is not to be had.
    """
    try:
        return _Reads(type(module), name).in_method("forward", set(), 0)
    except (OSError, TypeError, SyntaxError):
        return True


class _Reads:
    """Follows one attribute of ``self`` through the methods of a class."""

    def __init__(self, cls: type, name: str) -> None:
        self.cls, self.name = cls, name

    def in_method(self, method: str, known: set[str], depth: int) -> bool:
        """Whether a method reads the attribute; adds it to ``known`` where the method sets it in any case."""
        found = inspect.getattr_static(self.cls, method)
        function = inspect.unwrap(found.fget if isinstance(found, property) and found.fget else found)
        return self._in_statements(_body_of(function), known, depth)

    def _in_statements(self, statements: Iterable[ast.stmt], known: set[str], depth: int) -> bool:
        return any(self._in_statement(one, known, depth) for one in statements)

    def _in_statement(self, statement: ast.stmt, known: set[str], depth: int) -> bool:
        match statement:
            case ast.Assign(targets=targets, value=value):
                return self._assigns(targets, value, known, depth)
            case ast.AnnAssign(target=target, value=ast.expr() as value):
                return self._assigns([target], value, known, depth)
            case ast.AugAssign(target=target, value=value):
                return (self._reads(target) and self.name not in known) or self._in_expression(value, known, depth)
            case ast.If(test=test, body=body, orelse=orelse):
                found = self._in_expression(test, known, depth)
                first, second = set(known), set(known)
                found |= self._in_statements(body, first, depth) | self._in_statements(orelse, second, depth)
                known |= first & second
                return found
            case ast.Match(subject=subject, cases=cases):
                found = self._in_expression(subject, known, depth)
                return any(self._in_statements(one.body, set(known), depth) for one in cases) or found
            case ast.With(items=items, body=body):
                found = any(self._in_expression(one.context_expr, known, depth) for one in items)
                return self._in_statements(body, known, depth) or found
            case ast.FunctionDef() | ast.ClassDef() | ast.AsyncFunctionDef():
                return self._in_statements(statement.body, set(known), depth)
        # What a loop or a try sets may not be set: only reads count.
        inner = [block for block in ("body", "orelse", "finalbody") if getattr(statement, block, None)]
        own = [value for value in ast.iter_child_nodes(statement) if isinstance(value, ast.expr)]
        found = any(self._in_expression(value, known, depth) for value in own)
        found |= any(self._in_statements(getattr(statement, block), set(known), depth) for block in inner)
        handlers = [one for one in ast.iter_child_nodes(statement) if isinstance(one, ast.ExceptHandler)]
        return found | any(self._in_statements(one.body, set(known), depth) for one in handlers)

    def _assigns(self, targets: Iterable[ast.expr], value: ast.expr, known: set[str], depth: int) -> bool:
        found = self._in_expression(value, known, depth)
        for target in targets:
            for place in target.elts if isinstance(target, (ast.Tuple, ast.List)) else [target]:
                inside = place
                while isinstance(inside, ast.Subscript):
                    found |= self._in_expression(inside.slice, known, depth)
                    inside = inside.value
                # An entry that is set says nothing of the others.
                if inside is place and self._reads(place) and _is_self(place.value):
                    known.add(self.name)
        return found

    def _in_expression(self, expression: ast.expr, known: set[str], depth: int) -> bool:
        """Whether an expression reads the attribute, in the methods that it calls, too."""
        found, changed = (
            False,
            [
                node.func.value
                for node in ast.walk(expression)
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _CHANGES
            ],
        )
        for node in ast.walk(expression):
            if self._reads(node) and node not in changed:
                found |= self.name not in known
            if isinstance(node, ast.Call) and _is_getattr(node, self.name):
                found |= self.name not in known
            method = _called_on_self(node)
            if method is not None and depth < _DEEPEST and _is_method(self.cls, method):
                found |= self.in_method(method, known, depth + 1)
        return found

    def _reads(self, node: ast.AST) -> TypeGuard[ast.Attribute]:
        """Whether this is the attribute, of ``self`` or of whatever else."""
        return isinstance(node, ast.Attribute) and node.attr == self.name


@cache
def _body_of(function: Callable[..., object]) -> list[ast.stmt]:
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    (found,) = tree.body
    if not isinstance(found, ast.FunctionDef):
        raise TypeError(f"{function} is no method")
    return found.body


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def _is_getattr(call: ast.Call, name: str) -> bool:
    given = [one.value for one in call.args if isinstance(one, ast.Constant)]
    return isinstance(call.func, ast.Name) and call.func.id == "getattr" and name in given


def _called_on_self(node: ast.AST) -> str | None:
    """The name of the method that is called, or of the property that is read, on ``self`` or ``super()``."""
    if not isinstance(node, ast.Attribute):
        return None
    on = node.value
    is_super = isinstance(on, ast.Call) and isinstance(on.func, ast.Name) and on.func.id == "super"
    return node.attr if is_super or (isinstance(on, ast.Name) and on.id == "self") else None


def _is_method(cls: type, name: str) -> bool:
    """Whether the model has a method, or a property, of that name."""
    found = inspect.getattr_static(cls, name, None)
    return (callable(found) or isinstance(found, property)) and found is not inspect.getattr_static(
        nn.Module, name, None
    )
