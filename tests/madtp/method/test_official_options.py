"""Official behaviour that concerns masks and readouts: each option does what the authors' code does, ours does not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from madtp.config import PruningConfig
from madtp.method.guidance import AlignmentTokens
from madtp.sites.control import PruningControl
from madtp.sites.scoring import ScoringAttention
from madtp.sites.site import PruningSite
from madtp.sites.spec import SiteSpec
from madtp.tokens.attention import attention
from madtp.tokens.state import Quirks, TokenState, slots_of, unpruned_state

BATCH, HEADS, TOKENS, WIDTH = 2, 2, 6, 8
END = torch.tensor([4, 5])


def site(config: PruningConfig, causal: bool = True) -> PruningSite:
    control = PruningControl(config, temperature=1.0)
    control.alignment = AlignmentTokens(4, WIDTH)
    spec = SiteSpec(name="text", modality="text", width=WIDTH, class_position=None, protected=(), causal=causal)
    made = PruningSite(spec, control, WIDTH, seed=0)
    kept = torch.ones(BATCH, TOKENS, dtype=torch.bool)
    kept[:, 1:3] = False
    control.forced = {"text": kept}
    return made


def pruned(config: PruningConfig, causal: bool = True) -> tuple[Tensor, TokenState]:
    torch.manual_seed(0)
    made = site(config, causal)
    q, k, v = (torch.randn(BATCH, HEADS, TOKENS, WIDTH // HEADS) for _ in range(3))
    tokens = torch.randn(BATCH, TOKENS, WIDTH)
    _, seen = made.attention(q, k, v, None, 0.0, causal, state=None, readouts=(END,))
    return made(tokens, tokens, seen, None, (END,))


def test_a_computed_readout_is_remapped() -> None:
    _, state = pruned(PruningConfig(merge=False))
    assert slots_of(state, END).tolist() == [2, 3]


def test_officially_a_computed_readout_is_read_at_its_old_index() -> None:
    _, state = pruned(PruningConfig(merge=False, readout="original"))
    assert slots_of(state, torch.tensor([3, 5])).tolist() == [3, 3]


@pytest.mark.parametrize(("readout", "survives"), [("remapped", True), ("original", False)])
def test_only_a_remapped_readout_is_protected(readout: str, survives: bool) -> None:
    made = site(PruningConfig(merge=False, readout=readout))  # type: ignore[arg-type]
    forced = torch.zeros(BATCH, TOKENS, dtype=torch.bool)
    forced[:, 0] = True
    made.control.forced = {"text": forced}
    torch.manual_seed(0)
    q, k, v = (torch.randn(BATCH, HEADS, TOKENS, WIDTH // HEADS) for _ in range(3))
    tokens = torch.randn(BATCH, TOKENS, WIDTH)
    _, seen = made.attention(q, k, v, None, 0.0, True, state=None, readouts=(END,))
    _, state = made(tokens, tokens, seen, None, (END,))
    assert state.index is not None
    assert bool((state.index == END[:, None]).any()) is survives


@pytest.mark.parametrize(("rule", "positions"), [("gathered", [0, 3, 4, 5]), ("cropped", [0, 1, 2, 3])])
def test_where_causal_masks_are_read(rule: str, positions: list[int]) -> None:
    _, state = pruned(PruningConfig(merge=False, causal_mask=rule))  # type: ignore[arg-type]
    mask = torch.zeros(1, 1, TOKENS, TOKENS).masked_fill(~torch.ones(TOKENS, TOKENS).tril().bool(), float("-inf"))
    mask[..., 5, 3] = float("-inf")  # a mask that tells gathering from cropping
    torch.manual_seed(1)
    q, k, v = (torch.randn(BATCH, HEADS, 4, WIDTH // HEADS) for _ in range(3))
    found = attention(q, k, v, mask, query_state=state, key_state=state)
    wanted = attention(q, k, v, mask[..., positions, :][..., positions])
    assert torch.allclose(found, wanted, atol=1e-6)


def test_bidirectional_streams_are_never_cropped() -> None:
    _, state = pruned(PruningConfig(merge=False, causal_mask="cropped"), causal=False)
    assert state.mask_index is None


@pytest.mark.parametrize(("rule", "slots"), [("readout", [4, 5]), ("first", [0, 0])])
def test_which_row_stands_for_the_class_row_of_causal_text(rule: str, slots: list[int]) -> None:
    made = site(PruningConfig(causal_class_row=rule))  # type: ignore[arg-type]
    assert isinstance(made.attention, ScoringAttention)
    slot = made.attention._class_slot(unpruned_state(BATCH, TOKENS), (END,), None, None, END.device)
    assert slot is not None
    assert torch.as_tensor(slot).expand(2).tolist() == slots


@pytest.mark.parametrize("ignored", [False, True])
def test_cross_attention_masks(ignored: bool) -> None:
    index = torch.tensor([[0, 2, 3]]).expand(BATCH, 3)
    keys = replace(unpruned_state(BATCH, 4), index=index, merged=torch.zeros_like(index, dtype=torch.bool), length=3)
    keys = replace(keys, quirks=Quirks(ignores_cross_masks=ignored))
    torch.manual_seed(1)
    q = torch.randn(BATCH, HEADS, 5, WIDTH // HEADS)
    k, v = (torch.randn(BATCH, HEADS, 3, WIDTH // HEADS) for _ in range(2))
    mask = torch.tensor([True, True, False, True]).reshape(1, 1, 1, 4)
    found = attention(q, k, v, mask, query_state=None, key_state=keys)
    wanted = attention(q, k, v, None if ignored else mask[..., [0, 2, 3]])
    assert torch.equal(found, wanted)
