"""Submodules that choose rows by their values, such as sparse experts, but work row by row as a whole.

Start at :func:`find_rowwise`. No graph can hold a loop over the experts that were hit, or a split of sorted rows into groups
of any size. Such a submodule may stay as it is, one operation that works token by token, if each row of its results depends
on the same row of its operands alone. Experiments show that: among other rows, alone, and so many times that any capacity
overflows, a row must come out as before. They run in double precision with parameters moved at random, so that no branch
is silent because its gate is zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from madtp.calls.call import Call
from madtp.calls.fast_path import spelled_out
from madtp.cost.counting import Counter
from madtp.sites.preserved_state import trial_run
from rewriters.graph.node_record import RowwiseModule

aten = torch.ops.aten
# Operations that order rows by their values, or multiply groups of rows of any size.
SORTS = frozenset("sort argsort bincount histc _grouped_mm".split())
# So many submodules around the one that chooses rows are tried in its place.
MOST_ENCLOSING = 2
# Copies of one row: more than any capacity.
CROWD = 2048
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-4}
CONTAINERS = (tuple, list, dict)


@dataclass
class _Frame:
    """A call of a submodule that is at work.

    Attributes:
        path: Module path.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        chooses: Whether rows are chosen by value in it.
        attends: Whether there is a softmax or an attention in it.
    """

    path: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    chooses: bool = False
    attends: bool = False


class _DispatchMode(TorchDispatchMode):
    """A dispatch mode without options; torch gives its constructor no types."""

    if TYPE_CHECKING:

        def __init__(self) -> None: ...


class _CallRecorder(_DispatchMode):
    """Records the calls of submodules in which rows are chosen by value, with their results.

    Attributes:
        calls: The calls by module path.
        active: Calls at work, outermost first.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, list[tuple[_Frame, object]]] = {}
        self.active: list[_Frame] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if self.active and _chooses(func, args):
            for frame in self.active[-1 - MOST_ENCLOSING :]:
                frame.chooses = True
        if self.active and _attends(func):
            for frame in self.active:
                frame.attends = True
        return func(*args, **(kwargs or {}))

    def enter(self, path: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        """A hook that begins a call of the module at ``path``."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.active.append(_Frame(path, args, kwargs))

        return hook

    def leave(self, module: nn.Module, args: object, output: object) -> None:
        """A hook that ends the innermost call."""
        frame = self.active.pop()
        if frame.chooses:
            self.calls.setdefault(frame.path, []).append((frame, output))


def sorts(func: Any) -> bool:
    """Whether an operation orders rows by their values, counts them by value or works on groups of any size."""
    return getattr(getattr(func, "overloadpacket", None), "__name__", "") in SORTS


def _chooses(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether an operation that runs chooses rows by their values."""
    if func is aten.index.Tensor:
        return any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    return sorts(func) or torch.Tag.dynamic_output_shape in func.tags or torch.Tag.data_dependent_output in func.tags


def _attends(func: Any) -> bool:
    """Whether an operation is a softmax or an attention."""
    name = getattr(getattr(func, "overloadpacket", None), "__name__", "")
    return "softmax" in name or "scaled_dot_product" in name


def find_rowwise(model: nn.Module, call: Call) -> list[RowwiseModule]:
    """The smallest submodules of ``model`` that choose rows by their values in ``call``, but work row by row."""
    recorder = _CallRecorder()
    handles: list[RemovableHandle] = []
    for path, module in model.named_modules():
        if path:
            handles.append(module.register_forward_pre_hook(recorder.enter(path), with_kwargs=True))
            handles.append(module.register_forward_hook(recorder.leave, always_call=True))
    try:
        with (
            torch.no_grad(),
            spelled_out(),
            trial_run(model, (call.args, call.kwargs)),
            recorder,
        ):
            model(*call.args, **call.kwargs)
    finally:
        for handle in handles:
            handle.remove()
    modules: list[RowwiseModule] = []
    failed: set[type[nn.Module]] = set()
    for path in sorted(recorder.calls, key=lambda p: (-p.count("."), p)):
        module = model.get_submodule(path)
        if type(module) in failed or any(one.path.startswith(f"{path}.") for one in modules):
            continue
        rowwise = _rowwise(path, module, recorder.calls[path])
        if rowwise is None:
            failed.add(type(module))
        else:
            modules.append(rowwise)
    return modules


def _rowwise(path: str, module: nn.Module, calls: list[tuple[_Frame, object]]) -> RowwiseModule | None:
    """``module`` as its calls show it, if it works row by row; else None."""
    described = [_describe(path, frame, output) for frame, output in calls]
    first = described[0]
    if first is None or any(one != first for one in described):
        return None
    leaves = pytree.tree_leaves((calls[0][0].args, calls[0][0].kwargs))
    trial = _Trial(module, first, leaves)
    with torch.no_grad(), spelled_out(), trial_run(module, leaves):
        if not trial.rows_are_independent():
            return None
        with Counter(lambda: False) as counter:
            trial.run(leaves, dict(module.named_buffers()))
    operand = next(leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim() >= first.rank)
    return replace(first, macs=counter.total / max(1, operand.shape[: first.rank].numel()))


def _describe(path: str, frame: _Frame, output: object) -> RowwiseModule | None:
    """The module as a call shows it, not priced yet; None if the call is not of the form rows in, rows out."""
    if output is None or not isinstance(output, (Tensor, tuple, list)):
        return None
    returned = [output] if isinstance(output, Tensor) else list(output)
    results = [one for one in returned if isinstance(one, Tensor)]
    if not results or any(one is not None and not isinstance(one, Tensor) for one in returned):
        return None
    numbers = iter(range(len(results)))
    result_numbers = tuple(next(numbers) if isinstance(one, Tensor) else None for one in returned)
    rank = results[0].dim() - 1
    rows = results[0].shape[:rank]
    leaves, spec = pytree.tree_flatten((frame.args, frame.kwargs))
    operands = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    others = tuple((at, leaf) for at, leaf in enumerate(leaves) if not isinstance(leaf, Tensor))
    plain = all(leaf is None or isinstance(leaf, (bool, float, str)) for _, leaf in others)
    fits = rank > 0 and all(one.dim() >= rank and one.shape[:rank] == rows for one in results)
    along = all(one.dim() > 0 and one.shape[:rank] == rows[: one.dim()] for one in operands)
    whole = any(one.dim() > rank and one.is_floating_point() for one in operands)
    # A tower works sample by sample: it would hide its blocks. Gates of experts have a softmax, too, but each row is a vector.
    tower = frame.attends and any(one.dim() > rank + 1 and one.is_floating_point() for one in operands)
    if tower or not (plain and fits and along and whole and _is_built_of(spec)):
        return None
    forms = tuple((one.dtype, tuple(one.shape[rank:])) for one in results)
    return RowwiseModule(
        path=path,
        spec=spec,
        constants=others,
        rank=rank,
        results=forms,
        result_numbers=None if isinstance(output, Tensor) else result_numbers,
        macs=0.0,
    )


def _is_built_of(spec: pytree.TreeSpec) -> bool:
    """Whether arguments lie in Python's own containers, which a graph can hold."""
    return spec.is_leaf() or (spec.type in CONTAINERS and all(_is_built_of(child) for child in spec.children()))


class _WithoutRandomness(_DispatchMode):
    """Inside the block nothing is drawn at random: dropout keeps everything, noise is the number 1."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return result
        name = func.overloadpacket.__name__
        if name == "native_dropout":
            return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)
        return result.fill_(1) if isinstance(result, Tensor) else result


class _Trial:
    """Experiments with one submodule."""

    def __init__(self, module: nn.Module, form: RowwiseModule, leaves: list[object]) -> None:
        self.module, self.form, self.leaves = module, form, leaves
        self.buffers = frozenset(name for name, _ in module.named_buffers())
        self.generator = torch.Generator().manual_seed(0)

    def run(self, leaves: list[object], state: dict[str, Tensor]) -> list[Tensor]:
        """The results on a call with these leaves, with these parameters and buffers in place of the module's own."""
        args, kwargs = pytree.tree_unflatten(leaves, self.form.spec)
        state = {name: value.clone() if name in self.buffers else value for name, value in state.items()}
        output = torch.func.functional_call(self.module, state, args, kwargs)
        return [output] if isinstance(output, Tensor) else [one for one in output if one is not None]

    def rows_are_independent(self) -> bool:
        """Whether each row of the results depends on the same row of the operands alone."""
        for dtype, tolerance in TOLERANCES.items():
            try:
                return all(self._agree(dtype, tolerance, dim) for dim in range(self.form.rank))
            except Exception:  # the module does not take this type, or so many rows
                continue
        return False

    def _agree(self, dtype: torch.dtype, tolerance: float, dim: int) -> bool:
        state = self._moved(dtype)
        leaves = [_as_type(leaf, dtype) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        with _WithoutRandomness():
            whole = self.run(leaves, state)
            for rows, others in self._choices(whole[0], dim):
                chosen = [self._selected(leaf, dim, rows, others) for leaf in leaves]
                for before, after in zip(whole, self.run(chosen, state), strict=True):
                    wanted, found = before.index_select(dim, rows.to(before.device)), after.narrow(dim, 0, len(rows))
                    if not _close(wanted, found, tolerance):
                        return False
        return True

    def _choices(self, result: Tensor, dim: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows along ``dim`` to look at, and other rows to put behind them."""
        none, size = torch.zeros(0, dtype=torch.long), result.shape[dim]
        crowd = max(2, CROWD * size // result.shape[: self.form.rank].numel())
        order = torch.randperm(size, generator=self.generator)
        yield order, none
        yield order[: max(1, size // 2)].sort().values, none
        yield order, torch.randperm(size, generator=self.generator).repeat(3)
        for row in order[:2]:
            yield row[None], none
            yield row.repeat(crowd), none

    def _selected(self, leaf: object, dim: int, rows: Tensor, others: Tensor) -> object:
        """The chosen rows of an operand, and behind them others, scaled to other values."""
        if not isinstance(leaf, Tensor) or leaf.dim() <= dim:
            return leaf
        chosen, more = (leaf.index_select(dim, index.to(leaf.device)) for index in (rows, others))
        return torch.cat([chosen, more * 3 if leaf.is_floating_point() else more], dim)

    def _moved(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Parameters and buffers as ``dtype``, the parameters moved at random."""
        state = {name: _as_type(b, dtype) for name, b in self.module.named_buffers()}
        for name, parameter in self.module.named_parameters():
            value = _as_type(parameter.detach(), dtype)
            if value.is_floating_point():
                noise = torch.randn(value.shape, generator=self.generator, dtype=dtype).to(value.device)
                value = value + 0.05 * noise
            state[name] = value
        return state


def _as_type(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _close(wanted: Tensor, found: Tensor, tolerance: float) -> bool:
    if not wanted.is_floating_point():
        return torch.equal(wanted, found)
    scale = wanted.abs().max().clamp_min(1e-6)
    return bool(((wanted - found).abs().max() <= tolerance * scale).item())
