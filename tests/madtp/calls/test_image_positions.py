"""Decoders that are handed embeddings: which of them are image features is told by following the host's own run."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from cached_decoders import IMAGE, LAYERS, ReaderBlock, hiding
from model_case import VOCABULARY, WIDTH, Tensors, lively
from region_hosts import Memory
from rewritten_models import eager_arithmetic, gap
from torch import Tensor, nn

import madtp
from madtp.calls.batch import sample_dims
from madtp.calls.image_positions import moved_mask
from madtp.calls.modality_tracking import Tracker
from madtp.errors import MadtpError

CONFIG = madtp.PruningConfig(alignment_tokens=5, temperature=4.0, merge=False)
Writer = Callable[[Tensor, Tensor, Tensor], Tensor]


def scattered(words: Tensor, places: Tensor, image: Tensor) -> Tensor:
    return words.masked_scatter(places[:, :, None], image)


def scattered_everywhere(words: Tensor, places: Tensor, image: Tensor) -> Tensor:
    return 1.5 * torch.masked_scatter(words, places[:, :, None].expand_as(words), image).contiguous()


def put(words: Tensor, places: Tensor, image: Tensor) -> Tensor:
    x = words.clone()
    x[places] = image
    return x


def put_at_indices(words: Tensor, places: Tensor, image: Tensor) -> Tensor:
    return words.index_put(torch.where(places), image)


def put_into_rows(words: Tensor, places: Tensor, image: Tensor) -> Tensor:
    rows = words.reshape(-1, WIDTH).clone()
    rows[places.flatten()] = image
    return rows.view(words.shape)


def chosen(words: Tensor, places: Tensor, image: Tensor) -> Tensor:
    return torch.where(places[:, :, None], image[(places.flatten().cumsum(0) - 1).clamp(min=0)].view_as(words), words)


def into_zeros(words: Tensor, places: Tensor, image: Tensor) -> Tensor:
    x = torch.zeros_like(words)
    x[places] = image
    x[~places] = words[~places]
    return x


def joined(words: Tensor, places: Tensor, image: Tensor) -> Tensor:
    """Sample by sample, between the words; all have as many image features."""
    parts = []
    for row, own in zip(words, image.view(len(words), -1, WIDTH), strict=True):
        place = places[len(parts)]
        start = int(place.int().argmax())
        parts.append(torch.cat([row[:start], own, row[start + len(own) :]]))
    return torch.stack(parts)


WRITERS = (scattered, scattered_everywhere, put, put_at_indices, put_into_rows, chosen, into_zeros, joined)


def mixed(words: Tensor, places: Tensor, image: Tensor) -> Tensor:
    """A sum: which part of it a position has is a matter of values."""
    ranks = (places.flatten().cumsum(0) - 1).view_as(places)[:, :, None] == torch.arange(len(image))
    ranks = ranks & places[:, :, None]
    return words * ~places[:, :, None] + ranks.float() @ image


def turned(words: Tensor, places: Tensor, image: Tensor) -> Tensor:
    return scattered(words, places, image).cumsum(1)


class Told(nn.Module):
    """A decoder of embeddings, with positions stacked by axis ``[2, B, N]``, and further features of the images, packed, that
    are added behind the first block."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ReaderBlock(layer) for layer in range(LAYERS))

    def forward(
        self,
        positions: Tensor,
        x: Tensor,
        attention_mask: Tensor,
        memory: Memory | None = None,
        places: Tensor | None = None,
        deep: Tensor | None = None,
    ) -> Tensor:
        length = attention_mask.shape[1]
        mask = torch.arange(length - x.shape[1], length)[:, None] >= torch.arange(length)
        mask = mask & (attention_mask > 0)[:, None, None, :]
        for block in self.blocks:
            x = block(x, positions.sum(0), mask, memory)
            if places is not None and block is self.blocks[0]:
                x = x.clone()
                x[places] += deep
        return x


