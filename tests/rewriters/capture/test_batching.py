"""Batching: the graph of one image, written for several, gives what one image after the other gives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rewriters.capture.batch_images import batched
from rewriters.capture.constants import FoldingConstants
from rewriters.graph.nodes import AxisError

TABLE = torch.arange(60.0).reshape(12, 5) / 60
ORDER = torch.arange(12).flip(0)
KERNEL = torch.randn(7, 1, 2, generator=torch.Generator().manual_seed(0))
Function = Callable[[Tensor], Tensor]

FORMS: dict[str, Function] = {
    "addition": lambda x: x + TABLE,
    "addition, other order": lambda x: TABLE + x,
    "a lower rank": lambda x: x.mean(0) + x,
    "a higher rank": lambda x: x + TABLE.expand(3, 12, 5),
    "linear": lambda x: F.linear(x, TABLE),
    "norm": lambda x: F.layer_norm(x, (5,)),
    "softmax": lambda x: x.softmax(-1) + x.softmax(0),
    "batch of one": lambda x: (x[None] * 2 + TABLE[None]).softmax(1).squeeze(0),
    "batch of one, read": lambda x: x.unsqueeze(0).sin()[0],
    "batch of one, moved": lambda x: x[None].transpose(0, 1).permute(2, 1, 0),
    "heads": lambda x: x.reshape(12, 5, 1).permute(1, 0, 2).flatten(1),
    "unbind": lambda x: x.reshape(4, 3, 5).unbind(1)[1] + x.reshape(4, 3, 5).unbind(1)[2],
    "split": lambda x: torch.cat([part * i for i, part in enumerate(x.split([3, 4, 5]))]),
    "split of one": lambda x: torch.cat([part.sin() for part in x.split([12])]),
    "stack": lambda x: torch.stack([x, TABLE], 1),
    "slices": lambda x: x[2:7, 1:] * x[3:8, :1],
    "reordered": lambda x: x[ORDER],
    "reordered by groups": lambda x: x.reshape(4, 3, 5)[ORDER[:4] // 3],
    "columns": lambda x: x[:, ORDER[:5] % 5],
    "reductions": lambda x: x.sum() + x.mean(1) + x.amax(0).sum(),
    "products": lambda x: x @ x.T @ TABLE,
    "products of vectors in rows": lambda x: x[:1] @ TABLE.T,
    "batches of products": lambda x: torch.bmm(x.reshape(3, 4, 5), x.reshape(3, 5, 4)),
    "einsum": lambda x: torch.einsum("nc,mc->nm", x, TABLE),
    "convolution of patches": lambda x: F.conv1d(x.unsqueeze(1), KERNEL),
    "convolution of one": lambda x: F.conv1d(x.reshape(1, 1, 60), KERNEL),
    "convolution without a batch": lambda x: F.conv1d(x.reshape(1, 60), KERNEL),
    "attention": lambda x: F.scaled_dot_product_attention(*[x.reshape(1, 3, 4, 5)] * 3),
    "attention of heads": lambda x: F.scaled_dot_product_attention(*[x.reshape(3, 4, 5)] * 3),
    "attention in windows": lambda x: F.scaled_dot_product_attention(*[x.reshape(2, 3, 2, 5)] * 3, TABLE[:2, :2]),
    "padding": lambda x: F.pad(x, (1, 2)) + F.pad(x[:, :1], (0, 0, 3, -3)).sum(),
    "repeat": lambda x: x.repeat(2, 1) + x[:1].expand(24, 5),
    "cumulative": lambda x: x.cumsum(0).flip(1).roll(2, 0),
    "made": lambda x: x.new_zeros(3, 2) + x.new_ones(1, 2) * x.new_full((3, 1), 2.0) + x[:3, :2],
    "rows added": lambda x: x.new_zeros(4, 5).index_add(0, ORDER % 4, x),
    "columns added": lambda x: TABLE.index_add(-1, ORDER[:3] % 5, x[:, :3]),
    "rows of one added": lambda x: x[None].index_add(1, ORDER[:2], x[None, 4:6]),
    "rows put": lambda x: x.index_copy(0, ORDER[:2], x[4:6]),
    "writing": lambda x: x.clone().mul_(2),
    "masks that are known": lambda x: x[TABLE[:, 0] > 0.4],
    "what depends on no image": lambda x: TABLE * 2,
}


class _Module(nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.function(x),)


def _batched(function: Function, x: Tensor) -> Callable[[Tensor], Tensor]:
    with FoldingConstants():
        program = torch.export.export(_Module(function), (x[0],), strict=False)
    module = program.module(check_guards=False)
    values = dict(program.constants) | dict(program.named_buffers())
    (image,) = [n for n in module.graph.nodes if n.op == "placeholder"]
    for node in module.graph.nodes:
        if node.op == "get_attr" and "val" not in node.meta:
            node.meta["val"] = image.meta["val"].fake_mode.from_tensor(values[str(node.target)], static_shapes=True)
    graph = batched(module.graph, [image], [x])
    return lambda y: torch.fx.GraphModule(module, graph)(y)[0]


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_several_images_give_what_one_after_the_other_gives(form: str) -> None:
    function = FORMS[form]
    run = _batched(function, torch.randn(3, 12, 5))
    for count in (2, 5):
        x = torch.randn(count, 12, 5)
        torch.testing.assert_close(run(x), torch.stack([function(one) for one in x]))


@pytest.mark.parametrize(
    ("form", "words"),
    [
        (lambda x: x.sort(0).values, "no rule for doing sort"),
        (lambda x: F.linear(TABLE, x), "depends on the image"),
        (lambda x: x.reshape(3, 4, 5)[ORDER[:2] % 3, :, ORDER[:2] % 5], "not neighbours"),
        (lambda x: x.roll(1), "along no dimension"),
    ],
)
def test_what_has_no_rule_is_refused(form: Function, words: str) -> None:
    with pytest.raises(AxisError, match=words):
        _batched(form, torch.randn(3, 12, 5))
