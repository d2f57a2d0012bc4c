"""The invariants of the design as tests of one subject; the files test_invariants_*.py run them on their models.

They import everything here and define the fixture `subject`. Each test is named after what holds.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from masked_oracle import expected, leaves, survivors
from rewritten_models import Subject, eager_arithmetic, gap, gradients
from torch import Tensor

TOLERANCE = 1e-5
# Matrix products of other sizes round differently, and pruned models feed that through more layers.
LOOSE = 1e-4
# Shrinking runs models hundreds of times; the drawn numbers are small as they are.
PHASES = (Phase.explicit, Phase.reuse, Phase.generate)
SIZES = ((1, 5), (2, 7), (3, 9), (5, 4))

__all__ = [
    "plain_attention",
    "test_a_sample_ignores_its_batch_mates",
    "test_gradients_with_temperature_zero_are_the_originals",
    "test_permuted_batch_permutes_outputs",
    "test_protected_tokens_survive_and_counts_never_rise",
    "test_strongest_pruning_leaves_the_minimum",
    "test_further_padding_changes_nothing",
    "test_pruned_equals_original_with_dropped_tokens_masked",
    "test_sites_are_found_in_every_layer",
    "test_temperature_zero_reproduces_the_original",
    "test_uniform_batching_gives_all_samples_the_largest_count",
]


@pytest.fixture(autouse=True)
def plain_attention() -> Iterator[None]:
    with eager_arithmetic():
        yield


def test_sites_are_found_in_every_layer(subject: Subject) -> None:
    assert {s: len(names) for s, names in subject.names.items()} == subject.case.layers
    assert len(subject.pruned.report.sites) == sum(subject.case.layers.values())


@pytest.mark.parametrize(("batch", "length"), SIZES)
@torch.no_grad()
def test_temperature_zero_reproduces_the_original(subject: Subject, batch: int, length: int) -> None:
    inputs = subject.case.inputs(batch, length)
    wanted = subject.model(**inputs)
    with subject.set(temperature=0.0) as pruned:
        found = pruned(**inputs)
    assert type(found) is type(wanted)
    assert leaves(found).keys() == leaves(wanted).keys()
    for name, value in leaves(wanted).items():
        if subject.case.exact:
            assert torch.equal(leaves(found)[name], value), name
        assert gap(value, leaves(found)[name]) < TOLERANCE, name


def test_gradients_with_temperature_zero_are_the_originals(subject: Subject) -> None:
    inputs = subject.case.inputs(2, 6)
    wanted = gradients(subject.model, lambda: leaves(subject.model(**inputs)))
    with subject.set(temperature=0.0) as pruned:
        found = gradients(pruned, lambda: leaves(pruned(**inputs)))
    assert found.keys() == wanted.keys()
    worst = max(float(g.abs().amax()) for g in wanted.values())
    for name, gradient in wanted.items():
        assert float((found[name] - gradient).abs().amax()) < TOLERANCE * worst, name


@given(batch=st.integers(1, 4), length=st.integers(4, 9), keep=st.floats(0, 1), seed=st.integers(0, 999))
@settings(max_examples=8, phases=PHASES)
@torch.no_grad()
def test_pruned_equals_original_with_dropped_tokens_masked(
    subject: Subject, batch: int, length: int, keep: float, seed: int
) -> None:
    torch.manual_seed(seed)
    case = subject.case
    inputs = case.inputs(batch, length)
    forced = {s: [torch.rand(p.shape) < keep for _ in range(case.layers[s])] for s, p in case.protected(inputs).items()}
    for masks in forced.values():
        for mask in masks:
            mask[:, 1] = True  # no tokens at all is nothing that a model could do
    kept = survivors(case, forced, inputs)
    wanted = expected(case, subject.model, inputs, kept)
    with subject.set(forced=forced, merge=False) as pruned:
        found = leaves(pruned(**inputs))
        survived = pruned.kept_tokens()
    for stream, names in subject.names.items():
        for layer, name in enumerate(names):
            assert torch.equal(survived[name], kept[stream][layer]), name
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert gap(value, found[name]) < TOLERANCE, name


@given(
    batch=st.integers(2, 4), length=st.integers(4, 9), temperature=st.sampled_from([1.0, 8.0]), seed=st.integers(0, 999)
)
@settings(max_examples=5, phases=PHASES)
@torch.no_grad()
def test_a_sample_ignores_its_batch_mates(
    subject: Subject, batch: int, length: int, temperature: float, seed: int
) -> None:
    torch.manual_seed(seed)
    inputs = subject.case.inputs(batch, length)
    with subject.set(temperature=temperature) as pruned:
        together, kept = leaves(pruned(**inputs)), pruned.kept_tokens()
        for row in range(batch):
            alone = leaves(pruned(**{n: v[row : row + 1] for n, v in inputs.items()}))
            for name, mask in pruned.kept_tokens().items():
                assert torch.equal(mask, kept[name].unflatten(0, (-1, batch))[:, row]), name
            for name, value in alone.items():
                inside = together[name][row : row + 1, row : row + 1] if name in subject.case.coupled else None
                assert gap(together[name][row : row + 1] if inside is None else inside, value) < LOOSE, name


@torch.no_grad()
def test_permuted_batch_permutes_outputs(subject: Subject) -> None:
    inputs = subject.case.inputs(4, 7)
    order = torch.tensor([2, 0, 3, 1])
    with subject.set(temperature=4.0) as pruned:
        wanted = leaves(pruned(**inputs))
        found = leaves(pruned(**{n: v[order] for n, v in inputs.items()}))
    for name, value in wanted.items():
        moved = value[order][:, order] if name in subject.case.coupled else value[order]
        assert gap(moved, found[name]) < LOOSE, name


@given(more=st.integers(1, 4), seed=st.integers(0, 999))
@settings(max_examples=3, phases=PHASES)
@torch.no_grad()
def test_further_padding_changes_nothing(subject: Subject, more: int, seed: int) -> None:
    if not subject.case.text or subject.case.name.startswith("siglip"):
        pytest.skip("the model reads no text, or reads its last position whatever stands there")
    torch.manual_seed(seed)
    inputs = subject.case.inputs(3, 8)
    padded = {
        n: torch.nn.functional.pad(v, (0, more)) if n in ("input_ids", "attention_mask") else v
        for n, v in inputs.items()
    }
    with subject.set(temperature=4.0) as pruned:
        wanted, counts = leaves(pruned(**inputs)), pruned.token_counts()
        found = leaves(pruned(**padded))
        for name, count in pruned.token_counts().items():
            assert torch.equal(count, counts[name]), name
    for name, value in wanted.items():
        cut = found[name][:, : value.shape[1]] if subject.case.full.get(name) == "text" else found[name]
        assert gap(value, cut) < LOOSE, name


@given(
    temperature=st.sampled_from([0.5, 2.0, 50.0]),
    gain=st.floats(0, 3),
    merge=st.booleans(),
    least=st.integers(0, 3),
    seed=st.integers(0, 999),
)
@settings(max_examples=6, phases=PHASES)
@torch.no_grad()
def test_protected_tokens_survive_and_counts_never_rise(
    subject: Subject, temperature: float, gain: float, merge: bool, least: int, seed: int
) -> None:
    torch.manual_seed(seed)
    inputs = subject.case.inputs(3, 8)
    protected, valid = subject.case.protected(inputs), subject.case.valid(inputs)
    with subject.set(temperature=temperature, gain=gain, merge=merge, min_tokens=least) as pruned:
        pruned(**inputs)
        kept, counts = pruned.kept_tokens(), pruned.token_counts()
    for stream, names in subject.names.items():
        before: Tensor | None = None
        fewer = valid[stream].sum(1) + (protected[stream] & ~valid[stream]).sum(1)
        for layer, name in enumerate(names):
            assert bool(kept[name][protected[stream]].all()), name
            assert not bool(kept[name][~valid[stream] & ~protected[stream]].any()), name
            assert bool((counts[name] <= fewer).all()), name
            candidates = (valid[stream] & ~protected[stream]).sum(1)
            assert bool((counts[name] - protected[stream].sum(1) >= candidates.clamp(max=least)).all()), name
            if before is not None:
                assert bool((kept[name] <= before).all()), name
            extra = counts[name] - kept[name].sum(1)
            assert bool((extra >= 0).all())
            assert bool((extra <= (layer + 1) * merge).all()), name
            before, fewer = kept[name], counts[name]


@torch.no_grad()
def test_strongest_pruning_leaves_the_minimum(subject: Subject) -> None:
    inputs = subject.case.inputs(3, 9)
    protected, valid = subject.case.protected(inputs), subject.case.valid(inputs)
    with subject.set(temperature=1e4, gain=1e4, min_tokens=2, merge=False) as pruned:
        pruned(**inputs)
        for stream, names in subject.names.items():
            for name in names:
                left = pruned.token_counts()[name] - protected[stream].sum(1)
                assert torch.equal(left, (valid[stream] & ~protected[stream]).sum(1).clamp(max=2)), name


@torch.no_grad()
def test_uniform_batching_gives_all_samples_the_largest_count(subject: Subject) -> None:
    inputs = subject.case.inputs(3, 8)
    if "attention_mask" in inputs:
        inputs["input_ids"][:] = inputs["input_ids"][:1]
        inputs["attention_mask"][:] = 1
    with subject.set(temperature=2.0, merge=False) as pruned:
        pruned(**inputs)
        own = pruned.token_counts()
    with subject.set(temperature=2.0, merge=False, batching="uniform") as pruned:
        pruned(**inputs)
        for names in subject.names.values():
            for name in names:
                counts = pruned.token_counts()[name]
                assert bool((counts == counts[0]).all()), name
            assert int(pruned.token_counts()[names[0]][0]) == int(own[names[0]].max())
