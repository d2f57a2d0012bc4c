"""Rankings in a run of a model, such as the best positions by score: :class:`Rankings` records them, or repeats earlier ones.

What is ranked may tie up to rounding. Then two runs that differ by rounding choose different entries, and all that follows
differs by far more. Where a run repeats the order that another has found, its results can be compared, together with the scores
that were ranked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from madtp.calls.compare import relative_difference

aten = torch.ops.aten
RANKINGS = frozenset(
    (
        aten.topk.default,
        aten.sort.default,
        aten.sort.stable,
        aten.argsort.default,
        aten.argsort.stable,
        aten.max.dim,
        aten.min.dim,
        aten.argmax.default,
        aten.argmin.default,
        aten.median.dim,
        aten.nanmedian.dim,
        aten.kthvalue.default,
    )
)
"""Operations that return indices by scores; with the scores there, or alone."""


@dataclass(frozen=True)
class Ranking:
    """What one operation ranked.

    Attributes:
        operation: the operation.
        options: its other arguments.
        scores: what was ranked.
        indices: the order that was found.
    """

    operation: OpOverload
    options: tuple[tuple[str, object], ...]
    scores: Tensor
    indices: Tensor

    def is_like(self, other: Ranking) -> bool:
        """Whether the order that was found here may stand for that of ``other``."""
        return (
            self.operation is other.operation
            and self.options == other.options
            and self.scores.shape == other.scores.shape
            and self.indices.shape == other.indices.shape
        )


class Rankings(TorchDispatchMode):
    """Records how a run ranks. With rankings of an earlier run it repeats their order.

    The graph of a program may have left rankings out that nothing reads. So each ranking repeats the one among those like it
    whose scores are nearest; one that finds none goes by its own scores.

    Attributes:
        found: the rankings of this run, by its own scores.
        repeated: scores of this run by the number of the ranking that they repeat.
    """

    def __init__(self, earlier: Sequence[Ranking] = ()) -> None:
        TorchDispatchMode.__init__(self)
        self.found: list[Ranking] = []
        self.repeated: dict[int, Tensor] = {}
        self._earlier = earlier

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        result: Any = func(*args, **kwargs)
        if func not in RANKINGS or not args[0].is_floating_point() or not args[0].dim():
            return result
        names = (argument.name for argument in func._schema.arguments)
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        scores = given.pop("self")
        own = Ranking(func, tuple(given.items()), scores, result if isinstance(result, Tensor) else result[1])
        self.found.append(own)
        number = self._nearest(own)
        if number is None:
            return result
        self.repeated[number] = scores
        indices = self._earlier[number].indices
        return indices if isinstance(result, Tensor) else (_values(scores, indices, given.get("dim", -1)), indices)

    def _nearest(self, own: Ranking) -> int | None:
        """The number of the earlier ranking that ``own`` repeats."""
        errors = {
            number: relative_difference(one.scores, own.scores)
            for number, one in enumerate(self._earlier)
            if number not in self.repeated and one.is_like(own)
        }
        return min(errors, key=lambda number: errors[number], default=None)


def _values(scores: Tensor, indices: Tensor, dim: int) -> Tensor:
    """The scores at ``indices``, which lack ``dim`` where one entry of it was chosen."""
    if indices.dim() == scores.dim():
        return scores.gather(dim, indices)
    return scores.gather(dim, indices.unsqueeze(dim)).squeeze(dim)
