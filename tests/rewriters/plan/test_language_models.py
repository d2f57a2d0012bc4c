"""Language models: text of which every position is predicted is pruned where the host has nothing else."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from cached_decoders import Reader, hiding, reader
from joint_stream_models import Block
from model_case import VOCABULARY, WIDTH, Tensors, lively
from region_hosts import Memory
from rewritten_models import eager_arithmetic, gap
from torch import Tensor, nn

import madtp
from madtp.errors import LeftAloneError, NoSiteError

CONFIG = madtp.PruningConfig(alignment_tokens=5, temperature=4.0, merge=False)


@pytest.fixture(autouse=True)
def plain_attention() -> Iterator[None]:
    with eager_arithmetic():
        yield


def words() -> Tensors:
    """Three texts of 16 tokens: whole, padded on the left, padded on the right."""
    ids = torch.randint(10, VOCABULARY, (3, 16), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    mask[2, 11:] = 0
    return {"pixels": None, "input_ids": ids, "attention_mask": mask}  # type: ignore[dict-item]


@pytest.fixture(scope="module")
def language() -> tuple[Reader, madtp.PrunedModel]:
    model, _ = reader()
    with eager_arithmetic():
        return model, madtp.rewrite(model, words(), config=CONFIG)


def test_a_host_of_text_alone_is_pruned_and_the_report_says_so(language: tuple[Reader, madtp.PrunedModel]) -> None:
    _, pruned = language
    assert [site.modality for site in pruned.report.sites] == ["text"] * len(pruned.report.sites) != []
    assert any("a language model read at every position" in note for note in pruned.report.notes)
    assert "PruningConfig(towers=('image',)) leaves text alone" in " ".join(str(pruned.report).split())
    assert pruned.madtp.config.towers == ("text",)


def test_it_is_left_alone_on_request_and_beside_images() -> None:
    model, inputs = reader()
    with pytest.raises(NoSiteError, match="leaves out the modality 'text'"):
        madtp.rewrite(model, words(), config=madtp.PruningConfig(towers=("image",)))
    pruned = madtp.rewrite(model, inputs, config=CONFIG)
    assert all(site.segments == ("image",) for site in pruned.report.sites)
    assert not any("language model" in note for note in pruned.report.notes)


class Scaled(nn.Module):
    """A language model that is given more than text."""

    def __init__(self) -> None:
        super().__init__()
        self.reader = Reader()

    def forward(self, scale: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states: Tensor = self.reader(None, input_ids, attention_mask)
        return states * scale[:, None, None]


def test_beside_other_inputs_the_error_says_that_it_could_be_pruned() -> None:
    given = {name: value for name, value in words().items() if name != "pixels"}
    with pytest.raises(LeftAloneError, match="language model") as caught:
        madtp.rewrite(Scaled().eval(), {"scale": torch.ones(3), **given}, config=CONFIG)
    assert any(refusal.by_policy for refusal in caught.value.refusals)


@torch.no_grad()
def test_dropped_tokens_are_hidden_and_the_last_one_stays(language: tuple[Reader, madtp.PrunedModel]) -> None:
    model, pruned = language
    inputs = words()
    found = pruned(**inputs)
    kept = list(pruned.kept_tokens().values())
    last = torch.tensor([15, 15, 10])
    rows = torch.arange(3)
    real = inputs["attention_mask"] > 0
    assert all(bool(alive[rows, last].all()) for alive in kept)
    assert all(bool((real & ~alive).any()) for alive in kept)
    dropped: list[Tensor | None] = [None, ~kept[0], ~kept[1]]
    with hiding(dropped):
        wanted = model(**inputs)
    assert gap(wanted[rows, last], found[rows, last]) < 1e-5
    assert gap(wanted[kept[-1]], found[kept[-1]]) < 1e-5
    with pruned.dense():
        whole = pruned(**inputs)
        assert gap(model(**inputs)[real], whole[real]) < 1e-5
    assert found.shape == whole.shape


@torch.no_grad()
def test_a_text_is_pruned_as_it_would_be_alone(language: tuple[Reader, madtp.PrunedModel]) -> None:
    _, pruned = language
    inputs = words()
    together = pruned(**inputs)
    for row in range(3):
        one = {name: None if x is None else x[row : row + 1] for name, x in inputs.items()}
        real = one["attention_mask"][0] > 0
        assert gap(together[row][real], pruned(**one)[0][real]) < 1e-5


@torch.no_grad()
def test_generation_goes_on_from_a_pruned_prompt(language: tuple[Reader, madtp.PrunedModel]) -> None:
    model, pruned = language
    inputs = {name: None if x is None else x[:2] for name, x in words().items()}
    with pruned.dense():
        assert torch.equal(pruned.generate(**inputs), model.generate(**inputs))
    memory = Memory()
    first = pruned(**inputs, memory=memory)
    kept = list(pruned.kept_tokens().values())
    ids = torch.tensor([[11], [12]])
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(ids)], 1)
    step = pruned(None, ids, mask, memory)
    plain = Memory()
    with hiding([None, ~kept[0], ~kept[1]]):
        wanted = model(**inputs, memory=plain)
        assert gap(wanted[:, -1], first[:, -1]) < 1e-5
        assert gap(model(None, ids, mask, plain), step) < 1e-5
    assert pruned.generate(**inputs).shape == (2, 4)


@pytest.mark.slow
def test_it_trains() -> None:
    inputs = words()
    pruned = madtp.rewrite(reader()[0], inputs, config=madtp.PruningConfig(temperature=4.0)).train()
    pruned(**inputs)[inputs["attention_mask"] > 0].square().mean().backward()
    assert [name for name, p in pruned.named_parameters() if p.grad is None and "patches" not in name] == []


class Options:
    """How to compute, in an object that blocks take."""


class LoopedBlock(Block):
    def forward(self, x: Tensor, options: Options) -> Tensor:  # type: ignore[override]
        places = torch.arange(x.shape[1])
        return super().forward(x, (places[:, None] >= places)[None, None])


class Looping(nn.Module):
    """The root itself calls the blocks, and gives them an object, as language models give a cache."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.blocks = nn.Embedding(VOCABULARY, WIDTH), nn.ModuleList(LoopedBlock() for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        x, options = self.words(ids), Options()
        for block in self.blocks:
            x = block(x, options)
        return x @ self.words.weight.T


def test_a_text_whose_blocks_the_root_calls_is_pruned_where_it_is_alone() -> None:
    torch.manual_seed(0)
    pruned = madtp.rewrite(lively(Looping()), {"ids": torch.randint(0, VOCABULARY, (3, 12))}, config=CONFIG)
    assert len(pruned.report.sites) == 2
