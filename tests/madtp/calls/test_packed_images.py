"""Calls of several images taken apart into images, and put together again."""

from __future__ import annotations

import torch

from madtp.calls.call import Call
from madtp.calls.packed_images import ImageRows, PerImageArguments, by_kind

ARGUMENTS = PerImageArguments(("grid", "crop"), (ImageRows("patches", 0, 1),), (torch.long, torch.long))


def call_of(grid: list[list[int]], crop: list[list[int]]) -> Call:
    patches = torch.arange(sum(height * width for height, width in grid) * 3.0).reshape(-1, 3)
    return Call((), {"grid": torch.tensor(grid), "crop": torch.tensor(crop), "patches": patches})


def test_images_put_together_give_the_call() -> None:
    call = call_of([[2, 2], [1, 3], [2, 2]], [[1], [2], [1]])
    images = ARGUMENTS.images(call)
    assert images is not None
    assert [tuple(image.parts[0].shape) for image in images] == [(4, 3), (3, 3), (4, 3)]
    assert by_kind(images) == [[0, 2], [1]]
    again = ARGUMENTS.join(call, images)
    for name, value in call.kwargs.items():
        assert torch.equal(again.kwargs[name], value)


def test_arguments_that_name_different_numbers_of_images_are_no_images() -> None:
    assert ARGUMENTS.images(call_of([[2, 2], [1, 3]], [[1]])) is None


def test_arguments_that_hold_fewer_patches_than_the_sizes_say_are_no_images() -> None:
    call = call_of([[2, 2], [1, 3]], [[1], [2]])
    assert ARGUMENTS.images(Call((), {**call.kwargs, "patches": call.kwargs["patches"][1:]})) is None
