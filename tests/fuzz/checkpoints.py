"""Readers of checkpoints of other projects, by ``zoo.load_checkpoint``. See :data:`READERS`."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import zoo
from madtp.saving.eight_bit import pack
from zoo.checkpoints.key_table import KeyTable, Row
from zoo.checkpoints.loading import LoadReport

from .reading import Case, Reader, expect


class Net(nn.Module):
    """A few tensors of each kind that loading treats in its own way: joined, turned, resized, tied, whole numbers."""

    checkpoint_tables = (
        KeyTable(
            "fuzzed",
            rows=(Row(("q.*", "k.*"), "qk.*"), Row("turned", "matrix.weight", transpose=True)),
            ignored=("unused.*",),
            optional=("extra",),
            position_grids=("position",),
        ),
    )

    def __init__(self) -> None:
        super().__init__()
        self.qk = nn.Linear(4, 6)
        self.matrix = nn.Linear(6, 5, bias=False)
        self.twin = self.matrix
        self.position = nn.Parameter(torch.zeros(1, 5, 4))
        self.extra = nn.Parameter(torch.zeros(2))
        self.register_buffer("ids", torch.arange(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.matrix(self.qk(x + self.position))


def tensors() -> dict[str, Tensor]:
    """What a file for :class:`Net` holds."""
    draw = torch.Generator().manual_seed(5)
    shapes = {"q.weight": (3, 4), "k.weight": (3, 4), "q.bias": (3,), "k.bias": (3,), "turned": (6, 5)}
    shapes |= {"position": (1, 10, 4), "unused.queue": (7,)}
    return {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()} | {"ids": torch.arange(5)}


def _case(*files: tuple[str, str]) -> Case:
    """Loading of the first file."""
    model = Net()

    def check(report: LoadReport, sealed: bool) -> None:
        state = model.state_dict()
        expect(report.loaded > 0, "nothing was loaded")
        expect(all(bool(value.isfinite().all()) for value in state.values()), "it loaded values that are not finite")
        expect(model(torch.zeros(2, 5, 4)).shape == (2, 5, 5), "the model returns another shape")
        expect(str(report) != "", "the report is empty")

    return Case(files, lambda folder: zoo.load_checkpoint(model, folder / files[0][0]), check, model.state_dict)


def _safetensors(folder: Path) -> Case:
    save_file(tensors(), folder / "x.safetensors")
    return _case(("x.safetensors", "safetensors"))


def _eight_bit(folder: Path) -> Case:
    save_file(pack(tensors(), lambda name, value: value.dim() == 2), folder / "x.safetensors")
    return _case(("x.safetensors", "safetensors"))


def _pth(folder: Path) -> Case:
    torch.save({"model": tensors(), "optimizer": {"state": {}, "lr": [0.1]}, "epoch": 4}, folder / "x.pth")
    return _case(("x.pth", "archive"))


def _legacy(folder: Path) -> Case:
    content = {"model": tensors(), "epoch": 4, "temperature": 2.5}
    torch.save(content, folder / "x.pth", _use_new_zipfile_serialization=False)
    return _case(("x.pth", "pickle"))


def _torchscript(folder: Path) -> Case:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, value in tensors().items():
                owner: nn.Module = self
                *path, last = name.split(".")
                for part in path:
                    if not hasattr(owner, part):
                        owner.add_module(part, nn.Module())
                    owner = getattr(owner, part)
                owner.register_buffer(last, value)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.turned.sum() + self.ids.sum()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(Holder(), torch.zeros(1)), folder / "x.pt")
    return _case(("x.pt", "archive"))


def _sharded(folder: Path) -> Case:
    whole = tensors()
    names = sorted(whole)
    shards = {"one.safetensors": names[:4], "two.bin": names[4:]}
    save_file({name: whole[name] for name in shards["one.safetensors"]}, folder / "one.safetensors")
    torch.save({name: whole[name] for name in shards["two.bin"]}, folder / "two.bin")
    index = {
        "metadata": {"total_size": 1},
        "weight_map": {name: file for file, held in shards.items() for name in held},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return _case(("model.safetensors.index.json", "json"), ("one.safetensors", "safetensors"), ("two.bin", "archive"))


READERS = (
    Reader("safetensors", "a checkpoint in safetensors, by zoo.load_checkpoint", _safetensors),
    Reader("eight_bit", "the same with matrices in eight bits", _eight_bit),
    Reader("pth", "a checkpoint of torch.save, by zoo.load_checkpoint", _pth),
    Reader("legacy_pth", "the same in the format before PyTorch 1.6", _legacy),
    Reader("torchscript", "a TorchScript archive, by zoo.load_checkpoint", _torchscript),
    Reader("sharded", "an index and two shards, by zoo.load_checkpoint", _sharded),
)
