"""Which tokens are protected, which segments pruned, which streams left alone: policy, layout, inheritance, learned tokens."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from detected_structure import Found, drawn, found
from joint_stream_models import Encoder, Patches, Words
from model_case import VOCABULARY
from torch import Tensor, fx, nn

import madtp
from madtp.config import PruningConfig
from madtp.errors import PlanError
from rewriters.axes.sources import Rest, TokenRange
from rewriters.detect.layout import find_layout
from rewriters.graph.nodes import AxisError, op_name
from rewriters.plan.causality import Example
from rewriters.plan.inheritance import inherited
from rewriters.plan.plan import Plan, Refusal
from rewriters.plan.policy import Policy, Position, SegmentPlan, left_alone, original, protected_readouts, segments_of

DEFAULT = PruningConfig()


def of(**design: Any) -> Found:
    return drawn(json.dumps(design))


def example(case: Found) -> Example:
    return Example(case.structure.graph, *case.about)


def graph_value(name: str) -> fx.Node:
    graph = fx.Graph()
    return graph.placeholder(name)


# --- learned tokens and modalities


@pytest.mark.parametrize(
    ("special", "positions"),
    [("class", (0,)), ("none", ()), ("registers", (0, 1)), ("class_and_registers", (0, 1, 2))],
)
def test_learned_tokens_in_front_are_special(special: str, positions: tuple[int, ...]) -> None:
    assert of(arrangement="image", special=special, image_readout="mean").stream("image").special == positions


def test_learned_tokens_are_found_behind_a_transposition() -> None:
    design = {"arrangement": "image", "special": "registers", "image": {"product": "sequence_first"}}
    assert of(**design, image_readout="mean").stream("image").special == (0, 1)


class LearnedBehind(nn.Module):
    """Learned tokens behind those of the image, where they are tokens like others."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.encoder = Patches(), Encoder(2)
        self.more = nn.Parameter(torch.randn(1, 3, 16))

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patches(pixels)
        return self.encoder(torch.cat([x, self.more.expand(x.shape[0], -1, -1)], 1))[:, 0]


def test_learned_tokens_behind_others_are_not_special() -> None:
    assert found(LearnedBehind(), {"pixels": torch.randn(2, 3, 32, 32)}).stream("image").special == (0,)


def test_modality_is_what_a_stream_descends_from() -> None:
    assert [s.modality for s in of().structure.streams] == ["image", "text"]
    assert [s.modality for s in of(arrangement="queries").structure.streams] == ["image", "query"]
    assert [s.modality for s in of(arrangement="joint").structure.streams] == ["joint"]


# --- layout


@pytest.mark.parametrize(("order", "names"), [("text_first", ("text", "image")), ("image_first", ("image", "text"))])
def test_segments_of_a_concatenation(order: str, names: tuple[str, ...]) -> None:
    layout = of(arrangement="joint", order=order).stream("joint").layout
    assert layout is not None
    assert layout.segments == names
    assert layout.mask is None
    assert {layout.segments[p.segment]: p.special for p in layout.parts} == {"text": (), "image": (0,)}


@pytest.mark.parametrize("scatter", ["masked_scatter", "where"])
def test_segments_of_scattered_features(scatter: str) -> None:
    layout = of(arrangement="scattered", scatter=scatter).stream("joint").layout
    assert layout is not None
    assert layout.segments == ("text", "image")
    assert layout.mask is not None
    assert layout.mask.meta["val"].dtype == torch.bool


def test_tokens_of_one_modality_have_no_layout() -> None:
    for design in ({"arrangement": "image", "special": "class_and_registers"}, {"arrangement": "queries"}):
        assert all(stream.layout is None for stream in of(**design).structure.streams)


def test_a_layout_is_sought_along_the_tokens_only() -> None:
    stream = of(arrangement="joint").stream("joint")
    assert find_layout(stream.sublayers[0].block_input, 0) is None


# --- protected readouts


@pytest.mark.parametrize(
    ("design", "positions", "operations"),
    [
        ({"text_readout": "first"}, (0,), []),
        ({"text_readout": "last", "padding": "none"}, (-1,), []),
        ({"text_readout": "end_by_argmax"}, (), ["argmax"]),
        ({"text_readout": "end_by_match"}, (), ["argmax"]),
        ({"text_readout": "mean"}, (), []),
    ],
)
def test_what_is_read_is_protected(design: dict[str, Any], positions: tuple[int, ...], operations: list[str]) -> None:
    case = of(**design)
    protected = protected_readouts(case.stream("text"), DEFAULT)
    names = {n.name: op_name(n) for n in case.structure.graph.nodes}
    assert protected.positions == positions
    assert [names[n] for n in protected.readouts] == operations


