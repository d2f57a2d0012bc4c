"""Modules that keep tensors of samples in attributes: what later calls read is never lost, what nobody reads gets a note."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cached_decoders import LAYERS, Body, ReaderBlock, reader, rotate
from model_case import WIDTH, Tensors
from region_hosts import Memory, heads
from rewritten_models import gap
from torch import Tensor, nn

import madtp
from madtp.calls.call import normalise_call
from rewriters.regions.attribute_reads import reads_earlier
from rewriters.regions.stored_state import stored_by

CONFIG = madtp.PruningConfig(alignment_tokens=4)


class GoesOn(ReaderBlock):
    """Keeps keys and values, and goes on from those of earlier calls where it is told to."""

    def __init__(self, layer: int) -> None:
        super().__init__(layer)
        self.kept: tuple[Tensor, Tensor] | None = None
        self.in_dict: dict[str, tuple[Tensor, Tensor]] = {}

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor, memory: Memory | None) -> Tensor:
        query, key, value = (heads(layer(self.norms[0](x))) for layer in self.own[:3])
        query, key = rotate(query, positions), rotate(key, positions)
        key, value = self.remember(key, value, mask.shape[-1] > mask.shape[-2])
        seen = self.attend(query, key, value, mask)
        x = x + self.own[3](seen.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))

    def remember(self, key: Tensor, value: Tensor, goes_on: bool) -> tuple[Tensor, Tensor]:
        if goes_on:
            key, value = (torch.cat(pair, 2) for pair in zip(self.kept, (key, value), strict=True))
        self.kept = key, value
        return key, value


class GoesOnFromDict(GoesOn):
    def remember(self, key: Tensor, value: Tensor, goes_on: bool) -> tuple[Tensor, Tensor]:
        if goes_on:
            key, value = (torch.cat(pair, 2) for pair in zip(self.in_dict["last"], (key, value), strict=True))
        self.in_dict["last"] = key, value
        return key, value


class Shows(GoesOn):
    """Keeps what it has computed, and reads in each call what that call has kept."""

    def remember(self, key: Tensor, value: Tensor, goes_on: bool) -> tuple[Tensor, Tensor]:
        del goes_on
        self.kept = key, value
        key, value = self.kept
        return key, value

    def last_keys(self) -> Tensor:
        """For people: forward does not call it."""
        assert self.kept is not None
        return self.kept[0]


def body_of(block: type[ReaderBlock]) -> type[Body]:
    class Made(Body):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(block(layer) for layer in range(LAYERS))

    return Made


@pytest.mark.parametrize("block", [GoesOn, GoesOnFromDict])
def test_state_of_modules_survives_a_rewrite(block: type[GoesOn]) -> None:
    """Blocks that go on from what they keep run as they are; what is in front of them is rewritten."""
    model, inputs = reader(body_of(block))
    twin, _ = reader(body_of(block))
    twin.load_state_dict(model.state_dict())
    with pytest.raises(
        madtp.MadtpError, match=r"keep tensors of each sample in body\.blocks\.0.* read them in a later"
    ):
        madtp.rewrite(model, inputs, config=CONFIG)


class WithTower(nn.Module):
    """A vision tower of its own in front of a reader that keeps its keys."""

    def __init__(self, block: type[GoesOn]) -> None:
        super().__init__()
        self.tower = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 2, 32, 0.0, batch_first=True, norm_first=True) for _ in range(2)
        )
        self.embed = nn.Conv2d(3, WIDTH, 8, 8)
        self.look = nn.Linear(WIDTH, WIDTH)
        self.reader, _ = reader(body_of(block))

    def encode(self, pixels: Tensor) -> Tensor:
        x = self.embed(pixels).flatten(2).transpose(1, 2)
        for layer in self.tower:
            x = layer(x)
        return self.look(x.mean(1))

    def forward(self, pixels: Tensor | None, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        out = self.reader(pixels, input_ids, attention_mask)
        return out if pixels is None else out + self.encode(pixels).mean(-1)[:, None, None]


def steps_of(model: Callable[..., Tensor], inputs: Tensors) -> list[Tensor]:
    mask = inputs["attention_mask"]
    found = [model(**inputs)]
    for number in range(3):
        mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], 1)
        found.append(model(None, torch.full((3, 1), 20 + number), mask))
    return found


def test_a_note_tells_of_what_is_kept_for_people() -> None:
    model, inputs = reader(body_of(Shows))
    pruned = madtp.rewrite(model, inputs, config=CONFIG)
    assert len(pruned.report.sites) == LAYERS
    assert any("forward stores tensors of each sample in body.blocks.0.kept" in note for note in pruned.report.notes)
    assert model.body.blocks[0].kept is None, "the model is as it was"


class Spelled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.state: Tensor | None = None
        self.by_key: dict[str, Tensor] = {}


class ReadThenSet(Spelled):
    def forward(self, x: Tensor) -> Tensor:
        x = x if self.state is None else x + self.state
        self.state = x
        return x


class ReadByName(Spelled):
    def forward(self, x: Tensor) -> Tensor:
        x = x + getattr(self, "state", 0)
        self.state = x
        return x


class ReadByMethod(Spelled):
    def forward(self, x: Tensor) -> Tensor:
        self.state = self.joined(x)
        return x

    def joined(self, x: Tensor) -> Tensor:
        return torch.cat([self.state, x])


class SetInOneBranch(Spelled):
    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 1:
            self.state = x
        return x + self.state


class AddedInPlace(Spelled):
    def forward(self, x: Tensor) -> Tensor:
        self.state += x
        return x


class SetInALoop(Spelled):
    def forward(self, x: Tensor) -> Tensor:
        for row in x:
            self.state = row
        return x + self.state


class ReadFromDict(Spelled):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.by_key["last"]


class SetThenRead(Spelled):
    def forward(self, x: Tensor) -> Tensor:
        self.state = x + 1
        return x * self.state


class SetInBothBranches(Spelled):
    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 1:
            self.state = x
        else:
            self.state = x + 1
        return x * self.state


class SetByMethod(Spelled):
    def forward(self, x: Tensor) -> Tensor:
        self.note(x)
        return x * self.state

    def note(self, x: Tensor) -> None:
        self.state, self.by_key["last"] = x, x


class ReadForPeople(Spelled):
    def forward(self, x: Tensor) -> Tensor:
        self.state = x
        self.by_key["last"] = x
        return x

    def shown(self) -> Tensor | None:
        return self.state


@pytest.mark.parametrize(
    "module",
    [ReadThenSet, ReadByName, ReadByMethod, SetInOneBranch, AddedInPlace, SetInALoop],
    ids=lambda c: c.__name__,
)
def test_reads_of_earlier_calls_are_found(module: type[Spelled]) -> None:
    assert reads_earlier(module(), "state")


@pytest.mark.parametrize(
    "module", [SetThenRead, SetInBothBranches, SetByMethod, ReadForPeople], ids=lambda c: c.__name__
)
def test_reads_within_a_call_are_none(module: type[Spelled]) -> None:
    assert not reads_earlier(module(), "state")


def test_entries_of_containers_count_as_their_attribute() -> None:
    assert reads_earlier(ReadFromDict(), "by_key")
    assert not reads_earlier(ReadForPeople(), "by_key")


def test_a_module_without_source_may_read_anything() -> None:
    made: dict[str, type[nn.Module]] = {}
    exec("from torch import nn\nclass Made(nn.Module):\n    def forward(self, x):\n        return x", made)
    assert reads_earlier(made["Made"](), "state")


@pytest.mark.slow
@pytest.mark.parametrize("block", [GoesOn, GoesOnFromDict])
def test_the_tower_beside_modules_with_state_is_pruned(block: type[GoesOn]) -> None:
    torch.manual_seed(0)
    model, (_, inputs) = WithTower(block).eval(), reader()
    twin = WithTower(block).eval()
    twin.load_state_dict(model.state_dict())
    pruned = madtp.rewrite(model, inputs, config=CONFIG)
    assert {site.modality for site in pruned.report.sites} == {"image"}
    pruned.madtp.temperature = 0
    with torch.no_grad():
        pairs = zip(steps_of(pruned, inputs), steps_of(twin, inputs), strict=True)
        assert all(gap(a, b) < 1e-5 for a, b in pairs)


class Biased(ReaderBlock):
    """Keeps a bias for as many heads as there are samples, which follows from parameters."""

    def __init__(self, layer: int) -> None:
        super().__init__(layer)
        self.bias = nn.Parameter(torch.zeros(3, 1, 1))
        self.biases: dict[int, Tensor] = {}

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        if key.shape[2] not in self.biases:
            self.biases[key.shape[2]] = self.bias.expand(3, query.shape[2], key.shape[2]) * 2
        del value
        return super().attend(query, key, key + self.biases[key.shape[2]].mean(), mask)


def test_what_follows_from_parameters_is_no_state() -> None:
    model, inputs = reader(body_of(Biased))
    call = normalise_call(model, (), inputs)
    assert not stored_by(model, call)
    assert stored_by(reader(body_of(GoesOn))[0], call)


def test_a_single_sample_shows_state() -> None:
    model, inputs = reader(body_of(GoesOn))
    one = {name: value[:1] for name, value in inputs.items()}
    found = stored_by(model, normalise_call(model, (), one))
    assert {str(attribute) for attribute in found} == {f"body.blocks.{layer}.kept" for layer in range(LAYERS)}
    assert all(attribute.is_state for attribute in found)


class Hidden(GoesOn):
    """Reads what it keeps in a way that its source does not show."""

    def remember(self, key: Tensor, value: Tensor, goes_on: bool) -> tuple[Tensor, Tensor]:
        if goes_on:
            key, value = (torch.cat(pair, 2) for pair in zip(vars(self)["ke" + "pt"], (key, value), strict=True))
        self.kept = key, value
        return key, value


class Flat(GoesOn):
    """Keeps keys with heads folded into the batch, and reads them."""

    def remember(self, key: Tensor, value: Tensor, goes_on: bool) -> tuple[Tensor, Tensor]:
        del goes_on
        if self.kept is not None and self.kept[0].shape == key.flatten(0, 1).shape:
            key = key + 0 * self.kept[0].unflatten(0, (len(key), -1))
        self.kept = key.flatten(0, 1), value.flatten(0, 1)
        return key, value


class Cache:
    kept: Tensor | None = None


class InObject(GoesOn):
    """Keeps keys in an object of its own."""

    def __init__(self, layer: int) -> None:
        super().__init__(layer)
        self.cache = Cache()

    def remember(self, key: Tensor, value: Tensor, goes_on: bool) -> tuple[Tensor, Tensor]:
        del goes_on
        self.cache.kept = key
        return key, value


@torch.no_grad()
def test_reading_what_a_program_has_not_written_is_an_error() -> None:
    """Although nothing in the source shows that it is read."""
    model, inputs = reader(body_of(Hidden))
    model(**inputs)  # leaves keys of another prompt
    pruned = madtp.rewrite(model, inputs, config=CONFIG)
    for _ in range(2):
        pruned(**inputs)
    longer = torch.cat([inputs["attention_mask"], torch.ones(3, 1, dtype=torch.long)], 1)
    with pytest.raises(madtp.MadtpError, match=r"body\.blocks\.0\.kept is written by the original's forward"):
        pruned(None, torch.full((3, 1), 20), longer)
    (programs,) = pruned.madtp.forward_of_host.programs
    assert len(programs.entries) <= 2, "what stands there makes no further kind of call"
    assert isinstance(model.body.blocks[0].kept, tuple), "the model has what it had"


@pytest.mark.parametrize("block", [Flat, InObject])
@torch.no_grad()
def test_state_is_found_in_whatever_form_it_is_kept(block: type[GoesOn]) -> None:
    model, inputs = reader(body_of(block))
    model(**inputs)
    kept = model.body.blocks[0].cache.kept if block is InObject else model.body.blocks[0].kept
    with pytest.raises(madtp.MadtpError, match="keep tensors of each sample"):
        madtp.rewrite(model, inputs, config=CONFIG)
    assert (model.body.blocks[0].cache.kept if block is InObject else model.body.blocks[0].kept) is kept
