"""Decoders with a key/value cache: tokens dropped while the prompt is read stay hidden from all that follows."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from cached_decoders import IMAGE, EinsumBody, Handing, Peeking, Reader, hiding, reader
from model_case import Tensors, lively
from region_hosts import Memory
from rewritten_models import eager_arithmetic, gap
from torch import Tensor, nn

import madtp
from madtp.calls.objects import CannotFlatten, flatten_object, unflatten_object
from madtp.errors import ContinuationError, RewriteError
from madtp.programs.cached_steps import CachedSteps
from madtp.tokens.cache_marks import with_marks
from madtp.tokens.cached_tokens import holds_cached_tokens

CONFIG = madtp.PruningConfig(alignment_tokens=5, temperature=4.0, merge=False)
STEPS = [1, 1, 3, 1]


@pytest.fixture(autouse=True)
def plain_attention() -> Iterator[None]:
    with eager_arithmetic(), torch.no_grad():
        yield


@pytest.fixture(scope="module")
def reading() -> tuple[Reader, Tensors, madtp.PrunedModel]:
    model, inputs = reader()
    with eager_arithmetic():
        return model, inputs, madtp.rewrite(model, inputs, config=CONFIG)


@pytest.fixture(scope="module")
def peeking() -> tuple[Reader, Tensors, madtp.PrunedModel]:
    model, inputs = reader(Peeking)
    with eager_arithmetic():
        return model, inputs, madtp.rewrite(model, inputs, config=CONFIG)


def _copied(pruned: madtp.PrunedModel) -> madtp.PrunedModel:
    """A copy, with the programs so far, for a test that captures more of them or leaves others another state."""
    own = copy.deepcopy(pruned)
    own.temperature = CONFIG.temperature
    return own


def _steps(batch: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(10, 90, (batch, n), generator=generator) for n in STEPS]


def _read(model: nn.Module, inputs: Tensors, memory: Memory) -> list[Tensor]:
    """Logits of the prompt's last token, and of all tokens of further steps."""
    found = [model(**inputs, memory=memory)[:, -1:]]
    mask = inputs["attention_mask"]
    for ids in _steps(len(mask)):
        mask = torch.cat([mask, torch.ones_like(ids)], 1)
        found.append(model(None, ids, mask, memory))
    return found


def _dead(memory: Memory) -> list[Tensor]:
    return [with_marks([memory.seen[layer][0]])[0].isnan()[:, 0, :, 0] for layer in sorted(memory.seen)]


def test_the_decoder_is_a_region_that_prunes_image_tokens(reading: tuple[Reader, Tensors, madtp.PrunedModel]) -> None:
    _, inputs, pruned = reading
    assert pruned.report.regions == ("body",)
    assert [s.name for s in pruned.report.sites] == [f"body.blocks.{i}" for i in range(3)]
    pruned(**inputs, memory=Memory())
    words = inputs["input_ids"] != IMAGE
    for kept in pruned.kept_tokens().values():
        assert bool(kept[words].all()), "text that is predicted stays"
        assert int(kept.sum()) < kept.numel()


def test_without_pruning_every_step_is_the_originals(reading: tuple[Reader, Tensors, madtp.PrunedModel]) -> None:
    model, inputs, pruned = reading
    kept = Memory()
    with pruned.dense():
        found = _read(pruned, inputs, kept)
        assert torch.equal(pruned.generate(**inputs), model.generate(**inputs))
    assert all(gap(a, b) < 1e-5 for a, b in zip(_read(model, inputs, Memory()), found, strict=True))
    assert not any(bool(dead.any()) for dead in _dead(kept))


@pytest.mark.parametrize("strength", [0.5, 4.0])
def test_dropped_tokens_are_hidden_from_all_later_steps(
    reading: tuple[Reader, Tensors, madtp.PrunedModel], strength: float
) -> None:
    model, inputs, pruned = reading
    pruned.temperature = strength
    pruned(**inputs, memory=Memory())
    kept = list(pruned.kept_tokens().values())
    memory = Memory()
    found = _read(pruned, inputs, memory)
    dropped: list[Tensor | None] = [None, ~kept[0], ~kept[1]]
    assert all(gone is None or bool(gone.any()) for gone in dropped)
    with hiding(dropped):
        wanted = _read(model, inputs, Memory())
    assert all(gap(a, b) < 1e-5 for a, b in zip(wanted, found, strict=True))
    assert memory.seen[0][0].shape[2] == 24 + sum(STEPS), "each token at its own position"
    dead = _dead(memory)
    assert not dead[0].any()
    assert all(torch.equal(gone[:, :24], ~alive) for gone, alive in zip(dead[1:], kept, strict=False))