def test_configured_positions_are_protected_too() -> None:
    config = PruningConfig(protect={"text": (2, 5)})
    assert protected_readouts(of(text_readout="first").stream("text"), config).positions == (0, 2, 5)


def test_a_position_of_a_part_is_counted_in_the_stream() -> None:
    cut = graph_value("cut")
    assert original("s", None, 3) == Position(None, 3)
    assert original(Rest("s", 2), None, 3) == Position(None, 5)
    assert original(TokenRange("s", 4, 9), None, 1) == Position(None, 5)
    assert original(TokenRange("s", cut, None), None, 1) == Position(cut, 1)
    assert original(Rest(TokenRange("s", 1, None), 2), None, 0) == Position(None, 3)


def test_a_position_from_the_end_of_a_part_is_counted_from_its_border() -> None:
    cut = graph_value("cut")
    assert original(TokenRange("s", 4, None), None, -1) == Position(None, -1)
    assert original(TokenRange("s", 0, cut), None, -1) == Position(cut, -1)


def test_a_position_that_depends_on_two_values_is_refused() -> None:
    with pytest.raises(AxisError, match="depends on both"):
        original(TokenRange("s", graph_value("cut"), None), graph_value("end"), 0)
    with pytest.raises(AxisError, match="on the length"):
        original(TokenRange("s", -5, None), graph_value("end"), 0)


# --- what is left alone


@pytest.mark.parametrize("policy", [None, *Policy])
def test_the_policy_of_a_refusal_survives_json(policy: Policy | None) -> None:
    plan = Plan((), (Refusal("blocks.0", "attention", "a reason", "help", policy),), 1, 1, "interleaved")
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert plan.refusals[0].report().by_policy is (policy is not None)


@pytest.mark.parametrize("by_policy", [False, True])
def test_refusals_of_plans_without_named_policies_are_read(by_policy: bool) -> None:
    refusal = {"block": "blocks.0", "node": "attention", "reason": "a reason", "help": "help", "by_policy": by_policy}
    values = Plan((), (), 1, 1, "interleaved").to_dict()
    read = Plan.from_dict({**values, "refusals": [refusal]})
    assert read.refusals[0].report().by_policy is by_policy


@pytest.mark.parametrize("refusal", ["x", None, 3])
def test_a_refusal_that_is_not_an_object_is_malformed(refusal: object) -> None:
    values = Plan((), (), 1, 1, "interleaved").to_dict()
    with pytest.raises(PlanError, match="the plan is malformed"):
        Plan.from_dict({**values, "refusals": [refusal]})


def test_a_causal_text_read_at_every_position_is_left_alone() -> None:
    case = of(causal=True, text_readout="head")
    refused = left_alone(case.stream("text"), (), DEFAULT, example(case))
    assert refused is not None
    assert refused.policy is Policy.LANGUAGE_MODEL
    assert "language model" in refused.reason
    assert "towers=('text',)" in refused.help


@pytest.mark.parametrize(
    ("design", "config"),
    [
        ({"causal": True, "text_readout": "head"}, PruningConfig(towers=("text",))),
        ({"causal": True, "text_readout": "end_by_argmax"}, DEFAULT),
        ({"causal": False, "text_readout": "head"}, DEFAULT),
    ],
)
def test_text_that_is_asked_for_or_condensed_or_not_causal_is_pruned(
    design: dict[str, Any], config: PruningConfig
) -> None:
    case = of(**design)
    assert left_alone(case.stream("text"), (), config, example(case)) is None


def test_a_tower_that_is_left_out_is_left_alone() -> None:
    case = of()
    refused = left_alone(case.stream("image"), (), PruningConfig(towers=("text",)), example(case))
    assert refused is not None
    assert refused.policy is Policy.TOWERS
    assert (refused.reason, refused.help) == ("config.towers leaves out the modality 'image'", "add it to towers")


def pruned_segments(case: Found, config: PruningConfig = DEFAULT) -> dict[str, bool]:
    return {s.modality: s.pruned for s in segments_of(case.stream("joint"), config, example(case))}


def test_segments_are_pruned_apart() -> None:
    case = of(arrangement="joint")
    assert pruned_segments(case) == {"text": True, "image": True}
    assert pruned_segments(case, PruningConfig(towers=("image",))) == {"text": False, "image": True}


