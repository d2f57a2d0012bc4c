"""Alignment tokens learn which tokens the outputs depend on, and teaching changes nothing else."""

from __future__ import annotations

import pytest
import torch
from joint_stream_models import Block, Patches, Words
from rewritten_models import subject
from small_vit import images, rewritten
from torch import Tensor, nn

import madtp
from madtp import MadtpError, PrunedModel, PruningConfig
from madtp.errors import ConfigError, ExampleInputsError

LOUD = 24.0
WIDTH = 16


class LoudBackground(nn.Module):
    """Patches with a negative mark have a large common part, so noise likes them best; behind a norm they say little."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.common = nn.Parameter(torch.randn(WIDTH))
        self.class_token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.blocks = nn.ModuleList(Block(WIDTH) for _ in range(3))
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, patches: Tensor) -> Tensor:
        x = self.embed(patches) + LOUD * (patches[..., :1] < 0) * self.common
        x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        return self.head(x[:, 0])


def patches(batch: int, seed: int) -> Tensor:
    return torch.randn(batch, 24, WIDTH, generator=torch.Generator().manual_seed(seed))


def loud_background() -> PrunedModel:
    torch.manual_seed(0)
    return madtp.rewrite(LoudBackground().eval(), (patches(2, 0),), config=PruningConfig(alignment_tokens=8))


def test_guidance_comes_to_agree_with_what_the_output_depends_on() -> None:
    pruned = loud_background()
    result = madtp.teach(pruned, [(patches(16, seed),) for seed in range(4)])
    # Behind the last attention only the class token is read.
    assert set(result.after) == {site.name for site in pruned.report.sites[:-1]}
    for site, agreement in result.after.items():
        assert agreement > 0.6, site
        assert agreement > result.before[site] + 0.3, site
    assert "after 200 steps" in str(result)


@pytest.mark.slow
def test_survivors_are_salient_tokens_afterwards() -> None:
    pruned, unseen = loud_background(), patches(32, 99)
    quiet = nn.functional.pad(unseen[..., 0] >= 0, (1, 0), value=False)
    shares = []
    for taught in (False, True):
        if taught:
            madtp.teach(pruned, [(patches(16, seed),) for seed in range(4)])
        madtp.calibrate(pruned, [(unseen,)], reduction=0.4)
        with torch.no_grad():
            pruned(unseen)
        kept = next(iter(pruned.kept_tokens().values())).clone()
        kept[:, 0] = False
        shares.append(float((kept & quiet).sum() / kept.sum()))
    assert shares[1] > shares[0] + 0.1


def test_only_alignment_tokens_and_their_maps_change() -> None:
    pruned = rewritten()
    pruned.gain, pruned.temperature = 1.3, 2.0
    pruned.train()
    frozen = next(pruned.parameters())
    frozen.requires_grad_(False)
    before = {name: value.clone() for name, value in pruned.state_dict().items()}
    madtp.teach(pruned, [(images(4, 1),)], steps=3)
    changed = {name for name, value in pruned.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all(name.startswith("madtp.") for name in changed)
    assert (pruned.gain, pruned.temperature, pruned.training) == (1.3, 2.0, True)
    assert not frozen.requires_grad
    assert all(p.grad is None for p in pruned.parameters())
    assert pruned.madtp.control.observer is None


def test_frozen_models_can_be_taught_and_the_seed_decides() -> None:
    found = []
    for seed in (0, 0, 1):
        pruned = rewritten().requires_grad_(False)
        madtp.teach(pruned, [(images(4, 1),)], steps=3, seed=seed)
        found.append(pruned.state_dict()["madtp.alignment.tokens"])
        assert not any(p.requires_grad for p in pruned.parameters())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize("name", ["towers_batch_first_pre", "vit"])
def test_both_modalities_learn_and_padding_takes_no_part(name: str) -> None:
    case = subject(name)
    pruned = madtp.rewrite(case.model, case.case.inputs(3, 7), config=PruningConfig(alignment_tokens=10))
    result = madtp.teach(pruned, [case.case.inputs(3, seed) for seed in (7, 8)], steps=20)
    assert set(result.after) <= {site for names in case.names.values() for site in names}
    for names in case.names.values():
        assert names[0] in result.after


def test_segments_of_a_joint_stream_are_taught_each_by_itself() -> None:
    class Joint(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches, self.words = Patches(), Words()
            self.blocks = nn.ModuleList(Block() for _ in range(2))

        def forward(self, pixels: Tensor, input_ids: Tensor) -> Tensor:
            x = torch.cat([self.patches(pixels), self.words(input_ids)], 1)
            for block in self.blocks:
                x = block(x)
            return x[:, 0]

    torch.manual_seed(0)
    inputs = (torch.randn(2, 3, 32, 32), torch.randint(1, 9, (2, 12)))
    pruned = madtp.rewrite(Joint().eval(), inputs)
    result = madtp.teach(pruned, [inputs], steps=5)
    assert {key[key.index("[") :] for key in result.after} == {"[image]", "[text]"}


def test_what_cannot_be_taught_is_refused_and_leaves_the_model_as_it_was() -> None:
    pruned = rewritten()
    with pytest.raises(ConfigError, match="steps is 0"):
        madtp.teach(pruned, [(images(2, 1),)], steps=0)
    with pytest.raises(ExampleInputsError, match="there are no batches"):
        madtp.teach(pruned, [])
    gain = pruned.gain
    with pytest.raises(MadtpError, match="does not depend on any token"):
        madtp.teach(pruned, [(images(2, 1),)], objective=lambda output: torch.zeros(()))
    assert pruned.gain == gain
    without = madtp.rewrite(LoudBackground().eval(), (patches(2, 0),), config=PruningConfig(alignment=False))
    with pytest.raises(ConfigError, match="no alignment tokens to teach"):
        madtp.teach(without, [(patches(2, 0),)])
