"""Fixed token counts."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from case_models import CASES
from model_case import Case
from rewritten_models import gap
from torch import Tensor, nn

import madtp
from madtp.errors import ConfigError, ExampleInputsError, MadtpError
from madtp.method import selectors
from madtp.method.arrays import Flags, on_host
from madtp.method.threshold import keep_best
from madtp.sites import site


def _pruned() -> tuple[madtp.PrunedModel, torch.Tensor]:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=64, num_classes=5).eval()
    images = torch.randn(4, 3, 64, 64)
    return madtp.rewrite(model, (images,), config=madtp.PruningConfig(temperature=4.0, alignment_tokens=8)), images


def _leaves(output: object) -> list[Tensor]:
    return [x for x in torch.utils._pytree.tree_leaves(output) if isinstance(x, Tensor) and x.is_floating_point()]


def test_frozen_counts_are_the_same_for_every_sample_and_batch() -> None:
    pruned, images = _pruned()
    counts = madtp.freeze(pruned, [(images,)])
    assert set(counts) == {site.name for site in pruned.report.sites}
    with pytest.raises(MadtpError):  # not the counts of the batches, which varied
        pruned.token_counts()
    for batch in (images[:1], torch.randn(3, 3, 64, 64)):
        with torch.no_grad():
            pruned(batch)
        for name, kept in pruned.token_counts().items():
            assert set(kept.tolist()) == {counts[name] + 2}, name  # with the class token and the merged one


class SameCounts:
    """Lets a model with content-adaptive counts keep as many tokens of each sample as a frozen one has kept."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.counts: list[Tensor] = []
        keep_counts = site.PruningSite._keep_counts

        def noting(own: site.PruningSite, scored: list[site._Scored], *args: object, **kwargs: object) -> object:
            rows, after = keep_counts(own, scored, *args, **kwargs)
            self.counts += [own.control.record.kept_counts[one.group.key] for one in scored]
            return rows, after

        patch.setattr(site.PruningSite, "_keep_counts", noting)
        patch.setattr(selectors.AboveThreshold, "keep", self.keep)

    def keep(self, ballot: selectors.Ballot, config: madtp.PruningConfig) -> Flags:
        counts = on_host(self.counts.pop(0))
        return keep_best(ballot.importance, counts, ballot.candidates, smallest_drop=1)


@pytest.mark.parametrize("name", CASES)
def test_fixed_counts_compute_what_the_same_tokens_compute_as_packed_rows(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case: Case = CASES[name]
    torch.manual_seed(1)
    model, inputs = case.build(), case.inputs(4, 6)
    config = madtp.PruningConfig(alignment_tokens=8)
    packed = madtp.rewrite(model, inputs, config=config).eval()
    frozen = copy.deepcopy(packed)
    assert madtp.freeze(frozen, [inputs])
    same = SameCounts(monkeypatch)
    outputs = _leaves(frozen(**inputs))
    kept = frozen.kept_tokens()
    expected = _leaves(packed(**inputs))
    assert not same.counts
    assert all(torch.equal(kept[site], wanted) for site, wanted in packed.kept_tokens().items())
    assert len(outputs) == len(expected) > 0
    assert all(gap(a, b) < 2e-5 for a, b in zip(expected, outputs, strict=True))
    found, wanted = (_gradients(model, values) for model, values in ((frozen, outputs), (packed, expected)))
    assert found.keys() == wanted.keys()
    # The gradient of a key's bias is zero, but for rounding.
    assert all(gap(wanted[name], found[name]) < 5e-4 for name in wanted)


def _gradients(model: nn.Module, outputs: list[Tensor]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    loss = sum((x * torch.randn(x.shape, generator=generator)).sum() for x in outputs)
    assert isinstance(loss, Tensor)
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_nothing_to_freeze_is_an_error() -> None:
    pruned, images = _pruned()
    with pytest.raises(ExampleInputsError, match="no batches"):
        madtp.freeze(pruned, [])
    with pytest.raises(ExampleInputsError, match="one Tensor; pass a list"):
        madtp.freeze(pruned, images)  # type: ignore[arg-type]
    pruned.temperature = 0.0
    with pytest.raises(ConfigError, match="pruning is off"):
        madtp.freeze(pruned, [(images,)])


def test_a_model_keeps_its_mode_and_settings_after_an_error_and_can_be_frozen_again() -> None:
    pruned, images = _pruned()
    pruned.train()
    with pytest.raises(Exception, match=r"shape|size"):
        madtp.freeze(pruned, [(images,), (images[:, :2],)])
    assert pruned.training
    assert pruned.madtp.config.batching == pruned.madtp.control.config.batching == "ragged"
    weak = madtp.freeze(pruned, [(images,)])
    assert pruned.training
    pruned.gain = 2.0
    strong = madtp.freeze(pruned, [(images,)])
    assert sum(strong.values()) < sum(weak.values())
    with pytest.raises(ExampleInputsError):
        madtp.freeze(pruned, [])
    assert pruned.madtp.control.static_counts == strong


def test_a_sample_never_loses_all_its_tokens() -> None:
    torch.manual_seed(0)
    inputs = {"pixels": torch.randn(3, 3, 32, 32), "input_ids": torch.randint(0, 50, (3, 12))}
    config = madtp.PruningConfig(alignment_tokens=4, merge=False, min_tokens=0)
    pruned = madtp.rewrite(Optional().eval(), inputs, config=config)
    pruned.gain = 1e4
    assert set(madtp.freeze(pruned, [inputs]).values()) == {0}
    assert pruned(**inputs).isfinite().all()
    assert all(count.tolist() == [1, 1, 1] for count in pruned.token_counts().values())


def test_options_that_go_by_slots_are_refused() -> None:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=64, num_classes=5).eval()
    images = torch.randn(2, 3, 64, 64)
    pruned = madtp.rewrite(model, (images,), config=madtp.PruningConfig.official())
    with pytest.raises(ConfigError, match="authors' code"):
        madtp.freeze(pruned, [(images,)])


class Optional(nn.Module):
    """Takes text only if it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = (
            nn.TransformerEncoder(
                nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0), 1, enable_nested_tensor=False
            )
            for _ in range(2)
        )
        self.patches, self.words = nn.Conv2d(3, 16, 8, 8), nn.Embedding(50, 16)

    def forward(self, pixels: Tensor, input_ids: Tensor | None = None) -> Tensor:
        pooled = self.image(self.patches(pixels).flatten(2).transpose(1, 2)).mean(1)
        return pooled if input_ids is None else pooled + self.text(self.words(input_ids)).mean(1)


def test_sites_that_no_batch_has_reached_are_named(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    inputs = {"pixels": torch.randn(3, 3, 32, 32), "input_ids": torch.randint(0, 50, (3, 12))}
    pruned = madtp.rewrite(Optional().eval(), inputs, config=madtp.PruningConfig(alignment_tokens=4))
    madtp.freeze(pruned, [{"pixels": inputs["pixels"]}])
    assert "no batch has reached text.layers.0" in caplog.text
    with pytest.raises(MadtpError, match=r"text\.layers\.0 has no fixed count.*freeze the model again"):
        pruned(**inputs)
    madtp.freeze(pruned, [inputs])
    pruned(**inputs)
