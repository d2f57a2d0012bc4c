"""The one description of how a model is pruned: :class:`PruningConfig`.

Every field is data, which is checked on construction and goes to JSON and back by :meth:`PruningConfig.to_dict` and
:meth:`PruningConfig.from_dict`. docs/method.md holds the mathematics. docs/deviations.md gives the reasons for the fields in
which this implementation deviates from the authors' code.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from madtp.errors import ConfigError

Batching = Literal["ragged", "uniform", "static"]
Selection = Literal[
    "threshold",
    "distinct",
    "random",
    "class_attention",
    "class_token_attention",
    "last_token_attention",
    "diversity",
    "conditional_diversity",
]
RULES = ("class_token_attention", "last_token_attention", "diversity", "conditional_diversity")
"""Selections of methods that need no training. They keep a share of the tokens, ``keep_ratio``."""
REGISTERED: set[str] = set()
"""Names of further rules, those of scorers that :func:`madtp.method.parts.register_scorer` has added."""
QueryProjection = Literal["differing", "always"]
Positions = tuple[tuple[str, tuple[int, ...]], ...]
Layers = tuple[tuple[str, tuple[int, ...]], ...]

MODALITIES = ("image", "text")
_LARGEST = 2**63 - 1
# Parameters of this size are allocated before anything else could tell that it is absurd.
_WIDEST = 2**16


@dataclass(frozen=True, kw_only=True)
class PruningConfig:
    """How strongly, where and by which rules tokens are pruned.

    The defaults are a good start; most users set none of these fields, and let :func:`madtp.calibrate` choose the gain for the
    saving they want. ``PruningConfig.official()`` reproduces the authors' code.

    Attributes:
        temperature: T of the threshold, at least 0. Larger prunes more; 0 switches pruning off. Default 1.
        gain: factor on the threshold, at least 0. Larger prunes more; 1 is the paper's threshold, and towards 0 the model
            approaches the dense one. Default 1. This is the setting to change for more or less pruning.
        towers: modalities to prune, out of ``"image"`` and ``"text"``. None, the default, prunes all. Choose ``("image",)`` to
            keep every word.
        layers: in which blocks of a stream tokens are dropped, by their numbers in the stream from 0: ``(2,)`` prunes behind
            the attention of the third block alone. A mapping gives numbers by the path of the blocks, with wildcards:
            ``{"*language_model*": (2, 8), "*vision_tower*": ()}``; blocks that no pattern fits are pruned, and the first that
            fits counts. What is not pruned computes no statistics, so its attention stays fused. None, the default, prunes
            behind every block.
        protect: positions that are never pruned, by modality, besides those that the model reads by position:
            ``{"image": (0, 1)}``. Default none.
        min_tokens: number of tokens that survive at every site at least, protected ones not counted. Default 1.
        min_tokens_per_image: number of tokens of each image that survive at every site at least, the best of each. In a
            language model, an image or a frame is a run of image tokens between other tokens. Default 0.
        batching: how samples of a batch share a layer. ``"ragged"``, the default, keeps each sample's own tokens, so that its
            result does not depend on its batch. ``"uniform"`` gives every sample the largest count of the batch.
            ``"static"`` uses counts that are fixed beforehand; :func:`madtp.freeze` sets it, for compilers and ONNX.
        alignment: whether alignment tokens guide the pruning. False leaves them out: tokens are scored by attention alone, and
            the threshold is the mean score. Choose False for models or inputs so small that guidance costs more than it saves.
            Default True.
        alignment_tokens: K, the number of alignment tokens. Default 100.
        alignment_width: d_e, the width of the alignment tokens. None, the default, takes that of the widest pruned stream.
        query_projection: where a linear layer maps tokens to the width of the alignment tokens: ``"differing"``, the default,
            where the widths differ; ``"always"`` everywhere, as in the authors' code for dual encoders.
        merge: whether dropped tokens are merged into one token, their mean weighted by importance. False discards them. None,
            the default, merges, but for the selections that need no training, which would have to compute the importance.
        score_queries: number of evenly spaced queries that say how much attention tokens receive. None, the default, asks all
            of them. With fewer, attention itself runs by torch's fused kernels, which make no attention map. Where an attention
            is causal, or has a mask that differs between queries or heads, all queries are asked.
        straight_through: whether a soft mask lets gradients reach the threshold and the importance in training. Default False.
        strict: whether it is an error if a tower, more than a third of the blocks, or a whole call is not pruned although
            nobody asked for that. False, the default, says so in the log and in the report.
        max_programs: number of kinds of calls (sizes, dtypes, modes, switches) of a module that are captured; calls of further
            kinds run unpruned, with a warning. Default 16.
        selection: which tokens survive. ``"threshold"``, the default, is the method. ``"distinct"`` is the method for image
            tokens of which many are alike: a token counts for less, the nearer it is to one that survives. It is the better
            choice where a language model is not trained after the rewrite. The others are controls for experiments:
            ``"random"`` keeps random tokens, ``"class_attention"`` those that the class token attends to most; both as many as
            the method would keep, or ``keep_ratio`` of them. Rules of methods that need no training keep ``keep_ratio`` of
            the tokens: ``"last_token_attention"`` (FastV) those that the last token of a causal stream attends to,
            ``"class_token_attention"`` (VisionZip) those that the class token attends to, heads counting alike,
            ``"diversity"`` (DivPrune) those that are far from each other, ``"conditional_diversity"`` (CDPruner) those that
            differ and are relevant to the text beside them. Combine them with ``layers``; the diversity rules leave all
            attention fused. :func:`madtp.method.parts.register_scorer` adds rules of your own.
        keep_ratio: fraction of a site's tokens that a control or a rule keeps, above 0 and at most 1, the same at every site.
            None, the default, takes the method's count.
        seed: of the alignment tokens' initial values and of random selection. Default 0.
        guidance_score: how products with the alignment tokens become the guidance score s2: by a ``"softmax"`` over the tokens,
            or divided by their ``"sum"``. In this field and those below, the first value is the default, and the second is
            what the authors' code does (docs/deviations.md).
        class_score: whether the class token's attention s3 is ``"normalised"`` to sum one over the candidates, or ``"raw"``.
        padding: whether padding tokens are ``"excluded"`` from scores, pooling and merging, or ``"scored"`` like others.
        order: of the survivors, that of their ``"position"`` or that of an unsorted ``"topk"``.
        mask_order: in which order survivors read the text mask: that of the ``"tokens"``, or ``"sorted"`` by score.
        merged_mask: the merged token is visible if ``"any"`` of the dropped tokens was, or if the ``"best"`` of them was.
        readout: whether the end-of-text position is ``"remapped"`` to the survivors (and protected), or the ``"original"``.
        causal_mask: whether the causal mask is ``"gathered"`` at the survivors' positions or ``"cropped"`` to their number.
        causal_class_row: the row of attention that s3 reads in causal text: that of the ``"readout"``, or the ``"first"``.
        cross_mask: whether the mask of a pruned stream is ``"applied"`` in cross-attention to it, or ``"ignored"``.

    Raises:
        ConfigError: a value is out of range, of the wrong type, or contradicts another.
    """

    temperature: float = 1.0
    gain: float = 1.0
    towers: tuple[str, ...] | None = None
    layers: Layers | tuple[int, ...] | Mapping[str, Iterable[int]] | None = None
    protect: Positions | Mapping[str, Iterable[int]] = ()
    min_tokens: int = 1
    min_tokens_per_image: int = 0
    batching: Batching = "ragged"
    alignment: bool = True
    alignment_tokens: int = 100
    alignment_width: int | None = None
    query_projection: QueryProjection = "differing"
    merge: bool | None = None
    score_queries: int | None = None
    straight_through: bool = False
    strict: bool = False
    max_programs: int = 16
    selection: Selection | str = "threshold"
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
        object.__setattr__(self, "layers", _layers(self.layers))
        for name in ("temperature", "gain"):
            object.__setattr__(self, name, _number(name, getattr(self, name), low=0.0))
        for name, low, high in (
            ("min_tokens", 0, _LARGEST),
            ("min_tokens_per_image", 0, _LARGEST),
            ("alignment_tokens", 1, _WIDEST),
            ("seed", 0, _LARGEST),
            ("max_programs", 1, _LARGEST),
        ):
            _integer(name, getattr(self, name), low, high)
        for name, high in (("alignment_width", _WIDEST), ("score_queries", _LARGEST)):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), 1, high)
        if self.merge is None:
            object.__setattr__(self, "merge", not _is_rule(self.selection))
        for name in ("alignment", "merge", "straight_through", "strict"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; allowed: True, False")
        for name, allowed in _choices().items():
            if getattr(self, name) not in allowed:
                more = "; register_scorer of madtp.method.parts adds more" if name == "selection" else ""
                raise ConfigError(f"{name} is {getattr(self, name)!r}; allowed: {', '.join(map(repr, allowed))}{more}")
        if self.score_queries is not None and self.readout == "original":
            raise ConfigError(
                "score_queries samples the queries that score tokens, but readout='original' may read the row of a token that "
                "is not there; leave one of them out"
            )
        if self.min_tokens_per_image and self.batching != "ragged":
            raise ConfigError(
                f"min_tokens_per_image needs batching='ragged'; batching={self.batching!r} fixes one count for all samples"
            )
        self._check_selection()

    def _check_selection(self) -> None:
        if self.keep_ratio is None:
            if _is_rule(self.selection):
                raise ConfigError(
                    f"selection={self.selection!r} keeps a share of the tokens; give keep_ratio, such as keep_ratio=0.11"
                )
            return
        if self.selection in ("threshold", "distinct"):
            raise ConfigError(
                f"keep_ratio is {self.keep_ratio!r}, but selection={self.selection!r} decides the counts itself; "
                "leave keep_ratio out, or choose another selection"
            )
        ratio = _number("keep_ratio", self.keep_ratio, low=0.0)
        if not 0.0 < ratio <= 1.0:
            raise ConfigError(f"keep_ratio is {ratio}; allowed: above 0, at most 1")
        object.__setattr__(self, "keep_ratio", ratio)

    @classmethod
    def official(cls, *, temperature: float = 1.0) -> PruningConfig:
        """The configuration that behaves like the authors' code in every respect that docs/deviations.md lists.

        Args:
            temperature: T of the threshold.
        """
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

    def to_dict(self) -> dict[str, object]:
        """The fields as JSON types, for :meth:`from_dict`."""
        values: dict[str, object] = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["towers"] = None if self.towers is None else list(self.towers)
        values["layers"] = (
            None if self.layers is None else {name: list(numbers) for name, numbers in self.chosen_layers()}
        )
        values["protect"] = {name: list(positions) for name, positions in typing.cast(Positions, self.protect)}
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PruningConfig:
        """Make a configuration from the fields that :meth:`to_dict` gives; those left out take their defaults.

        Raises:
            ConfigError: a field is unknown, or its value is not allowed.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"a configuration is a mapping of field names to values; got {type(values).__name__}")
        _refuse_unknown(values)
        return cls(**dict(values))

    def protecting(self, further: Mapping[str, Iterable[int]]) -> PruningConfig:
        """This configuration with more protected positions.

        Args:
            further: positions by modality.
        """
        own = dict(typing.cast(Positions, self.protect))
        joined = {name: (*own.get(name, ()), *further.get(name, ())) for name in (*own, *further)}
        return dataclasses.replace(self, protect={name: tuple(dict.fromkeys(p)) for name, p in joined.items()})

    def protected_positions(self, modality: str) -> tuple[int, ...]:
        """The positions in ``protect`` of one modality."""
        return dict(typing.cast(Positions, self.protect)).get(modality, ())

    def chosen_layers(self) -> Layers:
        """The numbers in ``layers`` by pattern; none where every layer is pruned."""
        return typing.cast(Layers, self.layers or ())

    def prunes_layer(self, block: str, layer: int) -> bool:
        """Whether ``layers`` leaves tokens to be dropped in a block.

        Args:
            block: path of the block.
            layer: its number in its stream.
        """
        numbers = next((numbers for pattern, numbers in self.chosen_layers() if fnmatchcase(block, pattern)), None)
        return numbers is None or layer in numbers

    @property
    def merges(self) -> bool:
        """Whether dropped tokens are merged into one."""
        return bool(self.merge)

    def prunes(self, modality: str) -> bool:
        """Whether streams of this modality are pruned."""
        return self.towers is None or modality in self.towers