def test_what_was_kept_may_change_its_order_and_its_number(
    reading: tuple[Reader, Tensors, madtp.PrunedModel],
) -> None:
    _, inputs, pruned = reading
    memory, ids = Memory(), torch.tensor([[11], [12], [13]])
    pruned(**inputs, memory=memory)
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, 1, dtype=torch.long)], 1)
    beams = torch.tensor([2, 0, 0, 1])
    chosen = copy.deepcopy(memory)
    chosen.seen = {layer: (key[beams], value[beams]) for layer, (key, value) in memory.seen.items()}
    wanted = pruned(None, ids, mask, memory)[beams]
    assert gap(wanted, pruned(None, ids[beams], mask[beams], chosen)) < 1e-5


def test_a_sample_goes_on_as_it_would_alone(reading: tuple[Reader, Tensors, madtp.PrunedModel]) -> None:
    _, inputs, pruned = reading
    together = pruned.generate(**inputs)
    for row in range(3):
        one = {name: x[row : row + 1] for name, x in inputs.items()}
        assert torch.equal(pruned.generate(**one), together[row : row + 1])


def test_merged_tokens_are_remembered() -> None:
    model, inputs = reader()
    pruned = madtp.rewrite(model, inputs, config=replace(CONFIG, merge=True))
    memory = Memory()
    pruned(**inputs, memory=memory)
    kept, counts = list(pruned.kept_tokens().values()), list(pruned.token_counts().values())
    for layer, dead in enumerate(_dead(memory)[1:]):
        assert torch.equal((~dead).sum(1), counts[layer])
        assert bool((counts[layer] > kept[layer].sum(1)).all()), "a merged token stands where a dropped one stood"
    found = _read(pruned, inputs, Memory())
    assert not any(logits.isnan().any() for logits in found)


def test_code_that_knows_nothing_of_pruning_attends_to_survivors_alone(
    reading: tuple[Reader, Tensors, madtp.PrunedModel],
) -> None:
    model, inputs, pruned = reading
    memory = Memory()
    pruned(**inputs, memory=memory)
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, 1, dtype=torch.long)], 1)
    ids = torch.full((3, 1), 20)
    wanted = pruned(None, ids, mask, copy.deepcopy(memory))
    assert torch.equal(model(None, ids, mask, copy.deepcopy(memory)), wanted)
    with pytest.raises(ContinuationError, match="mean reads keys or values in a cache"):
        memory.seen[1][0].mean()
    with pruned.dense():
        assert torch.equal(pruned(None, ids, mask, memory), wanted)


def test_a_step_that_no_program_serves_is_never_wrong(
    peeking: tuple[Reader, Tensors, madtp.PrunedModel],
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, inputs, rewritten = peeking
    pruned = _copied(rewritten)
    assert torch.equal(pruned.generate(**inputs), model.generate(**inputs)), "the whole of it runs unpruned"
    assert "runs once more, unpruned" in caplog.text
    memory = Memory()
    assert gap(pruned(**inputs, memory=memory), model(**inputs, memory=Memory())) < 1e-5, "nor is the next one pruned"
    pruned(**inputs)
    assert pruned.token_counts(), "calls that keep nothing are"


def test_a_kept_object_with_dropped_tokens_is_an_error_where_no_program_serves(
    peeking: tuple[Reader, Tensors, madtp.PrunedModel],
) -> None:
    _, inputs, rewritten = peeking
    pruned = _copied(rewritten)
    memory = Memory()
    pruned(**inputs, memory=memory)
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, 1, dtype=torch.long)], 1)
    with pytest.raises(ContinuationError, match="body was to go on"):
        pruned(None, torch.full((3, 1), 20), mask, memory)


class Averaging(Memory):
    """Also hands out something computed from all that is remembered."""

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        key, value = super().extend(layer, key, value)
        return key - key.mean(2, keepdim=True), value


def test_kept_tokens_that_more_than_attention_reads_are_refused(
    reading: tuple[Reader, Tensors, madtp.PrunedModel],
) -> None:
    _, inputs, pruned = reading
    pruned = copy.deepcopy(pruned)
    memory = Averaging()
    memory.seen = (first := Memory()).seen
    pruned(**inputs, memory=first)
    memory.seen = first.seen
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, 1, dtype=torch.long)], 1)
    with pytest.raises((ContinuationError, RewriteError), match="cached tokens are read by"):
        pruned(None, torch.full((3, 1), 20), mask, memory)


