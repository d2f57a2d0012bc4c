"""Blocks that a model calls one by one, where no submodule runs them all."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from chain_hosts import (
    Alone,
    Alternating,
    Attributes,
    Biased,
    BiasedBlock,
    Collecting,
    Decoding,
    Dicts,
    Inside,
    Loop,
    Named,
    Noting,
    Pairs,
    Reading,
    SideBySide,
    Sliced,
    Tuples,
    Twice,
    Uneven,
    Wayward,
    loop_inputs,
)
from model_case import Tensors, lively
from rewritten_models import eager_arithmetic, gap, gradients
from torch import Tensor, nn

import madtp
from madtp.cost.counting import Counter
from madtp.errors import ExportError, UnprunedError
from madtp.sites.stream_start import SUFFIX

CONFIG = madtp.PruningConfig(alignment_tokens=5, temperature=4.0)
Pair = tuple[Any, madtp.PrunedModel]


@pytest.fixture(autouse=True)
def plain_attention() -> Iterator[None]:
    with eager_arithmetic():
        yield


def _rewritten(make: Callable[[], nn.Module], config: madtp.PruningConfig = CONFIG) -> Pair:
    torch.manual_seed(0)
    with eager_arithmetic():
        model = lively(make())
        return model, madtp.rewrite(model, loop_inputs(), config=config)


@pytest.fixture(scope="module")
def looping() -> Pair:
    return _rewritten(Loop)


@pytest.fixture(scope="module")
def wayward() -> Pair:
    return _rewritten(Wayward)


def _gradients(model: nn.Module, inputs: Tensors) -> Tensors:
    found = gradients(model, lambda: {"out": model(**inputs)})
    return {n: g for n, g in found.items() if not n.startswith("madtp.")}


def _same_gradients(model: nn.Module, pruned: madtp.PrunedModel, inputs: Tensors) -> bool:
    with pruned.dense():
        wanted, found = _gradients(model, inputs), _gradients(pruned, inputs)
    return wanted.keys() == found.keys() and all(gap(wanted[n], found[n]) < 1e-5 for n in wanted)


@pytest.mark.parametrize(
    ("make", "regions"),
    [
        (Loop, ["blocks.0 to blocks.2"]),
        (Attributes, ["block1 to final"]),
        (Named, ["blocks.a to blocks.c"]),
        (Sliced, ["blocks.0 to blocks.1", "blocks.2 to blocks.3"]),
        (Tuples, ["blocks.0 to blocks.2"]),
        (Dicts, ["blocks.0 to blocks.2"]),
        (Biased, ["blocks.0 to blocks.2"]),
        (Alternating, ["blocks.0.0 to blocks.2.1"]),
        (Inside, ["inner.blocks.0 to inner.blocks.2"]),
        (Twice, ["blocks.0 to blocks.2"]),
        (SideBySide, ["image.0 to image.1", "text.0 to text.1"]),
    ],
)
def test_blocks_that_hand_one_tensor_on_are_a_region(make: Callable[[], nn.Module], regions: list[str]) -> None:
    model, pruned = _rewritten(make)
    report = pruned.report
    assert report.capture == "regions"
    assert list(report.regions) == regions
    assert len(report.sites) == sum(isinstance(m, (nn.MultiheadAttention, BiasedBlock)) for m in model.modules())
    for batch, length in ((3, 9), (1, 6), (4, 12)):
        inputs = loop_inputs(batch, length)
        with torch.no_grad(), pruned.dense():
            assert gap(model(**inputs), pruned(**inputs)) < 1e-5
    inputs = loop_inputs()
    assert _same_gradients(model, pruned, inputs)
    with torch.no_grad():
        pruned(**inputs)
    assert pruned.token_counts().keys() == {site.name for site in report.sites}
    assert pruned.macs() < 0.9 * sum(pruned.macs_by_module("all").values())
    assert report.unpruned == []


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Collecting, "what it returns is read by more than blocks.1"),
        (Pairs, "it returns 2 tensors"),
        (Uneven, "called more or less often than the block after it"),
        (Noting, "takes an object"),
        (Alone, "data-dependent Python"),
    ],
)
def test_other_blocks_are_refused_with_reasons(make: Callable[[], nn.Module], reason: str) -> None:
    with pytest.raises(madtp.MadtpError, match=reason):
        _rewritten(make)


@torch.no_grad()
def test_dropping_tokens_equals_hiding_them(looping: Pair) -> None:
    model, pruned = looping
    inputs = loop_inputs(3, 9)
    x, hidden = model.embed(**inputs)
    torch.manual_seed(1)
    other = copy.deepcopy(pruned)
    other.madtp.config = madtp.PruningConfig(alignment_tokens=5, merge=False)
    other.madtp.control.forced = {site.name: torch.rand(hidden.shape) < 0.6 for site in pruned.report.sites}
    found, kept = other(**inputs), other.kept_tokens()
    for name, block in model.blocks.named_children():
        x = block(x, hidden)
        hidden = hidden | ~kept[f"blocks.{name}"]
    assert not all(bool(mask.all()) for mask in kept.values())
    assert gap(model.head(x[:, 0]), found) < 1e-5


@torch.no_grad()
def test_a_sample_ignores_its_batch_mates(looping: Pair) -> None:
    _, pruned = looping
    inputs = loop_inputs()
    inputs["attention_mask"][:] = 1
    together, counts = pruned(**inputs), pruned.token_counts()
    for row in range(3):
        alone = pruned(**{n: x[row : row + 1] for n, x in inputs.items()})
        assert gap(together[row : row + 1], alone) < 1e-4
        assert all(int(c) == int(counts[n][row]) for n, c in pruned.token_counts().items())


@torch.no_grad()
def test_macs_add_up_to_what_the_original_takes(looping: Pair) -> None:
    model, pruned = looping
    inputs = loop_inputs(3, 10)
    with Counter(lambda: False) as counter:
        model(**inputs)
    with pruned.dense():
        pruned(**inputs)
        assert pruned.macs() == pytest.approx(counter.total / 3, rel=1e-3)
    assert madtp.count_macs(model, inputs) == pytest.approx(counter.total / 3, rel=1e-3)


@pytest.mark.parametrize(
    ("mode", "reason"),
    [
        ("skip a block", "blocks.2 was not called with what blocks.1 returned"),
        ("leave early", "what blocks.1 returns is read by more than the next block"),
        ("collect", "what blocks.0 returns is read after the blocks have run as one"),
        ("write into the result", "what blocks.0 returns is read by more than the next block"),
        ("write into a mask", "a tensor that blocks.0 was called with was changed in place"),
        ("freeze the first block", "gradients, autocast or a checkpoint begin or end between blocks.0 and blocks.1"),
        ("checkpoint", "gradients, autocast or a checkpoint begin or end between blocks.0 and blocks.1"),
        ("reentrant checkpoint", "gradients, autocast or a checkpoint begin or end between blocks.0 and blocks.1"),
    ],
)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_what_departs_from_the_chain_runs_as_the_original(
    wayward: Pair, mode: str, reason: str, training: bool
) -> None:
    model, pruned = copy.deepcopy(wayward)
    for one in (model, pruned):
        one.mode = mode
        one.train(training)
    inputs = loop_inputs()
    assert _same_gradients(model, pruned, inputs)
    found = pruned(**inputs)
    assert type(found) is Tensor
    assert gap(model(**inputs), found) < 1e-5
    assert any(u.called == "blocks.0 to blocks.2" and reason in u.reason for u in pruned.report.unpruned)


@torch.no_grad()
def test_a_call_that_departs_leaves_others_pruned(wayward: Pair) -> None:
    model, pruned = copy.deepcopy(wayward)
    inputs = loop_inputs()
    model.mode = pruned.mode = "collect"
    assert gap(model(**inputs), pruned(**inputs)) < 1e-5
    pruned.mode = ""
    pruned(**inputs)
    assert len(pruned.token_counts()) == 3


class Undecided(Loop):
    """Leaves the loop early where texts differ in length."""

    def run(self, x: Tensor, padding: Tensor) -> Tensor:
        for number, block in enumerate(self.blocks):
            if number == 2 and bool(padding.any()):
                break
            x = block(x, padding)
        return x


@torch.no_grad()
def test_values_may_decide_how_far_the_chain_goes() -> None:
    torch.manual_seed(0)
    full, padded = loop_inputs(), loop_inputs()
    full["attention_mask"][:] = 1
    model = lively(Undecided())
    pruned = madtp.rewrite(model, full, config=CONFIG)
    assert len(pruned.report.sites) == 3
    for inputs, sites in ((padded, 0), (full, 3), (padded, 0), (full, 3)):
        found = pruned(**inputs)
        states = pruned.madtp.control.last_record().states
        assert len([name for name in states if not name.endswith(SUFFIX)]) == sites
        assert (gap(model(**inputs), found) < 1e-5) == (not sites)
    assert any("blocks.1 returns is read" in note for note in pruned.report.notes)


@torch.no_grad()
def test_blocks_may_be_called_in_another_way_later(wayward: Pair) -> None:
    model, pruned = copy.deepcopy(wayward)
    inputs = loop_inputs()
    model.mode = pruned.mode = "give no mask"
    with pruned.dense():
        assert gap(model(**inputs), pruned(**inputs)) < 1e-5
    pruned(**inputs)
    assert len(pruned.token_counts()) == 3
    assert pruned.report.unpruned == []


@torch.no_grad()
def test_image_tokens_among_the_words_of_a_decoder_are_pruned() -> None:
    model, pruned = _rewritten(Decoding)
    assert [(s.name, s.segments) for s in pruned.report.sites] == [(f"blocks.{i}", ("image",)) for i in range(3)]
    for batch, length in ((3, 9), (1, 6)):
        inputs = loop_inputs(batch, length)
        with pruned.dense():
            assert gap(model(**inputs), pruned(**inputs)) < 1e-5
        pruned(**inputs)
        kept = pruned.kept_tokens()["blocks.2"]
        assert bool(kept[:, 0].all())
        assert bool(kept[:, 17:].all()), "words are left alone"
        assert not bool(kept.all())


@torch.no_grad()
def test_a_chain_replaces_regions_that_are_single_blocks() -> None:
    model, pruned = _rewritten(Reading)
    assert pruned.report.regions == ("image.0 to image.1", "text.0 to text.1")
    assert [site.name for site in pruned.report.sites] == ["image.0", "image.1", "text.0", "text.1"]
    inputs = loop_inputs(2, 8)
    with pruned.dense():
        assert gap(model(**inputs), pruned(**inputs)) < 1e-5
    pruned(**inputs)
    counts = pruned.token_counts()
    assert bool((counts["text.1"] <= counts["text.0"]).all())


def test_strict_models_raise_where_a_call_departs() -> None:
    pruned = _rewritten(Wayward, madtp.PruningConfig(strict=True))[1]
    pruned.mode = "skip a block"
    with pytest.raises(UnprunedError, match=r"blocks\.2 was not called with"):
        pruned(**loop_inputs())


@torch.no_grad()
def test_hooks_see_the_values_of_the_original(looping: Pair) -> None:
    model, pruned = copy.deepcopy(looping)
    inputs, seen = loop_inputs(), {}
    for name, one in (("model", model), ("pruned", pruned)):
        one.blocks[0].register_forward_hook(lambda module, args, output, name=name: seen.update({name: output}))
    assert gap(model(**inputs), pruned(**inputs)) < 1e-5
    assert gap(seen["model"], seen["pruned"]) < 1e-5
    assert any("hooks on blocks.0" in note for note in pruned.report.notes)


@torch.no_grad()
def test_a_block_by_itself_runs_as_the_original(looping: Pair) -> None:
    model, pruned = copy.deepcopy(looping)
    x = torch.randn(2, 5, 16)
    found = pruned.blocks[0](x)
    assert type(found) is Tensor
    assert torch.equal(found, model.blocks[0](x))
    assert any("blocks.0 was called outside of a call of the model" in note for note in pruned.report.notes)


def test_the_host_keeps_its_parts(looping: Pair) -> None:
    model, pruned = looping
    assert [n for n in pruned.state_dict() if not n.startswith("madtp.")] == list(model.state_dict())
    assert pruned.blocks[0].mlp[0].weight is model.blocks[0].mlp[0].weight
    assert "forward" not in model.blocks[0].__dict__


@torch.no_grad()
def test_copies_are_independent(looping: Pair) -> None:
    pruned, inputs = looping[1], loop_inputs()
    before, other = pruned(**inputs), copy.deepcopy(pruned)
    assert torch.equal(other(**inputs), before)
    other.blocks[0].mlp[0].weight.zero_()
    assert not torch.equal(other(**inputs), before)
    assert torch.equal(pruned(**inputs), before)


@torch.no_grad()
def test_saved_and_pickled_models_prune_alike(looping: Pair, tmp_path: Path) -> None:
    _, pruned = looping
    inputs = loop_inputs()
    madtp.save(pruned, tmp_path / "saved")
    for again in (madtp.load(tmp_path / "saved", Loop().eval()), pickle.loads(pickle.dumps(pruned))):
        assert again.report.regions == pruned.report.regions
        assert torch.equal(again(**inputs), pruned(**inputs))


@torch.no_grad()
def test_threads_do_not_meet(looping: Pair) -> None:
    _, pruned = looping
    batches = [loop_inputs(batch, 8) for batch in (1, 2, 3)]
    wanted = [pruned(**one) for one in batches]
    found: dict[int, list[Tensor]] = {}

    def work(number: int) -> None:
        with torch.no_grad(), eager_arithmetic():
            found[number] = [pruned(**batches[number]) for _ in range(5)]

    threads = [Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(gap(want, one) < 1e-5 for number, want in enumerate(wanted) for one in found[number])


def test_chains_train(looping: Pair) -> None:
    pruned, inputs = copy.deepcopy(looping[1]).train(), loop_inputs()
    optimizer = torch.optim.Adam(pruned.parameters(), 1e-2)
    losses = []
    for _ in range(6):
        loss = pruned(**inputs).square().mean() + 0.1 * pruned.alignment_loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert not [n for n, p in pruned.named_parameters() if p.grad is None and not n.startswith("madtp.")]
    assert pruned.report.unpruned == []


def test_gradient_checkpointing_keeps_the_gradients(looping: Pair) -> None:
    model, pruned = copy.deepcopy(looping)
    pruned.gradient_checkpointing = True
    assert _same_gradients(model, pruned, loop_inputs())


@torch.no_grad()
def test_calibrate_and_freeze(looping: Pair) -> None:
    pruned, inputs = copy.deepcopy(looping[1]), loop_inputs()
    pruned.temperature = 1.0
    result = madtp.calibrate(pruned, [inputs], reduction=0.25, tolerance=0.05)
    assert abs(result.reduction_reached - 0.25) < 0.05
    assert {name.partition("[")[0] for name in madtp.freeze(pruned, [inputs])} == {s.name for s in pruned.report.sites}


@torch.no_grad()
def test_compilers_break_the_graph_and_exports_say_so(looping: Pair) -> None:
    model, pruned = copy.deepcopy(looping)
    inputs = loop_inputs()
    compiled = torch.compile(pruned, backend="eager")
    assert torch.equal(compiled(**inputs), pruned(**inputs))
    with pruned.dense():
        assert gap(model(**inputs), compiled(**inputs)) < 1e-5
    with pytest.raises(ExportError, match=r"blocks\.0 to blocks\.2 one by one"), pruned.dense():
        torch.export.export(nn.Sequential(*pruned.blocks), (torch.randn(2, 5, 16),), strict=False)


@torch.no_grad()
def test_a_plan_of_a_chain_can_be_edited(looping: Pair) -> None:
    model, pruned = looping
    plan = madtp.Plan.from_dict(pruned.report.plan)
    again = madtp.rewrite(model, loop_inputs(), config=CONFIG, plan=plan.without(["blocks.1"], ()))
    assert [s.name for s in again.report.sites] == ["blocks.0", "blocks.2"]
