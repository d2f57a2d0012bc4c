"""Ways to call a rewritten model: other arguments, masks, types and modes than those it was rewritten with."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from joint_stream_models import Block, Encoder, Words
from masked_oracle import expected, leaves, survivors
from model_case import WIDTH
from rewritten_models import Subject, eager_arithmetic, gap
from rewritten_models import subject as rewritten
from small_vit import images, vit
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import madtp


@pytest.fixture(autouse=True)
def plain_attention() -> Iterator[None]:
    with eager_arithmetic():
        yield


@pytest.fixture(scope="module")
def clip() -> Subject:
    return rewritten("clip_sdpa")


def floats(output: Any) -> dict[str, Tensor]:
    """Floating-point leaves."""
    return {n: v for n, v in leaves(output).items() if v.is_floating_point()}


def same_without_pruning(subject: Subject, inputs: dict[str, Any]) -> None:
    """Temperature 0 reproduces the original on these inputs."""
    with torch.no_grad(), subject.set(temperature=0.0) as pruned:
        wanted, found = floats(subject.model(**inputs)), floats(pruned(**inputs))
    assert wanted.keys() == found.keys()
    for name, value in wanted.items():
        assert gap(value, found[name]) < 1e-5, name


def pruned_outputs(subject: Subject, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Outputs with pruning on; all finite, and something was pruned."""
    with torch.no_grad(), subject.set(temperature=4.0) as pruned:
        found = floats(pruned(**inputs))
        assert any(int(c.min()) < 14 for c in pruned.token_counts().values())
    assert all(bool(torch.isfinite(v).all()) for v in found.values())
    return found


@pytest.mark.parametrize("name", ["clip_sdpa", "clip_eager"])
@torch.no_grad()
def test_left_padding_agrees_with_the_oracle(name: str) -> None:
    subject = rewritten(name)
    inputs = subject.case.inputs(3, 8)
    for field in ("input_ids", "attention_mask"):
        inputs[field] = inputs[field].flip(1)
    inputs["input_ids"] = inputs["input_ids"].clamp(max=97).index_fill(1, torch.tensor([7]), 98)
    same_without_pruning(subject, inputs)
    pruned_outputs(subject, inputs)
    forced = {
        s: [torch.rand(p.shape) < 0.7 for _ in range(subject.case.layers[s])]
        for s, p in subject.case.protected(inputs).items()
    }
    kept = survivors(subject.case, forced, inputs)
    wanted = expected(subject.case, subject.model, inputs, kept)
    with subject.set(forced=forced, merge=False) as pruned:
        found = leaves(pruned(**inputs))
    for leaf in ("text_embeds", "image_embeds", "logits_per_image"):
        assert gap(wanted[leaf], found[leaf]) < 1e-5, leaf


def test_a_sample_of_padding_alone_spoils_nothing(clip: Subject) -> None:
    inputs = clip.case.inputs(3, 7)
    inputs["attention_mask"][1] = 0
    same_without_pruning(clip, inputs)
    pruned_outputs(clip, inputs)


def test_leaving_the_mask_out_captures_once_more(clip: Subject) -> None:
    inputs = clip.case.inputs(3, 7)
    del inputs["attention_mask"]
    same_without_pruning(clip, inputs)
    pruned_outputs(clip, inputs)
    same_without_pruning(clip, clip.case.inputs(2, 5))


def test_hidden_states_come_back_at_full_length(clip: Subject) -> None:
    inputs = {**clip.case.inputs(3, 7), "output_hidden_states": True}
    same_without_pruning(clip, inputs)
    found = pruned_outputs(clip, inputs)
    assert all(v.shape[1] in (7, 17) for n, v in found.items() if "hidden_states" in n)


def test_attention_maps_come_back_over_all_tokens() -> None:
    subject = rewritten("clip_eager")
    inputs = {**subject.case.inputs(3, 7), "output_attentions": True}
    same_without_pruning(subject, inputs)
    maps = [v for name, v in pruned_outputs(subject, inputs).items() if "attentions" in name]
    assert maps
    for found in maps:
        assert found.shape[-2:] in ((7, 7), (17, 17))
        torch.testing.assert_close(found.sum(-1), torch.ones(found.shape[:-1]))


