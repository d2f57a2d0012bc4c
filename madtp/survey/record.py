"""The record of one architecture in a survey: :class:`Record`, a JSON object each.

:data:`OUTCOMES` lists the possible outcomes, from best to worst.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

OUTCOMES = {
    "rewritten": "every stream is pruned except text that a language model predicts, fewer attentions are refused than "
    "pruned, compute is saved, and every invariant holds",
    "partly": "every invariant holds, but a stream or training is refused, as many attentions are refused as pruned, or no "
    "compute is saved",
    "left alone": "nothing is pruned, by policy: the only candidate is text that a language model predicts",
    "refused": "nothing can be pruned; the reason is given",
    "no transformer": "the model has no attention over tokens, so refusing it is correct",
    "unbuildable": "the small model or its inputs cannot be built, or it does not run, so there is nothing to rewrite",
    "error": "an exception that is not a refusal, or no answer within the limits: a bug",
    "wrong": "an invariant fails: the worst outcome",
}

# How a model differs from a tower of blocks over all tokens of an image or a text, as its calls show.
TRAITS = {
    "language": "its only inputs are token ids, and each position predicts (causal text that nothing condenses)",
    "windows": "its attention runs over more sequences than its inputs hold images or texts",
    "hierarchy": "its only inputs are images, and from one attention to the next the number of queries falls to a quarter",
}

# Fields that a probe fills. A refusal whose block has such a name says why the probe did not run.
PROBED = ("identity", "reduction", "independence", "trains")

# Limits of errors relative to the output's scale, in float32: with pruning off, and of a sample alone against itself in a
# batch.
IDENTITY = 1e-5
INDEPENDENCE = 1e-3


@dataclass(frozen=True)
class RefusalRecord:
    """A block that was not pruned, and why.

    Attributes:
        block: path of the block; empty for the whole model.
        reason: why it was refused.
        help: what would help.
        by_policy: whether it was left alone because pruning it would change predictions.
    """

    block: str
    reason: str
    help: str = ""
    by_policy: bool = False


@dataclass(frozen=True)
class Record:
    """The outcome of one architecture. Errors are relative to the largest value of the output.

    Attributes:
        name: name in the survey.
        outcome: one of :data:`OUTCOMES`.
        kind: class of the model.
        parameters: number of parameters of the small model.
        capture: ``"whole"`` or ``"regions"``.
        blocks: number of attention sublayers by kind, such as ``"pre-norm self"``.
        streams: number of residual streams with self-attention, plus submodules that were refused as a whole.
        pruned: how many of them have a site.
        left: how many of them have none by policy.
        sites: number of pruning sites.
        refusals: what was not pruned or not measured.
        identity: largest error with pruning off; ``None`` if it was not measured.
        independence: largest error of a sample alone against itself in a batch; ``None`` if it was not measured.
        trains: whether the loss falls over ten steps.
        reduction: fraction of the multiply-accumulates that a strong setting saves.
        rewrite_seconds: duration of the rewrite.
        seconds: duration of everything.
        failure: what went wrong.
        traits: names out of :data:`TRAITS`; ``None`` in records of surveys that did not look for them.
    """

    name: str
    outcome: str
    kind: str = ""
    parameters: int = 0
    capture: str = ""
    blocks: Mapping[str, int] = dataclasses.field(default_factory=dict)
    streams: int = 0
    pruned: int = 0
    left: int = 0
    sites: int = 0
    refusals: tuple[RefusalRecord, ...] = ()
    identity: float | None = None
    independence: float | None = None
    trains: bool | None = None
    reduction: float | None = None
    rewrite_seconds: float = 0.0
    seconds: float = 0.0
    failure: str = ""
    traits: tuple[str, ...] | None = None

    def to_dict(self) -> dict[str, object]:
        """Return JSON values; the inverse of :meth:`from_dict`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Record:
        """Return the record of JSON values; fields of other versions are ignored."""
        fields = known_fields(cls, values)
        refusals = tuple(RefusalRecord(**refusal) for refusal in values.get("refusals", ()))
        if fields.get("traits") is not None:
            fields["traits"] = tuple(fields["traits"])
        return cls(**{**fields, "refusals": refusals})


def known_fields(kind: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that a dataclass has fields for; those of other versions are left out."""
    known = {field.name for field in dataclasses.fields(kind)}
    return {name: value for name, value in values.items() if name in known}


def with_outcome(record: Record) -> Record:
    """Decide between "rewritten" and "partly" for a model that passed every check.

    Fewer refusals than sites are allowed, unless one concerns training as a whole. A module that attends within one window
    after another counts as one attention.
    """
    refusals = [refusal for refusal in record.refusals if not refusal.by_policy]
    named = {(refusal.block, refusal.reason) for refusal in refusals if refusal.block}
    refused = len(named) + sum(not refusal.block for refusal in refusals)
    whole = (
        record.pruned + record.left == record.streams
        and refused < record.sites
        and not any(refusal.block in PROBED for refusal in record.refusals)
        and (record.reduction or 0.0) > 0
    )
    return dataclasses.replace(record, outcome="rewritten" if whole else "partly")
