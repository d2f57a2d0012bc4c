"""What tasks without a second stage share: :class:`OneStage`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from zoo.datasets.records import DataSet

Own = TypeVar("Own", bound="OneStage")


class OneStage:
    """A task whose one stage is itself.

    Attributes:
        data: Its samples.
    """

    data: DataSet[Any]

    @property
    def stages(self: Own) -> Sequence[Own]:
        return (self,)

    @property
    def ids(self) -> Sequence[str]:
        return [record.id for record in self.data.records]