def test_text_with_features_written_into_it_stays_where_every_position_is_read() -> None:
    case = of(arrangement="scattered", causal=True, text_readout="head")
    assert pruned_segments(case) == {"text": False, "image": True}
    assert pruned_segments(case, PruningConfig(towers=("text", "image"))) == {"text": True, "image": True}
    assert pruned_segments(of(arrangement="scattered", text_readout="last")) == {"text": True, "image": True}


def test_a_stream_none_of_whose_segments_is_pruned_is_left_alone() -> None:
    case = of(arrangement="joint")
    segments = tuple(SegmentPlan(modality, False, ()) for modality in ("text", "image"))
    asked = PruningConfig(towers=("text",))
    refused = left_alone(case.stream("joint"), segments, asked, example(case))
    assert refused is not None
    assert refused.policy is Policy.TOWERS
    assert "('text', 'image')" in refused.reason
    refused = left_alone(case.stream("joint"), segments, DEFAULT, example(case))
    assert refused is not None
    assert refused.policy is Policy.LANGUAGE_MODEL
    assert "language model" in refused.reason


# --- inheritance


@pytest.mark.parametrize("order", ["text_first", "image_first"])
def test_what_a_concatenation_reads_is_protected_in_its_parts(order: str) -> None:
    case = of(arrangement="joint_after_towers", text_readout="end_by_argmax", order=order)
    handed = inherited(case.structure, DEFAULT)
    names = {n.name: op_name(n) for n in case.structure.graph.nodes}
    image, text = (handed[case.stream(m).index] for m in ("image", "text"))
    assert image.positions == [0]
    assert [names[n] for n in text.readouts] == ["argmax"]
    assert image.unknown is None
    assert text.unknown is None


def test_the_last_token_of_a_part_of_varying_length_is_its_last() -> None:
    case = of(arrangement="joint_after_towers", text_readout="last", image_readout="mean")
    assert inherited(case.structure, DEFAULT)[case.stream("text").index].positions == [-1]


def test_streams_that_are_not_concatenated_inherit_nothing() -> None:
    for design in ({"text_readout": "end_by_argmax"}, {"arrangement": "encoder"}, {"arrangement": "joint"}):
        for handed in inherited(of(**design).structure, DEFAULT).values():
            assert (handed.positions, handed.readouts, handed.unknown) == ([], [], None)


class ConstantBehindText(nn.Module):
    """A joint stream is read at a constant position in or behind a text of varying length."""

    def __init__(self, position: int) -> None:
        super().__init__()
        self.patches, self.words = Patches(), Words()
        self.image, self.text, self.joint = Encoder(2), Encoder(2), Encoder(2)
        self.position = position

    def forward(self, pixels: Tensor, input_ids: Tensor) -> Tensor:
        both = torch.cat([self.text(self.words(input_ids)), self.image(self.patches(pixels))], 1)
        return self.joint(both)[:, self.position]


def test_a_position_that_cannot_be_told_is_unknown() -> None:
    given = {"pixels": torch.randn(2, 3, 32, 32), "input_ids": torch.randint(3, VOCABULARY, (2, 7))}
    case = found(ConstantBehindText(20), given)
    handed = inherited(case.structure, DEFAULT)
    assert "constant position behind a part of varying length" in str(handed[case.stream("image").index].unknown)


@torch.no_grad()
def test_a_position_that_a_shorter_text_leaves_to_the_image_is_protected_in_both() -> None:
    torch.manual_seed(0)
    model = ConstantBehindText(3).eval()
    given = {"pixels": torch.randn(2, 3, 32, 32), "input_ids": torch.randint(3, VOCABULARY, (2, 7))}
    case = found(model, given)
    handed = inherited(case.structure, DEFAULT)
    assert handed[case.stream("text").index].positions == [3]
    assert handed[case.stream("image").index].positions == [0, 1, 2]
    pruned = madtp.rewrite(model, given, config=PruningConfig(temperature=8.0, merge=False))
    for length in (7, 3, 2):
        pruned(**{**given, "input_ids": given["input_ids"][:, :length]})
        kept = pruned.kept_tokens()
        part = "text" if length > 3 else "image"
        alive = [tokens for name, tokens in kept.items() if name.startswith(part)]
        assert all(bool(tokens[:, 3 - (0 if length > 3 else length)].all()) for tokens in alive)
        assert alive
