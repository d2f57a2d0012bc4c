"""Assembly with fixed counts, against a loop over samples."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from madtp.tokens.state import unpruned_state
from madtp.tokens.static_assembly import StaticDecision, StaticGroup, assemble_static, select_static


@st.composite
def decisions(draw: st.DrawFn) -> StaticDecision:
    """One or two groups of candidates, some padding, and at most as many required tokens as there is room for."""
    batch, length, groups = draw(st.integers(1, 3)), draw(st.integers(4, 12)), draw(st.integers(1, 2))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    scores = torch.rand(batch, length, generator=generator)
    room = draw(st.integers(0, 2))
    kind = torch.randint(0, groups, (batch, length), generator=generator)
    required = torch.zeros(batch, length, dtype=torch.bool)
    for sample in range(batch):
        own = draw(st.integers(0, room))
        required[sample, torch.randperm(length, generator=generator)[:own]] = True
    valid = None
    if draw(st.booleans()):
        ends = torch.randint(1, length + 1, (batch, 1), generator=generator)
        valid = torch.arange(length) < ends
    candidates = ~required if valid is None else ~required & valid
    counts = [draw(st.integers(0, (length - room - 2) // groups)) for _ in range(groups)]
    return StaticDecision(
        groups=[
            StaticGroup(candidates=candidates & (kind == number), ranking=scores, count=count)
            for number, count in enumerate(counts)
        ],
        required=required,
        room=room,
        varies=True,
        scores=scores.masked_fill(~candidates, 0.0),
        valid=valid,
    )


def kept_by_loop(decision: StaticDecision, sample: int) -> set[int]:
    """The required tokens, what each group likes best, and further candidates while slots are free."""
    kept = set(decision.required[sample].nonzero().flatten().tolist())
    left: list[int] = []
    for group in decision.groups:
        inside = group.candidates[sample].nonzero().flatten().tolist()
        ranked = sorted(inside, key=lambda token: -float(group.ranking[sample, token]))
        free = group.count if len(decision.groups) > 1 else len(inside)
        kept |= set(ranked[: min(free, decision.kept - len(kept))])
        left += ranked[free:]
    left.sort(key=lambda token: -float(decision.scores[sample, token]))
    return kept | set(left[: decision.kept - len(kept)])


def by_sample(rows: Tensor, batch: int) -> Tensor:
    return rows.unflatten(0, (batch, -1))


@given(decisions())
def test_every_sample_keeps_its_best_tokens_in_as_many_slots(decision: StaticDecision) -> None:
    batch = len(decision.scores)
    selection = select_static(decision)
    assert selection.slots.shape == (batch, decision.kept)
    assert (selection.slots.diff(dim=1) > 0).all()
    for sample in range(batch):
        assert set(selection.survivors[sample].nonzero().flatten().tolist()) == kept_by_loop(decision, sample)


@given(decisions())
def test_dropped_tokens_become_one_token_of_each_group(decision: StaticDecision) -> None:
    batch, length = decision.scores.shape
    tokens = torch.randn(batch, length, 3, generator=torch.Generator().manual_seed(0))
    selection = select_static(decision)
    rows, state = assemble_static(
        tokens.flatten(0, 1), unpruned_state(batch, length), decision, selection, merge=True, causal=False
    )
    assert state.length == decision.kept + len(decision.groups)
    assert state.index is not None
    assert state.merged is not None
    slots = by_sample(rows, batch)
    valid = torch.ones_like(state.merged) if state.valid is None else state.valid
    for sample in range(batch):
        for slot in range(decision.kept):
            assert torch.equal(slots[sample, slot], tokens[sample, state.index[sample, slot]])
            assert bool(valid[sample, slot]) == bool(selection.survivors[sample, state.index[sample, slot]])
        for number, group in enumerate(decision.groups):
            dropped = (group.candidates & ~selection.survivors)[sample]
            merged = slots[sample, decision.kept + number]
            assert bool(valid[sample, decision.kept + number]) == bool(dropped.any())
            if dropped.any():
                weights = decision.scores[sample][dropped]
                mean = (weights[:, None] * tokens[sample][dropped]).sum(0) / weights.sum()
                assert torch.allclose(merged, mean, atol=1e-5)


@given(decisions())
def test_without_merging_nothing_is_added(decision: StaticDecision) -> None:
    batch, length = decision.scores.shape
    rows, state = assemble_static(
        torch.randn(batch * length, 3),
        unpruned_state(batch, length),
        decision,
        select_static(decision),
        merge=False,
        causal=False,
    )
    assert len(rows) == batch * decision.kept
    assert state.merged is not None
    assert not state.merged.any()