def follows_tokens(config: PruningConfig) -> bool:
    """Return whether masks and readouts follow the tokens. Some options of the authors' code read them by slots."""
    return (
        config.mask_order == "tokens"
        and config.causal_mask == "gathered"
        and config.readout == "remapped"
        and config.cross_mask != "ignored"
    )


def _choices() -> dict[str, tuple[str, ...]]:
    hints = typing.get_type_hints(PruningConfig)
    fixed = {name: typing.get_args(hint) for name, hint in hints.items() if typing.get_origin(hint) is Literal}
    return {**fixed, "selection": (*typing.get_args(Selection), *sorted(REGISTERED))}


def _is_rule(selection: str) -> bool:
    return selection in (*RULES, *REGISTERED)


def _number(name: str, value: object, *, low: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < low:
        raise ConfigError(f"{name} is {value!r}; allowed: a finite number, at least {low:g}")
    return float(value)


def _integer(name: str, value: object, low: int, high: int = _LARGEST) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        bound = "" if high == _LARGEST else f" and at most {high}"
        raise ConfigError(f"{name} is {value!r}; allowed: a whole number, at least {low}{bound}")


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


def _layers(layers: object) -> Layers | None:
    if layers is None:
        return None
    pairs: list[tuple[Any, Any]]
    if isinstance(layers, Mapping):
        pairs = list(layers.items())
    elif isinstance(layers, (tuple, list)) and layers and all(isinstance(one, (tuple, list)) for one in layers):
        pairs = [tuple(one) for one in layers]
    else:
        pairs = [("*", layers)]
    result = []
    for pattern, numbers in pairs:
        if not isinstance(pattern, str) or isinstance(numbers, str) or not isinstance(numbers, Iterable):
            raise ConfigError(
                f"layers is {layers!r}; allowed: None for all, numbers of blocks such as (2, 8), or a mapping of such numbers "
                "by path, {'*language_model*': (2,)}"
            )
        chosen = tuple(numbers)
        for number in chosen:
            _integer("layers", number, 0)
        result.append((pattern, tuple(sorted(set(chosen)))))
    return tuple(result)


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


def _refuse_unknown(fields: Iterable[object]) -> None:
    names = [field.name for field in dataclasses.fields(PruningConfig)]
    for key in fields:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known fields: {', '.join(names)}"
            raise ConfigError(f"unknown field {key!r} in the pruning configuration; {hint}")


def _with_words(make: Callable[..., None]) -> Callable[..., None]:
    """The constructor that dataclasses made, with errors of the library for fields that it does not have."""

    @functools.wraps(make)
    def checked(self: PruningConfig, *args: object, **fields: object) -> None:
        if args:
            raise ConfigError(f"{args[0]!r} is given without a name; name each field, as in PruningConfig(gain=2.0).")
        _refuse_unknown(fields)
        make(self, **fields)

    return checked


PruningConfig.__init__ = _with_words(PruningConfig.__init__)  # type: ignore[method-assign]
