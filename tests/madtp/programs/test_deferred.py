"""Tensors whose values are computed when something reads them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from madtp.errors import MadtpError
from madtp.programs.deferred import Deferred, Form, deferred, settled


class Product:
    """Promises what a layer computes, and counts how often it does."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.layer, self.x, self.times = nn.Linear(4, 4), torch.randn(2, 4), 0
        self.kept: Tensor | None = None

    def value(self) -> Tensor:
        if self.kept is None:
            self.times += 1
            with torch.enable_grad():
                self.kept = self.layer(self.x)
        return self.kept

    def deferred(self) -> Deferred:
        return deferred(self, Form(self.x.shape, self.x.dtype, self.x.device), [self.x, *self.layer.parameters()])


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return 2 * gradients[0] * ctx.saved_tensors[0]


def _past_python(x: Tensor) -> Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        return x * x


def _twice(x: Tensor) -> Tensor:
    return torch.cat([x, x]).square()


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.shape,
        lambda x: x.size(0),
        lambda x: x.dtype,
        lambda x: x.device,
        lambda x: x.requires_grad,
        lambda x: (x.dim(), x.ndim, x.numel(), len(x)),
        torch.is_floating_point,
    ],
)
def test_what_needs_no_values_computes_none(read: Callable[[Tensor], object]) -> None:
    product = Product()
    waiting = product.deferred()
    found = read(waiting)
    assert not product.times
    assert found == read(product.value())


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x + 1,
        lambda x: 1 - x,
        lambda x: x[:, 0],
        lambda x: torch.cat([x, torch.zeros(2, 4)]),
        lambda x: nn.functional.layer_norm(x, (4,)),
        lambda x: x.sum().item(),
        lambda x: x.stride(),
        lambda x: x.tolist(),
        lambda x: repr(x),
        lambda x: copy.deepcopy(x.detach()),
    ],
)
def test_whatever_else_touches_it_gets_its_values(read: Callable[[Tensor], Any]) -> None:
    product = Product()
    found, wanted = read(product.deferred()), read(product.value())
    assert product.times == 1
    assert type(found) is type(wanted)
    assert torch.equal(found, wanted) if isinstance(found, Tensor) else found == wanted


@pytest.mark.parametrize("read", [torch.square, Square.apply, _past_python, _twice])
def test_gradients_go_on_to_what_it_is_computed_from(read: Callable[[Tensor], Tensor]) -> None:
    found, wanted = Product(), Product()
    read(found.deferred()).sum().backward()
    read(wanted.value()).sum().backward()
    for one, other in zip(found.layer.parameters(), wanted.layer.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_gradients_that_reach_it_alone_go_on() -> None:
    found, wanted = Product(), Product()
    torch.autograd.backward([found.deferred()], [torch.ones(2, 4)])
    wanted.value().sum().backward()
    torch.testing.assert_close(found.layer.weight.grad, wanted.layer.weight.grad)


def test_a_function_that_gives_it_gradients_later_keeps_them() -> None:
    class Doubling(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return product.deferred()

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Tensor:
            return 2 * gradients[0]

    product, x = Product(), torch.randn(2, 4, requires_grad=True)
    made = Doubling.apply(x)
    product.kept = product.value().detach()
    (made + 1).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.full((2, 4), 2.0))


def test_writing_into_it_past_python_is_an_error() -> None:
    waiting = Product().deferred()
    with (
        torch.no_grad(),
        torch._C.DisableTorchFunctionSubclass(),
        pytest.raises(MadtpError, match="writes into what a block returns"),
    ):
        waiting.add_(1)


def test_containers_are_settled() -> None:
    product = Product()
    plain = {"x": torch.ones(2), "y": [1, None]}
    assert settled(plain) is plain
    found = settled({"x": (product.deferred(), 3)})
    assert type(found["x"][0]) is Tensor
    assert found["x"][1] == 3