class Sliding(Memory):
    """Keeps the last tokens only, and counts how many it has seen."""

    WINDOW = 40

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        self.count += key.shape[2] if layer == 0 else 0
        key, value = super().extend(layer, key, value)
        self.seen[layer] = key[:, :, -self.WINDOW :], value[:, :, -self.WINDOW :]
        return key, value


def test_a_window_that_is_not_full_and_a_count_of_tokens_are_kept(
    reading: tuple[Reader, Tensors, madtp.PrunedModel],
) -> None:
    _, inputs, rewritten = reading
    pruned = _copied(rewritten)
    plain, counted = Memory(), Sliding()
    wanted, found = _read(pruned, inputs, plain), _read(pruned, inputs, counted)
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))
    assert counted.count == 24 + sum(STEPS)
    assert all(torch.equal(a, b) for a, b in zip(_dead(plain), _dead(counted), strict=True))
    programs = pruned.get_submodule("madtp").programs
    for _ in range(3):
        mask = torch.ones(3, 1 + counted.count, dtype=torch.long)
        pruned(None, torch.full((3, 1), 11), mask, counted)
    assert pruned.get_submodule("madtp").programs == programs, "steps of a longer text are served by one program"


def test_what_a_full_window_pushes_out_is_gone(reading: tuple[Reader, Tensors, madtp.PrunedModel]) -> None:
    model, inputs, rewritten = reading
    pruned = _copied(rewritten)
    memory, wanted = Sliding(), Sliding()
    pruned(**inputs, memory=memory)
    dropped = [None, *(~kept for kept in list(pruned.kept_tokens().values())[:2])]
    with hiding(dropped):
        model(**inputs, memory=wanted)
        ids, mask = torch.full((3, 20), 11), torch.ones(3, 24 + 20, dtype=torch.long)
        assert gap(model(None, ids, mask, wanted), pruned(None, ids, mask, memory)) < 1e-5
    pushed_out = 24 + 20 - Sliding.WINDOW
    with hiding([None if gone is None else gone[:, pushed_out:] for gone in dropped]):
        ids, mask = torch.full((3, 1), 12), torch.ones(3, Sliding.WINDOW + 1, dtype=torch.long)
        assert gap(model(None, ids, mask, wanted), pruned(None, ids, mask, memory)) < 1e-5


class Slotted:
    __slots__ = ("seen",)


def test_objects_are_taken_apart_and_put_together() -> None:
    memory = Memory()
    memory.seen[3] = torch.ones(2), torch.zeros(2)
    spec, tensors = flatten_object(memory)
    assert spec.paths() == (".seen.3.0", ".seen.3.1")
    again = unflatten_object(spec, iter(tensors))
    assert type(again) is Memory
    assert again.seen is not memory.seen
    assert again.seen[3][0] is memory.seen[3][0]
    assert flatten_object(again)[0] == spec
    sliding = Sliding()
    spec, parts = flatten_object(sliding, {".count"})
    assert (spec.paths(), spec.sizes(), parts) == ((".count",), (".count",), [0])
    assert unflatten_object(spec, iter([5])).count == 5
    assert flatten_object(sliding)[0].paths() == ()
    twice = Memory()
    twice.seen[0] = twice.seen[1] = (torch.ones(2), torch.ones(2))
    for closed in (twice, Slotted(), nn.Linear(1, 1), {1, 2}, (x for x in ())):
        with pytest.raises(CannotFlatten, match="it holds a"):
            flatten_object(closed)


def test_memory_of_what_was_kept_shrinks(reading: tuple[Reader, Tensors, madtp.PrunedModel]) -> None:
    _, inputs, rewritten = reading
    pruned, memory = _copied(rewritten), Memory()
    pruned(**inputs, memory=memory)
    held, dense = pruned.madtp.cache_bytes()
    assert dense == 2 * 3 * 3 * 24 * 16 * 4, "keys and values of three layers"
    assert held < dense
    counts = {site: x.clone() for site, x in pruned.token_counts().items()}
    pruned(None, torch.full((3, 1), 20), torch.ones(3, 25, dtype=torch.long), memory)
    after = pruned.madtp.cache_bytes(memory)
    assert after.dense == dense // 24 * 25
    assert after.held == held + after.dense - dense
    assert all(torch.equal(x, counts[site]) for site, x in pruned.token_counts().items()), "the record is of the prompt"
    with pruned.dense():
        pruned(**inputs, memory=Memory())
        assert pruned.madtp.cache_bytes().held == dense
    pruned(**inputs)
    assert pruned.madtp.cache_bytes() is None


