"""What the plan says about a pruning site: :class:`SiteSpec`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SegmentSpec:
    """A segment of a stream that several modalities share.

    Attributes:
        modality: "image" or "text".
        pruned: whether its tokens are pruned.
        protected: positions in the segment that are never pruned.
    """

    modality: str
    pruned: bool
    protected: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class SiteSpec:
    """A pruning site, as the plan describes it.

    Attributes:
        name: unique name of the site.
        modality: modality of its stream.
        width: C, the width of its stream.
        class_position: position of the class token. None if there is none, or if the graph computes it.
        protected: positions that are never pruned.
        causal: tokens see only earlier ones.
        segments: segments of a stream that several modalities share, in the order of their numbers.
        keeps_last: the last token of each sample that is not padding is never pruned, and stands in for the class token.
    """

    name: str
    modality: str
    width: int
    class_position: int | None
    protected: tuple[int, ...]
    causal: bool
    segments: tuple[SegmentSpec, ...] = ()
    keeps_last: bool = False

    @property
    def leading(self) -> int | None:
        """P if the first P tokens are protected and no others, as a leading class token is; None elsewhere."""
        count = len(self.protected)
        at_front = set(self.protected) == set(range(count)) and not self.segments and not self.keeps_last
        return count if at_front else None
