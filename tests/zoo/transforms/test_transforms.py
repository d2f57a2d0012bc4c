"""Transforms of images and texts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import zoo
from madtp.errors import ConfigError
from zoo import transforms
from zoo.datasets import PairStatement, Sample
from zoo.datasets.records import to_pixels
from zoo.scenes import draw_sample, normalise
from zoo.transforms.augment import OPERATIONS

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def _noise(width: int = 20, height: int = 16) -> Image.Image:
    pixels = torch.randint(256, (height, width, 3), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def test_evaluation_squeezes_and_normalises() -> None:
    image = Image.new("RGB", (30, 20), (255, 0, 128))
    out = transforms.evaluation(8, MEAN, STD)(image)
    assert out.shape == (3, 8, 8)
    expected = [(value / 255 - m) / s for value, m, s in zip((255, 0, 128), MEAN, STD, strict=True)]
    assert out.amax((1, 2)).tolist() == pytest.approx(expected, abs=1e-5)
    assert out.amin((1, 2)).tolist() == pytest.approx(expected, abs=1e-5)


def test_a_model_of_the_zoo_has_its_own_transform() -> None:
    pixels = draw_sample(0, "test", 0).images[0]
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    torch.testing.assert_close(transforms.for_model("blip_nlvr_mini")(image), normalise(pixels))
    assert transforms.for_model("blip_nlvr")(image).shape == (3, 384, 384)


def test_training_is_random_reproducible_and_of_the_same_size() -> None:
    transform, image = transforms.training(8, MEAN, STD), _noise()
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(transform(image))
    assert outs[0].shape == (3, 8, 8)
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


@pytest.mark.parametrize("name", sorted(OPERATIONS))
@given(strength=st.floats(-1, 1))
def test_operations_keep_size_and_mode(name: str, strength: float) -> None:
    image = _noise(9, 7)
    out = OPERATIONS[name](image, strength)
    assert (out.size, out.mode) == (image.size, "RGB")


@pytest.mark.parametrize("name", ["Brightness", "Sharpness", "Identity"])
def test_at_the_published_magnitude_these_change_nothing(name: str) -> None:
    image = _noise()
    assert torch.equal(to_pixels(OPERATIONS[name](image, 0.5)), to_pixels(image))


def test_moving_shifts_pixels_and_fills_with_grey() -> None:
    image = _noise(20, 16)
    before, after = to_pixels(image), to_pixels(OPERATIONS["TranslateX"](image, 0.5))
    assert torch.equal(after[:, :, :15], before[:, :, 5:])
    assert (after[:, :, 15:] == 128).all()
    after = to_pixels(OPERATIONS["TranslateY"](image, -0.5))
    assert torch.equal(after[:, 5:], before[:, :11])


def test_shearing_moves_rows_in_proportion_to_their_place() -> None:
    image = Image.new("RGB", (40, 21))
    image.paste((255, 255, 255), (20, 0, 21, 21))
    columns = to_pixels(OPERATIONS["ShearX"](image, 1.0)).float()[0].argmax(1)
    assert columns[0] == 20
    assert columns[-1] == 20 - round(0.3 * 20)


def test_about_a_quarter_of_two_draws_leaves_the_image_alone() -> None:
    augment, image = transforms.RandomAugment(operations=("TranslateX",)), _noise()
    same = sum(to_pixels(augment(image)).equal(to_pixels(image)) for _ in range(400))
    # Neither is applied (1/4), or both in opposite directions, which loses the margin.
    assert 70 < same < 130


@pytest.mark.parametrize("options", [{"count": -1}, {"magnitude": 11}, {"operations": ()}, {"operations": ("Blur",)}])
def test_an_augmentation_that_is_none_is_refused(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        transforms.RandomAugment(**options)


@pytest.mark.parametrize("size", [0, -3])
def test_sizes_and_crops_are_checked(size: int) -> None:
    with pytest.raises(ConfigError, match="image size"):
        transforms.evaluation(size, MEAN, STD)
    with pytest.raises(ConfigError, match="smallest_crop"):
        transforms.training(8, MEAN, STD, smallest_crop=size)


def test_captions_and_questions_are_cleaned_as_published() -> None:
    assert transforms.clean_caption('A "dog" (brown):  runs!\n') == "a dog brown runs"
    assert transforms.clean_caption("it's a man-made lake, isn't it?") == "it's a man-made lake, isn't it?"
    assert transforms.clean_caption("one two three", words=2) == "one two"
    assert transforms.clean_question("Is it #1 (or not)? ") == "is it 1 or not?"
    assert transforms.clean_question("a b c", words=1) == "a"


def test_turning_a_pair_round_twice_changes_nothing() -> None:
    record = PairStatement("x", ("a", "b"), "the left image has more than the right one", 1)
    sample = Sample(record, torch.arange(6).view(2, 3, 1, 1))
    turned = transforms.swap_sides(sample)
    assert turned.record.statement == "the right image has more than the left one"
    assert turned.record.images == ("b", "a")
    assert turned.images.flatten().tolist() == [3, 4, 5, 0, 1, 2]
    again = transforms.swap_sides(turned)
    assert again.record == record
    assert torch.equal(again.images, sample.images)


def test_data_sets_apply_a_transform() -> None:
    data = zoo.data("scenes", split="test", limit=1, transform=transforms.for_model("blip_nlvr_mini"))
    torch.testing.assert_close(data[0].images, normalise(draw_sample(0, "test", 0).images))
