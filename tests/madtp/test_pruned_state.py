"""Invariants of the module that a rewrite returns: parameters, state dict, train and eval, further call signatures."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from case_models import CASES, vit
from masked_oracle import leaves
from model_case import lively
from rewritten_models import Subject, eager_arithmetic, gap
from rewritten_models import subject as rewritten
from torch import Tensor, nn

import madtp
from madtp import PruningConfig

NAMES = ("clip_eager", "blip_nlvr", "towers_batch_first_pre")


@pytest.fixture(autouse=True)
def plain_attention() -> Iterator[None]:
    with eager_arithmetic():
        yield


@pytest.fixture(scope="module", params=NAMES)
def subject(request: pytest.FixtureRequest) -> Subject:
    return rewritten(request.param)


def test_state_dict_keeps_every_key_and_adds_one_prefix(subject: Subject) -> None:
    before, after = subject.model.state_dict(), subject.pruned.state_dict()
    for name, tensor in before.items():
        assert after[name].data_ptr() == tensor.data_ptr(), name
    assert all(name.startswith("madtp.") for name in after.keys() - before.keys())
    assert after.keys() > before.keys()


def test_parameters_are_shared(subject: Subject) -> None:
    own = dict(subject.pruned.named_parameters())
    for name, parameter in subject.model.named_parameters():
        assert own[name] is parameter


def test_original_checkpoint_loads(subject: Subject) -> None:
    checkpoint = {n: t.clone() for n, t in subject.model.state_dict().items()}
    result = subject.pruned.load_state_dict(checkpoint, strict=False)
    assert not result.unexpected_keys
    assert result.missing_keys
    assert all(name.startswith("madtp.") for name in result.missing_keys)


def test_loaded_weights_are_used(subject: Subject) -> None:
    model, pruned = copy.deepcopy((subject.model, subject.pruned))
    torch.manual_seed(9)
    changed = {n: t + 0.1 * torch.randn_like(t) if t.is_floating_point() else t for n, t in model.state_dict().items()}
    pruned.load_state_dict(changed, strict=False)
    inputs = subject.case.inputs(2, 6)
    with torch.no_grad(), pruned.dense():
        for name, value in leaves(model(**inputs)).items():
            assert gap(value, leaves(pruned(**inputs))[name]) < 1e-5, name


@pytest.mark.parametrize("training", [True, False])
def test_rewrite_leaves_the_model_alone(training: bool) -> None:
    model = vit(drop_rate=0.1).train(training)
    model.blocks[0].eval()
    calls: list[str] = []
    model.norm.register_forward_hook(lambda m, i, o: calls.append("norm"))
    flags = {n: m.training for n, m in model.named_modules()}
    modules = dict(model.named_modules())
    attributes = {n: dict(vars(m)) for n, m in model.named_modules()}
    state = {n: t.clone() for n, t in model.state_dict().items()}
    pruned = madtp.rewrite(model, (torch.randn(2, 3, 32, 32),))
    pruned.train(not training)
    pruned(torch.randn(2, 3, 32, 32))
    assert dict(model.named_modules()) == modules
    assert {n: m.training for n, m in model.named_modules()} == flags
    for name, module in model.named_modules():
        assert vars(module).keys() == attributes[name].keys(), name
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert not hasattr(model, "madtp")


def test_hooks_of_leaf_modules_run() -> None:
    model = vit()
    seen: list[tuple[int, ...]] = []
    model.blocks[1].mlp.fc1.register_forward_hook(lambda m, i, o: seen.append(tuple(i[0].shape)))
    pruned = madtp.rewrite(model, (torch.randn(2, 3, 32, 32),), config=PruningConfig(gain=2.0))
    seen.clear()
    with torch.no_grad():
        pruned(torch.randn(2, 3, 32, 32))
    assert len(seen) == 1
    assert seen[0][0] * seen[0][1] < 2 * 17


def test_dropout_follows_train_and_eval(subject: Subject) -> None:
    inputs = subject.case.inputs(3, 7)
    pruned = subject.pruned
    wanted = leaves(subject.model(**inputs))
    with subject.set(temperature=0.0):
        pruned.train()
        try:
            first, second = leaves(pruned(**inputs)), leaves(pruned(**inputs))
        finally:
            pruned.eval()
        calm = leaves(pruned(**inputs))
    assert any(gap(first[n], second[n]) > 1e-3 for n in first)
    assert all(gap(value, calm[n]) < 1e-5 for n, value in wanted.items())


def test_training_forward_prunes_and_gradients_reach_everything(subject: Subject) -> None:
    inputs = subject.case.inputs(3, 7)
    subject.model.zero_grad(set_to_none=True)
    sum((v * torch.randn_like(v)).sum() for v in leaves(subject.model(**inputs)).values()).backward()  # type: ignore[union-attr]
    reached = {n for n, p in subject.model.named_parameters() if p.grad is not None and bool(p.grad.any())}
    with subject.set(temperature=2.0) as pruned:
        pruned.train()
        try:
            pruned.zero_grad(set_to_none=True)
            output = leaves(pruned(**inputs))
            assert any(bool((c < c.max()).any()) or int(c.max()) < 17 for c in pruned.token_counts().values())
            sum((v * torch.randn_like(v)).sum() for v in output.values()).backward()  # type: ignore[union-attr]
            task = {n for n, p in pruned.named_parameters() if p.grad is not None and bool(p.grad.any())}
            assert reached <= task
            assert "madtp.alignment.tokens" in task or any(n.startswith("madtp.alignment") for n in task)
            pruned.zero_grad(set_to_none=True)
            pruned(**inputs)
            pruned.alignment_loss().backward()
            aligned = {n for n, p in pruned.named_parameters() if p.grad is not None and bool(p.grad.any())}
            assert any(n.startswith("madtp.alignment") for n in aligned)
        finally:
            pruned.eval()
            pruned.zero_grad(set_to_none=True)


def test_a_further_argument_captures_once_more_onto_the_same_sites() -> None:
    subject = rewritten("clip_eager")
    inputs = {**subject.case.inputs(3, 6), "return_loss": True}
    with subject.set(temperature=0.0) as pruned, torch.no_grad():
        wanted, found = subject.model(**inputs), pruned(**inputs)
        assert type(found) is type(wanted)
        assert gap(wanted.loss, found.loss) < 1e-5
    state = subject.pruned.state_dict().keys()
    with subject.set(temperature=4.0) as pruned, torch.no_grad():
        loss = pruned(**inputs).loss
        assert pruned.token_counts().keys() == {n for names in subject.names.values() for n in names}
        assert torch.isfinite(loss)
    assert subject.pruned.state_dict().keys() == state


def test_another_image_size_captures_once_more() -> None:
    model = vit(dynamic_img_size=True)
    pruned = madtp.rewrite(model, (torch.randn(2, 3, 32, 32),), config=PruningConfig(temperature=0.0))
    large = torch.randn(3, 3, 48, 48)
    with torch.no_grad():
        assert gap(model(large), pruned(large)) < 1e-5
        pruned.temperature = 50.0
        pruned(large)
        assert int(max(c.max() for c in pruned.token_counts().values())) < 37
        assert {m.shape[1] for m in pruned.kept_tokens().values()} == {37}


class FrozenBatch(nn.Module):
    """A model whose batch size torch.export freezes, by `len`."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, 16))
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2, enable_nested_tensor=False
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(torch.cat([self.token.expand(len(x), -1, -1), x], 1))[:, 0]


def test_a_frozen_batch_captures_for_each_size_and_serves_a_single_sample() -> None:
    model = lively(FrozenBatch())
    pruned = madtp.rewrite(model, (torch.randn(3, 8, 16),), config=PruningConfig(temperature=0.0))
    with torch.no_grad():
        for batch in (3, 2, 5, 1):
            x = torch.randn(batch, 8, 16)
            assert gap(model(x), pruned(x)) < 1e-5


def test_positional_and_keyword_calls_share_a_capture() -> None:
    subject = rewritten("blip_nlvr")
    inputs = CASES["blip_nlvr"].inputs(2, 6)
    with subject.set(temperature=0.0) as pruned, torch.no_grad():
        known = len(pruned.madtp.forward_of_host.programs.entries)
        assert torch.equal(pruned(*inputs.values()), pruned(**inputs))
        assert len(pruned.madtp.forward_of_host.programs.entries) == known
