"""What a survey writes down of one architecture: :class:`Record`, one JSON object each.

`OUTCOMES` lists what can become of a model, from best to worst.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

OUTCOMES = {
    "rewritten": "every stream is pruned but text that a language model predicts, hardly an attention is refused, compute is "
    "saved, and every invariant holds",
    "partly": "every invariant holds, but a stream, half the attentions or training is refused, or nothing is saved",
    "left alone": "nothing is pruned as a matter of policy: all it could be is text that a language model predicts",
    "refused": "nothing can be pruned; the reason is given",
    "no transformer": "the model has no attention over tokens; it is refused, as it should be",
    "unbuildable": "the small model or its inputs cannot be made, or it does not run: nothing to rewrite",
    "error": "an exception that is no refusal, or no answer within the limits: a bug",
    "wrong": "an invariant fails: the worst",
}

# What sets a model apart from a tower of blocks over all tokens of an image or a text, as it was seen in its calls.
TRAITS = {
    "language": "it is given token ids alone, and each position predicts (causal text that nothing condenses)",
    "windows": "its attention runs over more sequences than it is given images or texts",
    "hierarchy": "it is given images alone, and from one attention to the next the queries fall to a quarter",
}

# Fields that a probe fills; a probe that is refused is a refusal of that name.
PROBED = ("identity", "reduction", "independence", "trains")

# Relative to the output's scale, in float32: with pruning off; and of a sample alone against itself in a batch.
IDENTITY = 1e-5
INDEPENDENCE = 1e-3


@dataclass(frozen=True)
class Refusal:
    """A block, or the whole model, that is left alone, and why. by_policy: as pruning it would change predictions."""

    block: str
    reason: str
    help: str = ""
    by_policy: bool = False


@dataclass(frozen=True)
class Record:
    """What became of one architecture. Errors are relative to the largest value of the output.

    Attributes:
        kind: class of the model. parameters, nodes: of the small model and of its graph.
        capture: "whole" or "regions". blocks: attention sublayers found, by kind ("pre-norm self").
        streams: residual streams with self-attention, and submodules that were refused as a whole; pruned: those of them with
            a site; left: those without by policy.
        identity, independence: largest errors; None where it was not measured. trains: the loss falls over ten steps.
        reduction: fraction of multiply-accumulates saved at a strong setting.
        seconds: of the rewrite, and of everything. failure: text of what went wrong.
        traits: out of :data:`TRAITS`; None in records of surveys that did not look for them.
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
    refusals: tuple[Refusal, ...] = ()
    identity: float | None = None
    independence: float | None = None
    trains: bool | None = None
    reduction: float | None = None
    rewrite_seconds: float = 0.0
    seconds: float = 0.0
    failure: str = ""
    traits: tuple[str, ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; :meth:`from_dict` takes them back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Record:
        """Inverse of :meth:`to_dict`; fields of other versions are ignored."""
        known = {field.name for field in dataclasses.fields(cls)}
        fields = {name: value for name, value in values.items() if name in known}
        refusals = tuple(Refusal(**refusal) for refusal in values.get("refusals", ()))
        if fields.get("traits") is not None:
            fields["traits"] = tuple(fields["traits"])
        return cls(**{**fields, "refusals": refusals})


def judged(record: Record) -> Record:
    """The record of a model that was rewritten and passed, called partly done where much of it was not.

    Some refusals are allowed: fewer than there are sites. One that concerns the whole of training is not. A module that attends
    within one window after the other is one attention.
    """
    refused = {
        (r.block, r.reason) if r.block else (number,) for number, r in enumerate(record.refusals) if not r.by_policy
    }
    whole = (
        record.pruned + record.left == record.streams
        and len(refused) < record.sites
        and not any(refusal.block in PROBED for refusal in record.refusals)
        and (record.reduction or 0.0) > 0
    )
    return dataclasses.replace(record, outcome="rewritten" if whole else "partly")