class Mixing(nn.Module):
    """Blocks; on request each channel is sorted over the tokens, which says nothing of where a token went."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor, mix: bool = False) -> Tensor:
        for block in self.blocks:
            x = block(x)
            if mix:
                x = x + x.sort(1).values
        return x[:, 0]


def test_a_signature_that_cannot_be_pruned_says_so(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model, inputs = Mixing().eval(), torch.randn(3, 12, WIDTH)
    pruned = madtp.rewrite(model, (inputs,))
    with caplog.at_level("WARNING", logger="madtp"), torch.no_grad(), pruned.dense():
        assert gap(model(inputs, mix=True), pruned(inputs, mix=True)) < 1e-5
    assert "nothing is pruned at" in caplog.text
    assert pruned.report.sites[0].name in caplog.text


def test_an_image_of_another_size(clip: Subject) -> None:
    inputs = {**clip.case.inputs(2, 6), "pixel_values": torch.randn(2, 3, 48, 48), "interpolate_pos_encoding": True}
    same_without_pruning(clip, inputs)
    pruned_outputs(clip, inputs)


def test_other_branch_of_the_model() -> None:
    subject = rewritten("blip_itm")
    inputs = {**subject.case.inputs(3, 7), "use_itm_head": False}
    same_without_pruning(subject, inputs)
    pruned_outputs(subject, inputs)


def test_copies_are_independent(clip: Subject) -> None:
    twin = copy.deepcopy(clip.pruned)
    twin.temperature = 0.0
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(0.01)
    assert clip.pruned.temperature == 1.0
    same_without_pruning(clip, clip.case.inputs(2, 6))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@torch.no_grad()
def test_other_types(clip: Subject, dtype: torch.dtype) -> None:
    model, pruned = copy.deepcopy(clip.model).to(dtype), copy.deepcopy(clip.pruned).to(dtype)
    inputs = {n: v.to(dtype) if v.is_floating_point() else v for n, v in clip.case.inputs(3, 7).items()}
    with pruned.dense():
        wanted, found = model(**inputs), pruned(**inputs)
        assert gap(wanted.text_embeds.double(), found.text_embeds.double()) < 1e-5
    pruned.temperature = 2.0
    embeds = pruned(**inputs).text_embeds
    assert embeds.dtype == dtype
    assert bool(torch.isfinite(embeds).all())


@torch.no_grad()
def test_autocast(clip: Subject) -> None:
    inputs = clip.case.inputs(3, 7)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = clip.model(**inputs).text_embeds
        with clip.set(temperature=0.0) as pruned:
            assert gap(wanted.float(), pruned(**inputs).text_embeds.float()) < 1e-5
        with clip.set(temperature=2.0) as pruned:
            assert bool(torch.isfinite(pruned(**inputs).text_embeds).all())


def test_training_works_after_inference_mode(clip: Subject) -> None:
    inputs = clip.case.inputs(2, 6)
    with clip.set(temperature=2.0) as pruned:
        with torch.inference_mode():
            pruned(**inputs)
        pruned(**inputs).logits_per_image.sum().backward()
        assert any(p.grad is not None for p in pruned.parameters())
        pruned.zero_grad(set_to_none=True)


def test_first_call_may_hold_one_sample() -> None:
    subject = rewritten("vit")
    fresh = copy.deepcopy(subject.pruned)
    fresh.madtp.forward_of_host.programs.entries = {}
    x = subject.case.inputs(1, 0)["x"]
    with torch.no_grad(), fresh.dense():
        assert torch.equal(fresh(x), subject.model(x))


class Choosing(nn.Module):
    """Goes another way where a text is long, or a batch full."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.encoder = Words(), Encoder(2)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.words(input_ids)
        if input_ids.shape[1] > 20:
            x = 2 * x
        if input_ids.shape[0] * input_ids.shape[1] < 16:
            x = -x
        return self.encoder(x)[:, 0]


@torch.no_grad()
def test_a_size_that_the_models_python_asks_for_is_captured_once_more() -> None:
    torch.manual_seed(0)
    model = Choosing().eval()
    pruned = madtp.rewrite(model, {"input_ids": torch.randint(0, 30, (3, 12))})
    for batch, length in ((3, 20), (3, 21), (5, 30), (2, 7), (1, 20), (1, 30)):
        ids = torch.randint(0, 30, (batch, length))
        with pruned.dense():
            assert gap(model(ids), pruned(input_ids=ids)) < 1e-5, (batch, length)
    assert pruned.get_submodule("madtp").programs <= 5, "one program for each way"


def test_wrong_calls_are_named() -> None:
    """By the model itself, as it would without madtp."""
    subject = rewritten("vit")
    for model in (subject.model, subject.pruned):
        with pytest.raises(TypeError, match="unexpected keyword argument 'pixels'"):
            model(pixels=torch.randn(2, 3, 32, 32))


