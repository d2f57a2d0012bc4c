"""The one description of how a model is pruned: :class:`PruningConfig`.

Every field is data (JSON round trip by `to_dict`/`from_dict`), checked on construction. The fields under "deviations"
each undo one fault of the authors' code; `PruningConfig.official()` selects the code's own behaviour everywhere.
docs/method.md holds the mathematics, docs/deviations.md the reasons.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from madtp.errors import ConfigError

Batching = Literal["ragged", "uniform", "static"]
Selection = Literal["threshold", "random", "class_attention"]
QueryProjection = Literal["differing", "always"]
Positions = tuple[tuple[str, tuple[int, ...]], ...]

MODALITIES = ("image", "text")


@dataclass(frozen=True, kw_only=True)
class PruningConfig:
    """How strongly, where and by which rules tokens are pruned.

    Strength:
        temperature: T of the threshold; 0 switches pruning off, larger prunes more.
        gain: factor on the threshold; 1 is the paper, towards 0 approaches the dense model.
    Where:
        towers: modalities that are pruned ("image", "text"), or None for all.
        protect: extra positions that are never pruned, per modality: `{"image": (0, 1)}`.
        min_tokens: tokens, protected ones not counted, that always survive at a site.
    How:
        batching: "ragged" keeps each sample's own tokens; "uniform" gives every sample the largest count of its batch;
            "static" uses counts fixed beforehand.
        alignment: False leaves the alignment tokens out: no second term, and the threshold is the mean importance.
        alignment_tokens: K, their number.
        alignment_width: d_e; None takes the width of the widest pruned stream.
        query_projection: where a linear layer maps a block's stream to the alignment tokens' width: where the widths are
            "differing", or "always" (as the authors' code has it for dual encoders).
        merge: dropped tokens become one token, their importance-weighted mean; False discards them.
        straight_through: lets gradients reach the threshold and the importance through a soft mask in training.
        selection: "threshold" is the method. Controls: "random" keeps random tokens, "class_attention" the best by the
            class token's attention alone; both as many as the method would keep, or `keep_ratio` of them.
        keep_ratio: fraction of a site's tokens that a control keeps, the same at every site; None takes the method's count.
        seed: of the alignment tokens' start values and of random selection.
    Deviations from the authors' code: the first literal of each field is ours, the second theirs (docs/deviations.md).

    Raises:
        ConfigError: a value is out of range, of the wrong type, or contradicts another.
    """

    temperature: float = 1.0
    gain: float = 1.0
    towers: tuple[str, ...] | None = None
    protect: Positions | Mapping[str, Iterable[int]] = ()
    min_tokens: int = 1
    batching: Batching = "ragged"
    alignment: bool = True
    alignment_tokens: int = 100
    alignment_width: int | None = None
    query_projection: QueryProjection = "differing"
    merge: bool = True
    straight_through: bool = False
    selection: Selection = "threshold"
    keep_ratio: float | None = None
    seed: int = 0

    guidance_score: Literal["softmax", "sum"] = "softmax"
    class_score: Literal["normalised", "raw"] = "normalised"
    padding: Literal["excluded", "scored"] = "excluded"
    order: Literal["position", "topk"] = "position"
    mask_order: Literal["tokens", "sorted"] = "tokens"
    merged_mask: Literal["any", "best"] = "any"
    readout: Literal["remapped", "original"] = "remapped"
    causal_mask: Literal["gathered", "cropped"] = "gathered"
    causal_class_row: Literal["readout", "first"] = "readout"
    cross_mask: Literal["applied", "ignored"] = "applied"

    def __post_init__(self) -> None:
        object.__setattr__(self, "protect", _positions(self.protect))
        object.__setattr__(self, "towers", _towers(self.towers))
        for name in ("temperature", "gain"):
            object.__setattr__(self, name, _number(name, getattr(self, name), low=0.0))
        for name, low in (("min_tokens", 0), ("alignment_tokens", 1), ("seed", 0)):
            _integer(name, getattr(self, name), low)
        if self.alignment_width is not None:
            _integer("alignment_width", self.alignment_width, 1)
        for name in ("alignment", "merge", "straight_through"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; allowed: True, False")
        for name, allowed in _choices().items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; allowed: {', '.join(map(repr, allowed))}")
        self._check_selection()

    def _check_selection(self) -> None:
        if self.keep_ratio is None:
            return
        if self.selection == "threshold":
            raise ConfigError(
                f"keep_ratio is {self.keep_ratio!r}, but selection='threshold' decides the counts itself; "
                "leave keep_ratio out, or choose selection='random' or 'class_attention'"
            )
        ratio = _number("keep_ratio", self.keep_ratio, low=0.0)
        if not 0.0 < ratio <= 1.0:
            raise ConfigError(f"keep_ratio is {ratio}; allowed: above 0, at most 1")
        object.__setattr__(self, "keep_ratio", ratio)

    @classmethod
    def official(cls, *, temperature: float = 1.0) -> PruningConfig:
        """The behaviour of the authors' code in every respect that docs/deviations.md lists."""
        return cls(
            temperature=temperature,
            batching="uniform",
            guidance_score="sum",
            class_score="raw",
            padding="scored",
            order="topk",
            mask_order="sorted",
            merged_mask="best",
            readout="original",
            causal_mask="cropped",
            causal_class_row="first",
            cross_mask="ignored",
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` takes them back."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["towers"] = None if self.towers is None else list(self.towers)
        values["protect"] = {name: list(positions) for name, positions in typing.cast(Positions, self.protect)}
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PruningConfig:
        """Inverse of `to_dict`; fields left out take their default, unknown ones raise ConfigError."""
        if not isinstance(values, Mapping):
            raise ConfigError(f"a configuration is a mapping of field names to values; got {type(values).__name__}")
        names = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in names:
                near = difflib.get_close_matches(str(key), names, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known fields: {', '.join(names)}"
                raise ConfigError(f"unknown field {key!r} in the pruning configuration; {hint}")
        return cls(**dict(values))

    def protecting(self, further: Mapping[str, Iterable[int]]) -> PruningConfig:
        """This configuration with further protected positions by modality."""
        own = dict(typing.cast(Positions, self.protect))
        joined = {name: (*own.get(name, ()), *further.get(name, ())) for name in (*own, *further)}
        return dataclasses.replace(self, protect={name: tuple(dict.fromkeys(p)) for name, p in joined.items()})

    def protected_positions(self, modality: str) -> tuple[int, ...]:
        """Extra protected positions of one modality."""
        return dict(typing.cast(Positions, self.protect)).get(modality, ())

    def prunes(self, modality: str) -> bool:
        """Whether streams of this modality are pruned."""
        return self.towers is None or modality in self.towers


def _choices() -> dict[str, tuple[str, ...]]:
    hints = typing.get_type_hints(PruningConfig)
    return {name: typing.get_args(hint) for name, hint in hints.items() if typing.get_origin(hint) is Literal}


def _number(name: str, value: object, *, low: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < low:
        raise ConfigError(f"{name} is {value!r}; allowed: a finite number, at least {low:g}")
    return float(value)


def _integer(name: str, value: object, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ConfigError(f"{name} is {value!r}; allowed: a whole number, at least {low}")


def _towers(towers: object) -> tuple[str, ...] | None:
    if towers is None:
        return None
    if isinstance(towers, str) or not isinstance(towers, Iterable):
        raise ConfigError(f"towers is {towers!r}; allowed: None for all, or a tuple out of {MODALITIES}")
    names = tuple(towers)
    for name in names:
        if name not in MODALITIES:
            raise ConfigError(f"towers names {name!r}; allowed: {', '.join(map(repr, MODALITIES))}")
    if not names or len(set(names)) != len(names):
        raise ConfigError(f"towers is {names!r}; name each tower once, and at least one (temperature=0 prunes nothing)")
    return names


def _positions(protect: object) -> Positions:
    if isinstance(protect, Mapping):
        pairs = list(protect.items())
    elif isinstance(protect, (tuple, list)) and all(isinstance(p, (tuple, list)) and len(p) == 2 for p in protect):
        pairs = [tuple(p) for p in protect]
    else:
        raise ConfigError(f"protect is {protect!r}; allowed: a mapping such as {{'image': (0, 1)}}")
    result: dict[str, tuple[int, ...]] = {}
    for modality, positions in pairs:
        if modality not in MODALITIES:
            raise ConfigError(f"protect names {modality!r}; allowed: {', '.join(map(repr, MODALITIES))}")
        if isinstance(positions, str) or not isinstance(positions, Iterable):
            raise ConfigError(f"protect[{modality!r}] is {positions!r}; allowed: whole numbers, such as (0, 1)")
        indices = tuple(positions)
        for index in indices:
            _integer(f"protect[{modality!r}]", index, 0)
        result[modality] = tuple(sorted(set(indices)))
    return tuple(sorted(result.items()))
