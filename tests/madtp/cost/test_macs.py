"""The cost model agrees with counters that watch what is executed: torch's flop counter, and a count of normalised elements."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from case_models import CASES
from rewritten_models import Subject, eager_arithmetic
from rewritten_models import subject as rewritten
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import madtp

NAMES = ("vit_registers", "vit_mean", "clip_sdpa", "siglip_eager", "blip_itm", "blip_nlvr", "towers_sequence_first_pre")
NORMS = {torch.ops.aten.native_layer_norm.default, torch.ops.aten.native_layer_norm_backward.default}


class _Norms(TorchDispatchMode):
    """Counts 5 for each element that passes a layer norm with affine parameters, 4 without."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in NORMS:
            self.total += args[0].numel() * (5 if args[2] is not None else 4)
        return func(*args, **(kwargs or {}))


def counted(run: Callable[[], object], batch: int) -> float:
    """Multiply-accumulates per sample of a run, by torch's own counter."""
    counter, norms = FlopCounterMode(display=False), _Norms()
    # Older releases count attention only where it is spelled out as matrix products.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter, norms:
        run()
    return (counter.get_total_flops() / 2 + norms.total) / batch


@pytest.fixture(autouse=True)
def plain_attention() -> Iterator[None]:
    with eager_arithmetic():
        yield


@pytest.fixture(scope="module", params=NAMES)
def subject(request: pytest.FixtureRequest) -> Subject:
    return rewritten(request.param)


@pytest.mark.parametrize(("batch", "length"), [(2, 7), (3, 9)])
def test_dense_macs_agree_with_the_counter(subject: Subject, batch: int, length: int) -> None:
    inputs = subject.case.inputs(batch, length)
    wanted = counted(lambda: subject.model(**inputs), batch)
    with subject.set(temperature=0.0) as pruned, torch.no_grad():
        pruned(**inputs)
        assert pruned.macs() == pytest.approx(wanted, rel=5e-4)
        assert sum(pruned.macs_by_module().values()) == pruned.macs()


def test_count_macs_of_an_original_agrees(subject: Subject) -> None:
    inputs = subject.case.inputs(2, 7)
    wanted = counted(lambda: subject.model(**inputs), 2)
    # The original may compute what no output reads: BLIP normalises a pooled token that it does not return.
    found = madtp.count_macs(subject.model, inputs)
    assert found == pytest.approx(wanted, rel=5e-4)
    with subject.set(temperature=0.0) as pruned, torch.no_grad():
        pruned(**inputs)
        assert pruned.macs() == found


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("gain", [0.8, 1.5])
def test_pruned_macs_agree_with_what_is_executed(subject: Subject, gain: float, merge: bool) -> None:
    inputs = subject.case.inputs(1, 9)
    if "images" in inputs:
        inputs["images"][:, 1] = inputs["images"][
            :, 0
        ]  # images that keep different counts are padded to the larger one
    with subject.set(temperature=2.0, gain=gain, merge=merge) as pruned:
        executed = counted(lambda: pruned(**inputs), 1)
        assert pruned.macs() == pytest.approx(executed, rel=0.01), executed / pruned.macs()
        assert madtp.count_macs(pruned, inputs) == pruned.macs()


def test_macs_of_a_batch_are_the_mean_over_its_samples() -> None:
    subject = rewritten("clip_sdpa")
    inputs = subject.case.inputs(4, 8)
    with subject.set(temperature=2.0) as pruned, torch.no_grad():
        pruned(**inputs)
        together = pruned.macs()
        alone = []
        for row in range(4):
            pruned(**{n: v[row : row + 1] for n, v in inputs.items()})
            alone.append(pruned.macs())
    # A similarity matrix costs each sample its share of the batch's pairs; that alone grows with the batch.
    assert together == pytest.approx(sum(alone) / 4, rel=1e-3)


def test_fewer_tokens_cost_less() -> None:
    subject = rewritten("blip_nlvr")
    inputs = CASES["blip_nlvr"].inputs(2, 8)
    costs = []
    for gain in (0.0, 1.0, 2.0):
        with subject.set(temperature=2.0, gain=gain) as pruned, torch.no_grad():
            pruned(**inputs)
            costs.append(pruned.macs())
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] < 0.9 * costs[0]


class Chosen(nn.Module):
    """A layer behind rows that are chosen by their values."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.second(self.first(x)[mask])


def test_a_cost_that_depends_on_values_is_counted_by_running() -> None:
    inputs = {"x": torch.randn(2, 10, 16), "mask": torch.arange(20).reshape(2, 10) % 4 == 0}
    assert madtp.count_macs(Chosen(), inputs) == (20 * 16 * 16 + 5 * 16 * 3) / 2
