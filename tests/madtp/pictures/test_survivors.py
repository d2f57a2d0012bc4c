"""What a model keeps of a user's own images: masks, their order and grids, and what is drawn of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import small_vit
import torch
from PIL import Image
from torch import Tensor

import madtp
from madtp.errors import ArgumentError, DataError
from madtp.pictures import fade_dropped, show, survivors


@pytest.fixture(scope="module")
def pruned() -> madtp.PrunedModel:
    model = small_vit.rewritten(2)
    model.gain = 1.0
    return model


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / name for name in ("left.png", "right.jpg")]
    for number, path in enumerate(paths):
        Image.new("RGB", (90, 60), (40 + 90 * number, 80, 120)).save(path)
    return paths


def test_the_masks_are_those_of_the_sites_without_the_class_token(
    pruned: madtp.PrunedModel, photos: list[Path]
) -> None:
    inputs = (small_vit.images(2, 5),)
    drawn = survivors(pruned, photos, inputs)
    assert [example.statement for example in drawn] == ["left.png", "right.jpg"]
    with torch.no_grad():
        pruned(*inputs)
    kept = pruned.madtp.kept_tokens()
    for number, example in enumerate(drawn):
        (patches,) = example.kept_patches
        assert patches.layers == ("layer 0", "layer 1")
        assert patches.grids == ((8, 8), (8, 8))
        for site, mask in zip(pruned.madtp.report.sites, patches.kept, strict=True):
            assert torch.equal(mask[0], kept[site.name][number, 1:])
        assert example.images.shape[:2] == (1, 3)


def test_the_model_is_left_in_its_mode(pruned: madtp.PrunedModel, photos: list[Path]) -> None:
    pruned.train()
    survivors(pruned, photos, (small_vit.images(2, 5),))
    assert pruned.training
    pruned.eval()


def test_a_picture_is_drawn_of_files_images_and_tensors(pruned: madtp.PrunedModel, photos: list[Path]) -> None:
    pixels = torch.zeros(3, 20, 30, dtype=torch.uint8)
    path = photos[0].with_name("kept.png")
    images = [photos[0], Image.new("L", (50, 50)), pixels]
    models = {"weak": pruned, "strong": pruned}
    assert show(models, images, (small_vit.images(3, 5),), path, layers=1) == path
    with Image.open(path) as drawn:
        assert drawn.width > 500


def test_what_cannot_be_drawn_is_refused(pruned: madtp.PrunedModel, photos: list[Path]) -> None:
    inputs = (small_vit.images(2, 5),)
    with pytest.raises(ArgumentError, match="no pruned model"):
        show(small_vit.vit(2), photos, inputs)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="the call has 2 images, and 1 are to be drawn"):
        show(pruned, photos[:1], inputs)
    with pytest.raises(DataError, match="images is no list of images"):
        show(pruned, str(photos[0]), inputs)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"there is no image nowhere.png"):
        show(pruned, ["nowhere.png", photos[1]], inputs)
    script = photos[0].with_name("script.jpg")
    Image.new("RGB", (8, 8)).save(script, "EPS")  # which Pillow hands to a program
    with pytest.raises(DataError, match=r"script.jpg is damaged or not an image in one of the formats"):
        show(pruned, [script, photos[1]], inputs)
    with pytest.raises(DataError, match=r"pass uint8 \[3, H, W\]"):
        show(pruned, [torch.zeros(3, 8, 8), photos[1]], inputs)
    with pytest.raises(DataError, match=r"no site in 'visual'.*blocks.0"):
        show(pruned, photos, inputs, tower="visual")


def test_patches_of_a_grid_that_is_not_square_are_faded_where_they_lie() -> None:
    image = torch.full((3, 40, 90), 100, dtype=torch.uint8)
    kept = torch.tensor([True, False, False, False, False, True])
    faded: Tensor = fade_dropped(image, kept, (2, 3))
    assert (faded[:20, :30] == 100).all()
    assert (faded[20:, 60:] == 100).all()
    assert (faded[:20, 30:] > 100).all()