class Casting(nn.Module):
    """Casts what it is given to the type of its weights, in one of several ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        self.patch = nn.Conv2d(3, WIDTH, 8, 8)
        self.encoder = Encoder(2)
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, pixels: Tensor) -> Tensor:
        match self.how:
            case "dtype of a weight":
                pixels = pixels.to(self.patch.weight.dtype)
            case "dtype of the first parameter":
                pixels = pixels.to(next(self.parameters()).dtype)
            case "type as":
                pixels = pixels.type_as(self.head.bias)
        found: Tensor = self.head(self.encoder(self.patch(pixels).flatten(2).transpose(1, 2)).mean(1))
        return found


@pytest.mark.parametrize("how", ["dtype of a weight", "dtype of the first parameter", "type as"])
@torch.no_grad()
def test_a_model_that_is_cast_behind_the_rewrite_casts_what_it_is_given(how: str) -> None:
    pixels = torch.randn(3, 3, 40, 40)
    model = Casting(how).eval()
    pruned = madtp.rewrite(model, (pixels,), config=madtp.PruningConfig(alignment_tokens=8)).eval()
    for dtype in (torch.bfloat16, torch.double, torch.float32):
        model.to(dtype)
        pruned.to(dtype)
        with pruned.dense():
            found = pruned(pixels)
        assert found.dtype == dtype
        assert gap(model(pixels).float(), found.float()) < (1e-5 if dtype != torch.bfloat16 else 0.05)
        assert pruned(pixels).dtype == dtype
        assert any(int(counts.min()) < 25 for counts in pruned.token_counts().values())


@pytest.mark.parametrize("first_call", ["the rewrite", "a call of a new kind"])
def test_what_is_made_in_inference_mode_trains_later(first_call: str) -> None:
    model = Casting("dtype of a weight").train()
    config = madtp.PruningConfig(alignment_tokens=8)
    if first_call == "the rewrite":
        with torch.inference_mode():
            pruned = madtp.rewrite(model, (torch.randn(3, 3, 40, 40),), config=config)
    else:
        pruned = madtp.rewrite(model, (torch.randn(3, 3, 40, 40),), config=config)
        with torch.inference_mode():
            assert pruned(torch.randn(3, 3, 48, 48)).is_inference()
    size = 40 if first_call == "the rewrite" else 48
    pruned(torch.randn(3, 3, size, size)).sum().backward()
    assert all(parameter.grad is not None for parameter in pruned.encoder.parameters())
    assert not any(tensor.is_inference() for tensor in (*pruned.parameters(), *pruned.buffers()))


class Views(OrderedDict[str, Tensor]):
    """Two views of the same shape, as an output class that another part of a model has filled."""


pytree.register_pytree_node(
    Views,
    lambda views: (list(views.values()), list(views)),
    lambda values, names: Views(sorted(zip(names, values, strict=True))),
    flatten_with_keys_fn=lambda views: ([(pytree.MappingKey(name), x) for name, x in views.items()], list(views)),
)


class Comparing(nn.Module):
    """Reads two views by name; they are not interchangeable."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = vit(depth=2)

    def forward(self, views: Views) -> Tensor:
        return self.tower(views["one"] - 2 * views["other"])


@torch.no_grad()
def test_named_tensors_are_told_apart_in_any_order() -> None:
    model = Comparing().eval()
    first, second = images(2, 1), images(2, 2)
    forward, backward = Views(one=first, other=second), Views(other=second, one=first)
    assert list(backward) == ["other", "one"]
    for example, later in ((forward, backward), (backward, forward)):
        pruned = madtp.rewrite(model, {"views": example})
        assert pruned.report.capture == "whole"
        assert gap(pruned(example), pruned(later)) < 1e-5
        assert gap(model(example), pruned(later)) < 0.5, "pruned, and not of the views exchanged"
        assert not pruned.report.notes


class Filling(nn.Module):
    """Leaves the first layer's tokens in a dictionary that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = vit(depth=2)

    def forward(self, images: Tensor, kept: dict[str, Tensor]) -> Tensor:
        kept["pixels"] = images * 2
        return self.tower(images + 0 * kept["pixels"])


@torch.no_grad()
def test_a_container_that_a_model_fills_is_told_and_not_filled_by_trials() -> None:
    given: dict[str, Tensor] = {}
    model = Filling().eval()
    pruned = madtp.rewrite(model, {"images": images(2, 1), "kept": given})
    assert not given
    wanted = model(images(2, 1), {})
    pruned.temperature = 0.0
    assert gap(wanted, pruned(images(2, 1), given)) < 1e-5
    assert gap(model(images(3, 1), {}), pruned(images(3, 1), given)) < 1e-5
    assert not given
    assert sum("changes a container that it is given" in note for note in pruned.report.notes) == 1
    other = {"pixels": torch.zeros(2, 3, 32, 32)}
    assert gap(wanted, pruned(images(2, 1), other)) < 1e-5
    assert float(other["pixels"].abs().sum()) == 0
