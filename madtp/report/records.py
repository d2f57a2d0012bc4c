"""What a rewrite found, did and saves, as data.

Start at :class:`RewriteReport`; ``str()`` of it is text (``text.py``), and notebooks show it as a page (``page.py``).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from madtp.errors import DataError

if TYPE_CHECKING:
    import networkx


@dataclass(frozen=True)
class SiteReport:
    """A site: a block behind whose attention tokens are pruned.

    Attributes:
        name: Module path of the block; a block that runs twice has a second site, named ``block#2``.
        modality: ``"image"``, ``"text"``, ``"joint"`` or ``"query"``.
        block_kind: Placement of the norm and kind of attention: ``"pre-norm self"`` or ``"post-norm self"``.
        layer: Number of the block in its stream, from 0.
        width: Number of channels C of the stream.
        tokens: Number of tokens N in front of the first site, on the example inputs.
        protected: Constant positions that always survive; negative ones count from the end.
        segments: Modalities that are pruned, each by itself, in a stream that several share.
    """

    name: str
    modality: str
    block_kind: str
    layer: int
    width: int
    tokens: int
    protected: tuple[int, ...]
    segments: tuple[str, ...] = ()


@dataclass(frozen=True)
class SiteBalance:
    """What a site costs and saves on one batch, on the device where it was measured.

    Attributes:
        site: Name of the site.
        cost: Seconds to score, select and merge its tokens.
        saving: Seconds that the next blocks would take for the tokens that it drops.
    """

    site: str
    cost: float
    saving: float

    @property
    def worthwhile(self) -> bool:
        """Whether it saves at least what it costs."""
        return self.saving >= self.cost


@dataclass(frozen=True)
class SiteTokens:
    """Tokens of a sample at a site, as means over the samples of a calibration.

    Attributes:
        site: Name of the site.
        before: Tokens in front of the first site of the stream, padding included.
        kept: Tokens behind this site, a merged one included.
    """

    site: str
    before: float
    kept: float

    @property
    def share(self) -> float:
        """Fraction of the tokens that is left."""
        return self.kept / self.before if self.before else 1.0


@dataclass(frozen=True, kw_only=True)
class Savings:
    """What pruning saves, measured on the batches of a calibration.

    Attributes:
        setting: Name of the setting that the calibration chose: ``"gain"``, ``"temperature"`` or ``"keep_ratio"``.
        value: Its value.
        samples: Number of samples.
        batches: Number of batches that they came in.
        dense_macs: Multiply-accumulates per sample without pruning.
        macs: The same with pruning. What choosing tokens takes is counted.
        deviation: Standard error of the fraction saved; None for too few batches.
        tokens: Tokens kept at each site that ran, in the order of the sites.
        dense_seconds: Time of all batches without pruning; None where time was not measured.
        seconds: The same with pruning.
    """

    setting: str
    value: float
    samples: int
    batches: int
    dense_macs: float
    macs: float
    deviation: float | None
    tokens: tuple[SiteTokens, ...]
    dense_seconds: float | None = None
    seconds: float | None = None

    @property
    def reduction(self) -> float:
        """Fraction of the dense multiply-accumulates that is saved."""
        return 1.0 - self.macs / self.dense_macs

    @property
    def time_reduction(self) -> float | None:
        """Fraction of the dense time that is saved; None where time was not measured."""
        if self.seconds is None or not self.dense_seconds:
            return None
        return 1.0 - self.seconds / self.dense_seconds


@dataclass(frozen=True)
class BlockReport:
    """An attention sublayer that was found.

    Attributes:
        path: Module path.
        kind: ``"self"`` or ``"cross"``.
        norm: ``"pre"`` or ``"post"``.
        stream: Index of the stream that its queries come from.
        source: Index of the stream that its keys come from; None if that is not a stream.
    """

    path: str
    kind: str
    norm: str
    stream: int
    source: int | None


@dataclass(frozen=True)
class StreamReport:
    """A residual stream: the chain of residual states of one token sequence.

    Attributes:
        index: Number of the stream in the report.
        modality: ``"image"``, ``"text"``, ``"joint"`` or ``"query"``.
        width: Number of channels C.
        special: Positions of learned tokens, such as the class token and registers.
        readouts: Where its tokens are read, in words.
        segments: Modalities of a stream that several share, in the order of its tokens.
    """

    index: int
    modality: str
    width: int
    special: tuple[int, ...]
    readouts: tuple[str, ...]
    segments: tuple[str, ...] = ()


@dataclass(frozen=True)
class RefusalReport:
    """A block that is not pruned.

    Attributes:
        block: Module path.
        node: Node of the graph; empty where a whole submodule is refused.
        reason: What stands in the way.
        help: What would help.
        by_policy: Whether it could be pruned, but is not unless the configuration asks for it, as the text of a
            language model.
    """

    block: str
    node: str
    reason: str
    help: str
    by_policy: bool = False


@dataclass(frozen=True)
class UnprunedCalls:
    """Calls that run as the original's; ``str()`` is a remark for :attr:`RewriteReport.notes`.

    Attributes:
        called: Path of the module that is called, the name of the model's class, or the name of a method.
        reason: Why no program serves these calls.
    """

    called: str
    reason: str

    def __str__(self) -> str:
        return f"calls of {self.called} that run unpruned: {self.reason}"


@dataclass
class RewriteReport:
    """What :func:`madtp.rewrite` found and did.

    Attributes:
        model: Name of the model's class.
        capture: ``"whole"``, or ``"regions"`` where only some submodules are rewritten.
        sites: Where tokens are pruned.
        refusals: Blocks that are not pruned, and why.
        blocks: All attention sublayers that were found.
        streams: All residual streams that were found.
        network: Streams and blocks as a directed graph: which stream feeds which block, which block which stream.
        seconds: Duration of the rewrite.
        regions: Module paths of the submodules that are rewritten, the first and the last one of blocks that the model calls
            one after the other; empty if the whole model is.
        per_image_regions: Those of ``regions`` whose images are computed one by one.
        pooling: Module paths of attention that condenses tokens into a class token or latents. It reads what is pruned
            and needs no site.
        notes: Remarks, such as on later calls that run unpruned.
        unpruned: The calls that run unpruned, as data; each is a remark in ``notes``, too.
        balances: What each site costs and saves in time; empty until :func:`madtp.calibrate` has measured it.
        parameters: Number of the original's own parameters.
        added_parameters: Number of those that pruning adds, such as alignment tokens.
        savings: What pruning saves on the batches of the last calibration; None before :func:`madtp.calibrate`.
        plan: The plan that was followed, in JSON types. ``madtp.Plan.from_dict(report.plan)`` makes one to edit, which
            ``madtp.rewrite(model, inputs, plan=...)`` follows.
    """

    model: str
    capture: str
    sites: list[SiteReport]
    refusals: list[RefusalReport]
    blocks: list[BlockReport]
    streams: list[StreamReport]
    network: networkx.DiGraph | None = None
    seconds: float = 0.0
    regions: tuple[str, ...] = ()
    per_image_regions: tuple[str, ...] = ()
    pooling: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)
    unpruned: list[UnprunedCalls] = field(default_factory=list)
    balances: list[SiteBalance] = field(default_factory=list)
    plan: dict[str, Any] = field(default_factory=dict)
    parameters: int = 0
    added_parameters: int = 0
    savings: Savings | None = None

    @property
    def apart(self) -> tuple[str, ...]:
        """Deprecated name of :attr:`per_image_regions`."""
        return self.per_image_regions

    def __str__(self) -> str:
        from madtp.report.text import report_text

        return report_text(self)

    def _repr_html_(self) -> str:
        """The report as a notebook shows it: HTML that loads nothing."""
        from madtp.report.page import report_html

        return report_html(self)

    def to_dict(self) -> dict[str, Any]:
        """The report in JSON types, without :attr:`network`; :meth:`from_dict` makes a report that prints the same."""
        kept = {one.name: getattr(self, one.name) for one in dataclasses.fields(self) if one.name != "network"}
        values: dict[str, Any] = json.loads(json.dumps(kept, default=dataclasses.asdict))
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RewriteReport:
        """Make a report of what :meth:`to_dict` gave. Its :attr:`network` is None.

        Raises:
            DataError: ``values`` is something else.
        """
        try:
            read = dict(values)
            for name, kind in _LISTS.items():
                read[name] = [kind(**_with_tuples(one)) for one in read[name]]
            if read["savings"] is not None:
                savings = _with_tuples(read["savings"])
                savings["tokens"] = tuple(SiteTokens(**one) for one in savings["tokens"])
                read["savings"] = Savings(**savings)
            return cls(**_with_tuples(read, besides=("notes", "plan", *_LISTS)))
        except (KeyError, TypeError) as error:
            raise DataError(
                f"this is not a report ({type(error).__name__}: {error}); pass what report.to_dict() of this release returns."
            ) from error


_LISTS: Mapping[str, type] = {
    "sites": SiteReport,
    "refusals": RefusalReport,
    "blocks": BlockReport,
    "streams": StreamReport,
    "unpruned": UnprunedCalls,
    "balances": SiteBalance,
}


def _with_tuples(values: Mapping[str, Any], besides: tuple[str, ...] = ()) -> dict[str, Any]:
    return {
        name: tuple(value) if isinstance(value, list) and name not in besides else value
        for name, value in values.items()
    }
