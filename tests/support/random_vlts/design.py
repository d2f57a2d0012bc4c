"""The description of a random model, as plain data. Start at :class:`Design`.

Every field lists its choices in its type, the plainest first, so that one table serves the hypothesis strategy
(:func:`designs`, which shrinks towards the plainest) and draws by seed (:func:`draw`). Choices that do not go together are
resolved by :meth:`Design.legal`, so every combination is a model.
"""

from __future__ import annotations

import dataclasses
import json
import random
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from hypothesis import strategies as st

T = TypeVar("T")


@dataclass(frozen=True)
class Blocks:
    """How the blocks of one stream are written.

    placement: of the norms. projection: how queries, keys and values are made. product: how attention is computed from them.
    mask: form of the padding mask. positions: of the tokens. head_norm: queries and keys are normalised by head.
    """

    placement: Literal["pre", "post", "sandwich", "parallel", "parallel_sum"] = "pre"
    norm: Literal["layer", "rms", "own_rms"] = "layer"
    projection: Literal[
        "separate",
        "unbind",
        "chunk",
        "split",
        "select",
        "by_head",
        "grouped_expand",
        "grouped_repeat",
        "grouped_flag",
        "grouped_fused",
    ] = "separate"
    product: Literal[
        "sdpa",
        "matmul",
        "divided",
        "scaled_query",
        "scaled_both",
        "upcast",
        "cosine",
        "folded",
        "folded_added",
        "einsum",
        "multihead",
        "multihead_weights",
        "sequence_first",
    ] = "sdpa"
    mask: Literal[
        "boolean_row",
        "boolean_square",
        "additive_row",
        "additive_square",
        "additive_large",
        "boolean_keys",
        "additive_pairs",
        "infinite",
    ] = "boolean_row"
    positions: Literal[
        "learned",
        "sinusoidal",
        "embedding",
        "rotary_half",
        "rotary_pairs",
        "rotary_complex",
        "rotary_patches",
        "rotary_ids",
        "table",
        "buckets",
        "slopes",
    ] = "learned"
    feed_forward: Literal["plain", "gated", "gelu_gated", "fused_gate"] = "plain"
    head_norm: Literal[False, True] = False
    layer_scale: Literal[False, True] = False
    drop_path: Literal[False, True] = False
    heads: Literal[2, 4] = 2
    depth: Literal[2, 3] = 2

    @property
    def multihead(self) -> bool:
        """Whether attention is torch's own module, which takes neither rotations nor biases."""
        return self.product in ("multihead", "multihead_weights", "sequence_first")

    def legal(self) -> Blocks:
        """The nearest combination that makes sense."""
        found = self
        if self.multihead:
            found = dataclasses.replace(found, projection="separate", mask="boolean_row", head_norm=False)
            if self.positions not in ("learned", "sinusoidal", "embedding"):
                found = dataclasses.replace(found, positions="learned")
        if found.projection == "grouped_flag" and found.product != "sdpa":
            found = dataclasses.replace(found, projection="grouped_repeat")
        return found