class Teller(nn.Module):
    """Takes the patches of all images in one row, writes them among the words and hands these to a decoder."""

    def __init__(self, write: Writer = scattered) -> None:
        super().__init__()
        self.write = write
        self.patches, self.words = nn.Linear(12, WIDTH), nn.Embedding(VOCABULARY, WIDTH)
        self.decoder, self.head = Told(), nn.Linear(WIDTH, VOCABULARY)

    def forward(
        self,
        patches: Tensor | None,
        sizes: Tensor | None,
        input_ids: Tensor,
        attention_mask: Tensor,
        memory: Memory | None = None,
    ) -> Tensor:
        x, further = self.words(input_ids), {}
        if patches is not None and sizes is not None:
            image = torch.cat([self.patches(own) - own.mean() for own in patches.split(sizes.tolist())])
            further = {"places": input_ids == IMAGE, "deep": image.roll(1, 1)}
            x = self.write(x, input_ids == IMAGE, image)
        places = attention_mask.cumsum(1)[:, -input_ids.shape[1] :]
        return self.head(self.decoder(torch.stack([places, places // 2]), x, attention_mask, memory, **further))

    @torch.no_grad()
    def generate(
        self, patches: Tensor | None, sizes: Tensor | None, input_ids: Tensor, attention_mask: Tensor, steps: int = 3
    ) -> Tensor:
        memory, said = Memory(), []
        for _ in range(steps):
            said.append(self(patches, sizes, input_ids, attention_mask, memory)[:, -1].argmax(-1, keepdim=True))
            attention_mask = torch.cat([attention_mask, torch.ones_like(said[-1])], 1)
            patches, sizes, input_ids = None, None, said[-1]
        return torch.cat(said, 1)


def teller(write: Writer = scattered) -> tuple[Teller, Tensors]:
    """A batch of four; the second sample is padded on the left."""
    torch.manual_seed(0)
    ids = torch.randint(10, VOCABULARY, (4, 24))
    for row, start in enumerate((2, 5, 1, 3)):
        ids[row, start : start + 16] = IMAGE
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    sizes = torch.full((4,), 16)
    return lively(Teller(write)), {
        "patches": torch.randn(64, 12),
        "sizes": sizes,
        "input_ids": ids,
        "attention_mask": mask,
    }


def row(inputs: Tensors, number: int) -> Tensors:
    found = {name: x[number : number + 1] for name, x in inputs.items()}
    before = int(inputs["sizes"][:number].sum())
    return {**found, "patches": inputs["patches"][before : before + int(inputs["sizes"][number])]}


@pytest.fixture(autouse=True)
def plain_attention() -> Iterator[None]:
    with eager_arithmetic(), torch.no_grad():
        yield


@pytest.fixture(scope="module")
def telling() -> tuple[Teller, Tensors, madtp.PrunedModel]:
    model, inputs = teller()
    with eager_arithmetic():
        return model, inputs, madtp.rewrite(model, inputs, config=CONFIG)


def _followed(write: Writer, inputs: Tensors, model: Teller) -> Tensor | None:
    with Tracker(inputs.values()) as tracker:
        x = write(model.words(inputs["input_ids"]), inputs["input_ids"] == IMAGE, model.patches(inputs["patches"]))
    return tracker.image_positions(x)


@pytest.mark.parametrize("write", WRITERS)
def test_what_is_written_among_words_is_followed(write: Writer) -> None:
    model, inputs = teller()
    found = _followed(write, inputs, model)
    assert found is not None
    assert torch.equal(found, inputs["input_ids"] == IMAGE)


@pytest.mark.parametrize("write", [mixed, turned])
def test_what_cannot_be_followed_is_not_guessed(write: Writer) -> None:
    model, inputs = teller()
    assert _followed(write, inputs, model) is None


def test_marks_follow_a_view_that_their_own_order_in_memory_does_not_allow() -> None:
    marks = (torch.arange(12) % 5 == 0).view(3, 4).t()  # [4, 3], strides (1, 4)
    values = torch.zeros(4, 3)
    assert torch.equal(moved_mask(Tensor.view, (values, 2, 6), {}, lambda _: marks), marks.reshape(2, 6))
    assert torch.equal(
        moved_mask(Tensor.view_as, (values, torch.zeros(12)), {}, _marks_of(values, marks)), marks.flatten()
    )


def _marks_of(values: Tensor, marks: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda tensor: marks if tensor is values else torch.zeros(tensor.shape, dtype=torch.bool)


def test_without_positions_the_decoder_is_left_alone() -> None:
    _, inputs = teller()
    with pytest.raises(MadtpError, match=r"decoder.* every position is read"):
        madtp.rewrite(Teller(mixed).eval(), inputs, config=CONFIG)


def test_the_decoder_prunes_image_features_alone(telling: tuple[Teller, Tensors, madtp.PrunedModel]) -> None:
    _, inputs, pruned = telling
    assert pruned.report.regions == ("decoder",)
    assert [(s.name, s.segments) for s in pruned.report.sites] == [
        (f"decoder.blocks.{i}", ("image",)) for i in range(LAYERS)
    ]
    pruned(**inputs)
    words = inputs["input_ids"] != IMAGE
    for kept in pruned.kept_tokens().values():
        assert bool(kept[words & (inputs["attention_mask"] > 0)].all())
        assert int(kept.sum()) < kept.numel()
    assert pruned.macs() < sum(pruned.macs_by_module("all").values())


def test_without_pruning_it_tells_what_the_original_tells(
    telling: tuple[Teller, Tensors, madtp.PrunedModel],
) -> None:
    model, inputs, pruned = telling
    with pruned.dense():
        for given in (inputs, row(inputs, 1)):
            assert gap(model(**given), pruned(**given)) < 1e-5
            assert torch.equal(model.generate(**given), pruned.generate(**given))
    assert not pruned.report.notes


def test_dropped_features_are_hidden_from_what_follows(telling: tuple[Teller, Tensors, madtp.PrunedModel]) -> None:
    model, inputs, pruned = telling
    memory, mask = Memory(), inputs["attention_mask"]
    found = [pruned(**inputs, memory=memory)[:, -1]]
    kept = list(pruned.kept_tokens().values())
    ids, mask = torch.full((4, 1), 20), torch.cat([mask, torch.ones(4, 1, dtype=torch.long)], 1)
    found.append(pruned(None, None, ids, mask, memory)[:, -1])
    memory = Memory()
    with hiding([None, ~kept[0], ~kept[1]]):
        wanted = [model(**inputs, memory=memory)[:, -1], model(None, None, ids, mask, memory)[:, -1]]
    assert bool((~kept[0]).any())
    assert all(gap(a, b) < 1e-5 for a, b in zip(wanted, found, strict=True))


def test_a_sample_ignores_its_batch_mates(telling: tuple[Teller, Tensors, madtp.PrunedModel]) -> None:
    _, inputs, pruned = telling
    together, said = pruned(**inputs), pruned.generate(**inputs)
    shown = inputs["attention_mask"][:, :, None] > 0
    for number in range(4):
        alone = pruned(**row(inputs, number))
        assert gap(alone * shown[number], together[number : number + 1] * shown[number]) < 1e-4
        assert torch.equal(pruned.generate(**row(inputs, number)), said[number : number + 1])


def test_images_of_several_sizes(telling: tuple[Teller, Tensors, madtp.PrunedModel]) -> None:
    model, inputs, pruned = telling
    ids = inputs["input_ids"].clone()
    ids[0, 10:18] = 33
    given = {**inputs, "input_ids": ids, "patches": inputs["patches"][8:], "sizes": torch.tensor([8, 16, 16, 16])}
    with pruned.dense():
        assert gap(model(**given), pruned(**given)) < 1e-5
    pruned(**given)
    assert bool(next(iter(pruned.kept_tokens().values()))[0, 10:18].all()), "words now"


def test_text_alone_and_calls_from_elsewhere_are_not_pruned(
    telling: tuple[Teller, Tensors, madtp.PrunedModel],
) -> None:
    model, _, pruned = telling
    ids, mask = torch.full((2, 5), 20), torch.ones(2, 5, dtype=torch.long)
    assert gap(model(None, None, ids, mask), pruned(None, None, ids, mask)) < 1e-5
    assert not pruned.report.notes
    arguments = torch.ones(2, 2, 5, dtype=torch.long), torch.randn(2, 5, WIDTH), mask
    assert gap(model.decoder(*arguments), pruned.decoder(*arguments)) < 1e-5
    assert any("by the model's own forward" in note for note in pruned.report.notes)


def test_where_the_samples_of_a_call_lie() -> None:
    ids, pixels, positions = torch.ones(2, 5), torch.ones(2, 5, 8), torch.ones(3, 2, 5, dtype=torch.long)
    assert sample_dims([positions, None, ids, pixels]) == (1, None, 0, 0)
    assert sample_dims([torch.ones(9, 8), ids, pixels]) is None
    assert sample_dims([torch.ones(2, 2, 5, dtype=torch.long), ids, pixels]) is None, "axes or samples"
    assert sample_dims([torch.ones(3, 1, 5), ids[:1], pixels[:1]]) == (1, 0, 0)