def test_a_later_turn_with_an_image_prunes_its_tower(reading: tuple[Reader, Tensors, madtp.PrunedModel]) -> None:
    """Only a call without pixels and features has nothing to prune."""
    _, inputs, rewritten = reading
    steps = CachedSteps(rewritten, rewritten, rewritten.madtp.control)
    memory = Memory()
    rewritten(**inputs, memory=memory)
    ids = torch.full((3, 1), 20)
    assert steps.serve_text((None, ids, inputs["attention_mask"], memory), {})
    features = {"features": {"image": [torch.ones(4, 2)]}}
    state = Memory()
    state.seen[0] = torch.ones(4, 2), torch.ones(4, 2)
    for more in ({"pixels": torch.ones(4, 2)}, features, {"other": inputs["pixels"]}, {"state": state}):
        assert not steps.serve_text((), {"memory": memory, "input_ids": ids, **more})
    assert not steps.serve_text((ids, Memory()), {}), "it holds nothing yet"


def test_an_error_of_the_models_own_comes_through(reading: tuple[Reader, Tensors, madtp.PrunedModel]) -> None:
    _, inputs, rewritten = reading
    pruned, memory = _copied(rewritten), Memory()
    pruned(**inputs, memory=memory)
    with pytest.raises(IndexError, match="out of range"):
        pruned(None, torch.full((3, 1), 20_000), torch.ones(3, 25, dtype=torch.long), memory)


@pytest.mark.slow
def test_steps_that_are_captured_go_on_from_survivors() -> None:
    """Sums over indices are not followed on survivors, so programs run the steps; the cache stays short."""
    model, inputs = reader(EinsumBody)
    pruned = madtp.rewrite(model, inputs, config=CONFIG)
    memory = Memory()
    found = _read(pruned, inputs, memory)
    pruned(**inputs, memory=Memory())
    kept = list(pruned.kept_tokens().values())
    plain, _ = reader()
    plain.load_state_dict(model.state_dict())
    with hiding([None, ~kept[0], ~kept[1]]):
        wanted = _read(plain, inputs, Memory())
    assert all(gap(a, b) < 1e-4 for a, b in zip(wanted, found, strict=True))
    assert holds_cached_tokens(memory)
    assert not pruned.report.notes


class Numbered(Reader):
    """Is told where it goes on."""

    def forward(
        self,
        pixels: Tensor | None,
        input_ids: Tensor,
        attention_mask: Tensor,
        memory: Memory | None = None,
        at: int = 0,
    ) -> Tensor:
        return super().forward(pixels, input_ids, attention_mask, memory) + 0 * at


def test_numbers_make_no_further_kinds_of_steps_and_gradients_do_not_matter() -> None:
    _, inputs = reader()
    model = Numbered()
    model.load_state_dict(reader()[0].state_dict())
    pruned = madtp.rewrite(model.eval(), inputs, config=CONFIG)
    memory, mask = Memory(), inputs["attention_mask"]
    with torch.enable_grad():
        pruned(**inputs, memory=memory)
        for at in range(24, 30):
            mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], 1)
            logits = pruned(None, torch.full((3, 1), 20), mask, memory, at=at)
            assert logits.requires_grad
    assert len(pruned.madtp.forward_of_host.steps.followed) == 1


@pytest.mark.parametrize("container", [tuple, list, dict])
def test_keys_that_are_returned_outside_a_cache_are_not_pruned(container: type) -> None:
    """A later call could take them for a cache, and attend to what was dropped."""
    _, inputs = reader()
    torch.manual_seed(0)
    model = lively(Handing(container))
    pruned = madtp.rewrite(model, tuple(inputs.values()), config=CONFIG)
    assert [site.name for site in pruned.report.sites] == ["blocks.2"], "nothing reads tokens behind the last one"
    assert any("return them in the object of a cache" in refusal.reason for refusal in pruned.report.refusals)
    assert any("keys or values of a causal attention are returned" in note for note in pruned.report.notes)
    _, wanted = model(*inputs.values())
    _, found = pruned(*inputs.values())
    for layer in range(3):
        assert gap(wanted[layer][0], found[layer][0]) < 1e-5


def test_keys_of_attention_in_both_directions_are_no_cache() -> None:
    _, inputs = reader()
    torch.manual_seed(0)
    pruned = madtp.rewrite(lively(Handing(causal=False)), tuple(inputs.values()), config=CONFIG)
    assert len(pruned.report.sites) == 3