@dataclass(frozen=True)
class Design:
    """A random vision-language transformer.

    arrangement: which streams there are and how they meet. image, text, fusion: blocks of the streams (fusion: of what reads
    both). special: learned tokens in front of the patches. padding: of the text; without it there is no mask. cross: the layers
    that read the other stream.
    """

    arrangement: Literal[
        "image", "towers", "encoder", "co_attention", "queries", "joint", "joint_after_towers", "scattered"
    ] = "towers"
    image: Blocks = Blocks()
    text: Blocks = Blocks()
    fusion: Blocks = Blocks()
    special: Literal["class", "none", "registers", "class_and_registers"] = "class"
    patches: Literal["convolution", "linear"] = "convolution"
    image_readout: Literal[
        "first", "mean", "mean_of_patches", "first_and_mean", "maximum", "attention", "sequence", "head", "grid"
    ] = "first"
    text_readout: Literal[
        "first",
        "end_by_argmax",
        "end_by_match",
        "end_by_length",
        "end_by_gather",
        "last",
        "mean",
        "masked_mean",
        "attention",
        "sequence",
        "head",
    ] = "first"
    causal: Literal[False, True] = False
    padding: Literal["right", "left", "none"] = "right"
    cross: Literal["all", "last", "some"] = "all"
    cross_feed_forward: Literal[False, True] = False
    cross_gate: Literal[False, True] = False
    order: Literal["text_first", "image_first"] = "text_first"
    type_embeddings: Literal[True, False] = True
    scatter: Literal["masked_scatter", "where", "index_put"] = "masked_scatter"
    weights: Literal[0, 1, 2, 3] = 0

    def legal(self) -> Design:
        """The nearest combination that makes sense."""
        found = dataclasses.replace(self, image=self.image.legal(), text=self.text.legal(), fusion=self.fusion.legal())
        if self.padding == "none" and self.text_readout in ("end_by_length", "masked_mean"):
            found = dataclasses.replace(found, text_readout="end_by_argmax")
        if self.padding == "left":
            found = found._for_left_padding()
        if self.special == "none" and self.image_readout in ("first", "first_and_mean"):
            found = dataclasses.replace(found, image_readout="mean")
        return found

    def _for_left_padding(self) -> Design:
        """A padded query in front of a text sees no key at all: infinite masks would make that NaN, as would torch's module."""
        text, fusion = (
            dataclasses.replace(
                blocks,
                mask="boolean_row" if blocks.mask == "infinite" else blocks.mask,
                product="matmul" if blocks.multihead else blocks.product,
            )
            for blocks in (self.text, self.fusion)
        )
        readout = "last" if self.text_readout == "end_by_length" else self.text_readout
        return dataclasses.replace(self, text=text, fusion=fusion, text_readout=readout)

    @property
    def prefix(self) -> int:
        """Learned tokens in front of the patches."""
        return {"class": 1, "none": 0, "registers": 2, "class_and_registers": 3}[self.special]

    def to_json(self) -> str:
        """What differs from the plainest design, as JSON."""
        return json.dumps(_differences(self))

    @classmethod
    def from_json(cls, text: str) -> Design:
        """Inverse of :meth:`to_json`."""
        return cls.from_dict(json.loads(text))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Design:
        """A design from plain JSON types; what is left out is as in the plainest one."""
        parts = {n: Blocks(**v) if isinstance(v, Mapping) else v for n, v in values.items()}
        return cls(**parts)


def _differences(value: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for field in dataclasses.fields(value):
        own = getattr(value, field.name)
        if own != field.default:
            found[field.name] = _differences(own) if dataclasses.is_dataclass(own) else own
    return found


def designs() -> st.SearchStrategy[Design]:
    """A hypothesis strategy of legal designs; it shrinks towards the plainest."""
    blocks = st.builds(Blocks, **_choices(Blocks, st.sampled_from))
    parts = {"image": blocks, "text": blocks, "fusion": blocks}
    return st.builds(Design, **{**_choices(Design, st.sampled_from), **parts}).map(Design.legal)


def draw(seed: int) -> Design:
    """The legal design of a seed, for runs too long for hypothesis."""
    chance = random.Random(seed)

    def blocks() -> Blocks:
        return Blocks(**_choices(Blocks, chance.choice))

    parts = {"image": blocks(), "text": blocks(), "fusion": blocks()}
    return Design(**{**_choices(Design, chance.choice), **parts}).legal()


def _choices(kind: type, pick: Callable[[Any], T]) -> dict[str, T]:
    """One pick for each field of a dataclass whose type lists its choices."""
    hints = typing.get_type_hints(kind)
    return {n: pick(typing.get_args(h)) for n, h in hints.items() if typing.get_origin(h) is Literal}
