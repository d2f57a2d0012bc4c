"""Further forms of example inputs: where several images and clips stand among the arguments, and when a form counts."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zoo.small
from zoo.inputs.forms import further_inputs

IMAGE = 7


class Counting(nn.Module):
    """Adds up the pixels of the images that its image tokens stand for."""

    def __init__(self, *, sees: int) -> None:
        super().__init__()
        self.config, self.sees = SimpleNamespace(image_token_id=IMAGE), sees

    def forward(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
        assert int((input_ids == IMAGE).sum()) == 4 * len(pixel_values)
        own = pixel_values.unflatten(0, (len(input_ids), -1))
        return own[:, : self.sees].sum((1, 2, 3, 4))


def test_a_form_counts_if_the_model_takes_it_and_sees_the_second_image() -> None:
    ids = torch.tensor([[IMAGE] * 4 + [1, 2]] * 2)
    inputs = {"input_ids": ids, "pixel_values": torch.randn(2, 3, 8, 8)}
    found = further_inputs(Counting(sees=2), inputs)
    assert set(found) == {"two images"}
    assert found["two images"]["input_ids"].tolist() == [[IMAGE] * 8 + [1, 2]] * 2
    assert torch.equal(found["two images"]["pixel_values"][1], inputs["pixel_values"][1])
    assert further_inputs(Counting(sees=1), inputs) == {}
    assert further_inputs(Counting(sees=2), {**inputs, "input_ids": ids + 1}) == {}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "forms"),
    [
        ("hf:LlavaForConditionalGeneration", {"two images": (4, 3)}),
        ("hf:Idefics3ForConditionalGeneration", {"two images": (2, 2)}),
        ("hf:Qwen2VLForConditionalGeneration", {"two images": (256,), "clip": (256,)}),
        ("hf:LlavaNextVideoForConditionalGeneration", {"two images": (4,), "clip": (2, 2)}),
        ("hf:CLIPModel", {}),
        ("hf:BertModel", {}),
    ],
)
def test_forms_of_published_models(name: str, forms: Mapping[str, tuple[int, ...]]) -> None:
    pytest.importorskip("transformers")
    found: Mapping[str, Mapping[str, Any]] = further_inputs(*zoo.small.build(name))
    assert set(found) == set(forms)
    for form, shape in forms.items():
        pixels = found[form]["pixel_values_videos" if form == "clip" else "pixel_values"]
        assert pixels.shape[: len(shape)] == shape
