"""Image tokens that a vision tower has dropped do not enter the language model behind it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cached_decoders import IMAGE, ReaderBlock, hiding
from model_case import DEPTH, VOCABULARY, WIDTH, Tensors, lively
from region_hosts import Vision
from rewritten_models import eager_arithmetic, gap
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import madtp
from madtp.sites.stream_start import SUFFIX

LAYERS, PATCHES, LENGTH = 3, 16, 24
LAST = DEPTH - 1
TOWER = f"vision.tower.encoder.layers.{LAST}"
Look = Callable[["Chat", Tensor], Tensor]
BY_TOWER = madtp.PruningConfig(
    selection="class_token_attention",
    keep_ratio=0.4,
    layers={"vision*": (LAST,), "decoder*": (0,)},
    alignment=False,
)
"""The last block of the tower drops 9 of 16 patches, and the decoder nothing else."""


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ReaderBlock(layer) for layer in range(LAYERS))

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        length = x.shape[1]
        order = torch.ones(length, length, dtype=torch.bool).tril()
        mask = order & (attention_mask > 0)[:, None, None, :]
        for block in self.blocks:
            x = block(x, attention_mask.cumsum(1), mask, None)
        return x


class Chat(nn.Module):
    """Python that depends on values writes the tower's tokens among words."""

    def __init__(self, look: Look, per_image: int = PATCHES) -> None:
        super().__init__()
        self.vision, self.decoder = Vision(), Blocks()
        self.look, self.per_image = look, per_image
        self.project = nn.Linear(WIDTH * PATCHES // per_image, WIDTH)
        self.words, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(self.decoder(self.embed(pixels, input_ids), attention_mask))

    def embed(self, pixels: Tensor, input_ids: Tensor) -> Tensor:
        x = self.words(input_ids)
        if (input_ids == IMAGE).sum().item() != len(pixels) * self.per_image:
            raise ValueError("one image a sample")
        places = (input_ids == IMAGE)[:, :, None].expand_as(x)
        return x.masked_scatter(places, self.look(self, self.vision(pixels)[:, 1:]))


def projected(chat: Chat, patches: Tensor) -> Tensor:
    return nn.functional.gelu(chat.project(patches)) + 1


def folded(chat: Chat, patches: Tensor) -> Tensor:
    """Two neighbours become one token."""
    return chat.project(patches.reshape(len(patches), -1, 2 * WIDTH))


def mixed(chat: Chat, patches: Tensor) -> Tensor:
    """All patches go into each token."""
    return chat.project(patches) + torch.cumsum(patches, 1)


def chat(look: Look = projected, per_image: int = PATCHES) -> tuple[Chat, Tensors]:
    torch.manual_seed(0)
    ids = torch.randint(10, VOCABULARY, (3, LENGTH))
    for row, first in enumerate((2, 5, 1)):
        ids[row, first : first + per_image] = IMAGE
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    return lively(Chat(look, per_image)), {
        "pixels": torch.randn(3, 3, 32, 32),
        "input_ids": ids,
        "attention_mask": mask,
    }


def entering(pruned: madtp.PrunedModel) -> Tensor:
    """How many tokens of each sample enter the decoder."""
    (state,) = (s for name, s in pruned.madtp.control.record.states.items() if name.endswith(SUFFIX))
    return state.counts


@torch.no_grad()
def test_the_decoder_sees_what_the_tower_has_kept() -> None:
    """It computes what the dense decoder computes in which no layer attends to the dropped tokens."""
    model, inputs = chat()
    with eager_arithmetic():
        pruned = madtp.rewrite(model, inputs, config=BY_TOWER)
        found = pruned(**inputs)
        kept = pruned.kept_tokens()[TOWER][:, 1:]
        assert kept.sum(1).tolist() == [7] * 3
        assert entering(pruned).tolist() == [LENGTH - 9] * 3
        dropped = torch.zeros(3, LENGTH, dtype=torch.bool).masked_scatter(inputs["input_ids"] == IMAGE, ~kept)
        embedded = model.embed(inputs["pixels"], inputs["input_ids"])
        with hiding([dropped]):
            wanted = model.head(model.decoder(embedded, inputs["attention_mask"]))
        words = inputs["input_ids"] != IMAGE
        assert gap(wanted[words], found[words]) < 1e-4
        assert gap(model(**inputs)[words], found[words]) > 1e-2
        with pruned.dense():
            assert gap(model(**inputs), pruned(**inputs)) < 1e-5
            assert entering(pruned).tolist() == [LENGTH] * 3


@torch.no_grad()
def test_a_sample_alone_begins_as_in_its_batch() -> None:
    model, inputs = chat()
    pruned = madtp.rewrite(model, inputs, config=madtp.PruningConfig(alignment_tokens=4, gain=2.0))
    together, counts = pruned(**inputs), entering(pruned)
    assert counts.min() < LENGTH
    for row in range(3):
        alone = pruned(**{name: x[row : row + 1] for name, x in inputs.items()})
        assert entering(pruned).tolist() == [counts[row]]
        assert gap(alone, together[row : row + 1]) < 1e-4


@torch.no_grad()
def test_a_token_of_several_patches_enters_if_one_of_them_does() -> None:
    model, inputs = chat(folded, PATCHES // 2)
    pruned = madtp.rewrite(model, inputs, config=BY_TOWER)
    pruned(**inputs)
    kept = pruned.kept_tokens()[TOWER][:, 1:]
    wanted = kept.unflatten(1, (-1, 2)).any(2).sum(1) + LENGTH - PATCHES // 2
    assert torch.equal(entering(pruned), wanted)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("case", ["mixed", "uniform"])
def test_all_tokens_enter_where_it_is_not_known_which_were_dropped(case: str) -> None:
    model, inputs = chat(mixed if case == "mixed" else projected)
    batching = {"batching": "uniform"} if case == "uniform" else {}
    config = madtp.PruningConfig.from_dict({"alignment_tokens": 4, "gain": 2.0, **batching})
    pruned = madtp.rewrite(model, inputs, config=config)
    pruned(**inputs)
    assert pruned.kept_tokens()[TOWER].sum() < 3 * (PATCHES + 1)
    assert entering(pruned).tolist() == [LENGTH] * 3


def test_survivors_pass_gradients_to_the_tower() -> None:
    model, inputs = chat()
    pruned = madtp.rewrite(model, inputs, config=BY_TOWER)
    pruned(**inputs).square().mean().backward()
    assert all(one.grad is not None and one.grad.isfinite().all() for one in pruned.vision.parameters())
    assert pruned.madtp.macs() < sum(pruned.madtp.macs_by_module("all").values())


class CheckpointedChat(Chat):
    """The host itself recomputes its decoder in the backward."""

    reentrant: bool | None = None

    def forward(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed(pixels, input_ids)
        if self.reentrant is None:
            return self.head(self.decoder(x, attention_mask))
        return self.head(checkpoint(self.decoder, x, attention_mask, use_reentrant=self.reentrant))


@pytest.mark.slow
@pytest.mark.parametrize("layers", [(LAST,), ()], ids=["tower and decoder", "decoder"])
def test_a_decoder_under_a_checkpoint_has_the_gradients_of_one_without(layers: tuple[int, ...]) -> None:
    _, inputs = chat()
    torch.manual_seed(0)
    model = lively(CheckpointedChat(projected))
    config = madtp.PruningConfig(alignment_tokens=4, layers={"vision*": layers, "decoder*": (0,)})
    wanted: dict[str, Tensor] = {}
    for reentrant in (None, False, True):
        model.reentrant = reentrant
        pruned = madtp.rewrite(model, inputs, config=config)
        losses = [pruned(**inputs).square().mean() for _ in range(2)]  # two calls, and then their backward passes
        assert int(entering(pruned).sum()) < 3 * LENGTH or not layers
        sum(losses).backward()
        assert not pruned.report.unpruned
        found = {n: p.grad.clone() for n, p in pruned.named_parameters() if p.grad is not None}
        pruned.zero_grad()
        wanted = wanted or found
        assert found.keys() == wanted.keys()
        assert max(float(gap(wanted[name], found[name])) for name in wanted) < 1e-5


@torch.no_grad()
def test_a_black_image_alone_is_an_image() -> None:
    model, inputs = chat()
    inputs["pixels"][1] = 0
    pruned = madtp.rewrite(model, inputs, config=madtp.PruningConfig(alignment_tokens=4, layers={"decoder*": (0, 1)}))
    together, kept = pruned(**inputs), pruned.kept_tokens()
    assert gap(pruned(**{name: value[1:2] for name, value in inputs.items()}), together[1:2]) < 1e-5
    assert all(torch.equal(own[0], kept[site][1]) for site, own in pruned.kept_tokens().items())


@torch.no_grad()
def test_later_layers_may_be_the_first_that_prune() -> None:
    model, inputs = chat()
    config = madtp.PruningConfig(alignment_tokens=4, gain=2.0, layers={"vision*": (LAST,), "decoder*": (2,)})
    pruned = madtp.rewrite(model, inputs, config=config)
    pruned(**inputs)
    left = pruned.kept_tokens()[TOWER][:, 1:].sum(1)
    assert torch.equal(entering(pruned), left + LENGTH - PATCHES)
    (name,) = (name for name in pruned.madtp.control.record.states if name.endswith(SUFFIX))
    assert name == f"decoder.blocks.2{SUFFIX}"


def test_gradient_checkpointing_keeps_the_decision() -> None:
    model, inputs = chat()
    pruned = madtp.rewrite(model, inputs, config=madtp.PruningConfig(alignment_tokens=4, gain=2.0))
    found = []
    for checkpointing in (False, True):
        pruned.madtp.gradient_checkpointing = checkpointing
        pruned.zero_grad()
        pruned(**inputs).square().mean().backward()
        assert entering(pruned).min() < LENGTH
        found.append({name: one.grad.clone() for name, one in pruned.named_parameters() if one.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all(gap(found[0][name], found[1][name]) < 1e-5 for name in found[0])


@torch.no_grad()
def test_an_image_of_which_nothing_is_left_enters_whole() -> None:
    model, inputs = chat()
    config = madtp.PruningConfig(alignment_tokens=4, gain=6.0, min_tokens=0)
    pruned = madtp.rewrite(model, inputs, config=config)
    pruned(**inputs)
    left = pruned.kept_tokens()[TOWER][:, 1:].sum(1)
    assert 0 in left
    wanted = torch.where(left == 0, torch.tensor(PATCHES), left) + LENGTH - PATCHES
    assert torch.equal(entering(pruned), wanted)


class Encoding(Chat):
    """Encodes images before it calls forward, as ``generate`` of transformers does."""

    def forward(
        self, pixels: Tensor | None, input_ids: Tensor, attention_mask: Tensor, features: Tensor | None = None
    ) -> Tensor:
        x = self.words(input_ids)
        if features is None:
            assert pixels is not None
            features = self.encode(pixels)
        if (input_ids == IMAGE).sum().item() != len(input_ids) * self.per_image:
            raise ValueError("one image a sample")
        x = x.masked_scatter((input_ids == IMAGE)[:, :, None].expand_as(x), features)
        return self.head(self.decoder(x, attention_mask))

    def encode(self, pixels: Tensor) -> Tensor:
        return self.look(self, self.vision(pixels)[:, 1:])

    def generate(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self(None, input_ids, attention_mask, self.encode(pixels))


@torch.no_grad()
def test_methods_that_encode_images_first_begin_alike() -> None:
    _, inputs = chat()
    torch.manual_seed(0)
    model = lively(Encoding(projected))
    pruned = madtp.rewrite(model, inputs, config=BY_TOWER)
    called, counts = pruned(**inputs), entering(pruned)
    assert gap(pruned.generate(**inputs), called) < 1e-4
    assert torch.equal(entering(pruned), counts)
    assert counts.tolist() == [LENGTH - 9] * 3
