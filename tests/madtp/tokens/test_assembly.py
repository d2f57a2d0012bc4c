"""What a site's decision makes of a stream, against plain loops over samples and tokens."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from madtp.config import PruningConfig
from madtp.method.arrays import on_host
from madtp.tokens.assembly import Decision, JudgedGroup, assemble, summed_rows
from madtp.tokens.packing import in_slots
from madtp.tokens.state import TokenState, unpruned_state

OURS, WIDTH = PruningConfig(), 3


def judged(first: int, candidates: np.ndarray | None, importance: Tensor) -> JudgedGroup:
    return JudgedGroup(first, candidates, importance, on_host(importance))


@st.composite
def decisions(draw: st.DrawFn, batch: int, length: int, real: np.ndarray | None = None) -> Decision:
    """Decisions about one or two groups; ``real [B, N]`` are the slots that hold a token."""
    generator = np.random.default_rng(draw(st.integers(0, 10_000)))
    first = draw(st.integers(0, min(2, length)))
    survivors = generator.random((batch, length)) < draw(st.sampled_from([0.1, 0.5, 0.9]))
    survivors[:, :first] = True
    inside = np.ones((batch, length), dtype=bool) if real is None else real
    survivors &= inside
    importance = torch.from_numpy(generator.random((batch, length), dtype=np.float32))
    if draw(st.booleans()):
        one = generator.random((batch, length)) < 0.5
        survivors |= inside & ~one & (generator.random((batch, length)) < 0.3)
        groups = [judged(0, inside & part, importance) for part in (one, ~one)]
    else:
        candidates = None if real is None else inside[:, first:]
        groups = [judged(first, candidates, importance[:, first:])]
    return Decision(survivors, groups, merges=draw(st.booleans()))


def expected(tokens: Tensor, state: TokenState, decision: Decision) -> list[tuple[Tensor, list[int], list[bool]]]:
    """Of each sample its tokens, their original positions, and which of them are merged."""
    slots, found = in_slots(tokens, state), []
    for sample in range(state.batch):
        rows, positions, merged = [], [], []

        def position(slot: int, sample: int = sample) -> int:
            return slot if state.index is None else int(state.index[sample, slot])

        for slot in np.flatnonzero(decision.survivors[sample]):
            rows.append(slots[sample, slot])
            positions.append(position(slot))
            merged.append(state.merged is not None and bool(state.merged[sample, slot]))
        for group in decision.groups if decision.merges else ():
            own = group.dropped(decision.survivors)[sample]
            members = np.flatnonzero(own) + group.first
            if len(members):
                weights = group.importance[sample][torch.from_numpy(own)]
                rows.append((weights / weights.sum()) @ slots[sample, members])
                positions.append(position(members[int(weights.argmax())]))
                merged.append(True)
        found.append((torch.stack(rows) if rows else tokens[:0], positions, merged))
    return found


def check(tokens: Tensor, state: TokenState, decision: Decision) -> tuple[Tensor, TokenState]:
    """Assemble, compare with plain loops, and return what came out."""
    wanted = expected(tokens, state, decision)
    rows, after = assemble(tokens, state, decision, OURS, causal=False)
    lengths = [len(own) for own, _, _ in wanted]
    torch.testing.assert_close(rows, torch.cat([own for own, _, _ in wanted]))
    if after.index is None:
        assert lengths == [state.length] * state.batch
        return rows, after
    assert after.length == max(lengths)
    assert after.counts.tolist() == lengths
    assert after.merged is not None
    for sample, (_, positions, merged) in enumerate(wanted):
        assert after.index[sample, : len(positions)].tolist() == positions
        assert after.merged[sample, : len(positions)].tolist() == merged
    return rows, after


@given(st.integers(1, 4), st.integers(1, 8), st.data())
def test_assembly_is_what_loops_over_samples_give(batch: int, length: int, data: st.DataObject) -> None:
    torch.manual_seed(0)
    tokens = torch.randn(batch * length, WIDTH)
    rows, state = check(tokens, unpruned_state(batch, length), data.draw(decisions(batch, length)))
    if state.length == 0:
        return
    real = None if state.valid is None else state.valid.numpy()
    check(rows, state, data.draw(decisions(batch, state.length, real)))


@given(st.integers(1, 4), st.integers(2, 8), st.data())
def test_gradients_reach_tokens_and_importance(batch: int, length: int, data: st.DataObject) -> None:
    torch.manual_seed(0)
    decision = data.draw(decisions(batch, length))
    inputs = [torch.randn(batch * length, WIDTH), *(group.importance for group in decision.groups)]
    found = []
    for make in (lambda *given: assemble(*given, OURS, causal=False)[0], by_loops):
        tokens, *scores = (one.clone().requires_grad_() for one in inputs)
        groups = [
            judged(group.first, group.candidates, own) for group, own in zip(decision.groups, scores, strict=True)
        ]
        rows = make(tokens, unpruned_state(batch, length), Decision(decision.survivors, groups, decision.merges))
        total = (rows * torch.arange(1.0, WIDTH + 1)).square().sum()
        found.append(torch.autograd.grad(total, [tokens, *scores], allow_unused=True, materialize_grads=True))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def by_loops(tokens: Tensor, state: TokenState, decision: Decision) -> Tensor:
    return torch.cat([own for own, _, _ in expected(tokens, state, decision)])


def test_the_gradient_of_sums_has_a_gradient() -> None:
    """Gradient penalties take it."""
    torch.manual_seed(0)
    picked, sizes = np.array([3, 0, 1, 4, 2]), np.array([1, 3, 1])
    inputs = torch.randn(6, WIDTH, dtype=torch.double, requires_grad=True), torch.rand(5).double().requires_grad_()

    def sums(tokens: Tensor, weights: Tensor) -> Tensor:
        return summed_rows(tokens, picked, weights, sizes)

    assert torch.autograd.gradcheck(sums, inputs)
    assert torch.autograd.gradgradcheck(sums, inputs)
    with torch.no_grad():
        plain = sums(*inputs)
    assert torch.equal(plain, sums(*inputs))
