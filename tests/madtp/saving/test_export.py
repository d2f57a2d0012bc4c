"""Frozen models leave Python: torch.export, torch.compile, ONNX and AOTInductor compute what the frozen model computes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import timm
import torch
import torch._dynamo
import torch._inductor.config
from case_models import CASES
from full_disk import full_disk
from joint_stream_models import SingleStream
from model_case import lively, text
from region_hosts import Collector
from torch import Tensor, nn

import madtp
from madtp.errors import ConfigError, ExampleInputsError, ExportError, UnwritableError
from madtp.pruned import PrunedModel
from madtp.saving import artefacts
from madtp.saving import export as export_module
from madtp.saving.artefacts import FORMATS
from madtp.saving.export import open_artefact

CONFIG = madtp.PruningConfig(temperature=4.0, alignment_tokens=8)
EXPORTED = ("vit", "clip_sdpa", "blip_nlvr", "towers_sequence_first_post")
COMPILED = ("vit", "towers_batch_first_post")
# Compiling headers in advance pays off for many files, optimisation for many calls.
HASTE = {"cpp_cache_precompile_headers": False, "aot_inductor.compile_wrapper_opt_level": "O0"}


def tiny(depth: int = 2) -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", depth=depth, embed_dim=32, num_heads=2, img_size=64, num_classes=5)


def small_vit(depth: int = 2) -> tuple[PrunedModel, Tensor]:
    torch.manual_seed(0)
    model = tiny(depth)
    images = torch.randn(4, 3, 64, 64)
    return madtp.rewrite(model.eval(), (images,), config=CONFIG), images


@pytest.fixture(scope="module")
def frozen() -> tuple[PrunedModel, Tensor]:
    pruned, images = small_vit()
    madtp.freeze(pruned, [(images,)])
    return pruned, images


def tensors(output: object) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def assert_close(found: object, wanted: object) -> None:
    for one, other in zip(tensors(found), tensors(wanted), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def frozen_case(name: str) -> tuple[PrunedModel, Mapping[str, Any]]:
    torch.manual_seed(1)
    model, inputs = CASES[name].build(), CASES[name].inputs(3, 6)
    pruned = madtp.rewrite(model, inputs, config=CONFIG).eval()
    madtp.freeze(pruned, [inputs])
    return pruned, inputs


@pytest.mark.parametrize("name", EXPORTED)
def test_frozen_models_export(name: str) -> None:
    pruned, inputs = frozen_case(name)
    with torch.no_grad():
        program = torch.export.export(pruned, (), dict(inputs))
        assert_close(program.module()(**inputs), pruned(**inputs))


@pytest.mark.parametrize("name", COMPILED)
def test_frozen_models_compile_without_a_break(name: str) -> None:
    pruned, inputs = frozen_case(name)
    torch._dynamo.reset()
    compiled = torch.compile(pruned, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_close(compiled(**inputs), pruned(**inputs))


def test_pruning_is_switched_off_for_a_compiled_model_as_for_any(frozen: tuple[PrunedModel, Tensor]) -> None:
    pruned, images = frozen
    torch._dynamo.reset()
    compiled = torch.compile(pruned, backend="aot_eager")
    with torch.no_grad():
        found = compiled(images)
        with pruned.dense():
            dense = compiled(images)
            assert_close(dense, pruned(images))
        assert_close(compiled(images), found)
    assert (dense - found).abs().max() > 1e-4


def test_a_model_with_pruning_off_exports_as_it_is() -> None:
    pruned, images = small_vit()
    pruned.temperature = 0.0
    with torch.no_grad():
        assert_close(torch.export.export(pruned, (images,)).module()(images), pruned(images))


def test_gradients_flow_through_a_compiled_frozen_model(frozen: tuple[PrunedModel, Tensor]) -> None:
    pruned, images = frozen
    torch._dynamo.reset()
    compiled = torch.compile(pruned, fullgraph=True, backend="aot_eager")
    gradients = []
    for run in (compiled, pruned):
        pruned.zero_grad()
        run(images).square().sum().backward()
        gradients.append([p.grad for p in pruned.parameters() if p.grad is not None])
    assert len(gradients[0]) > 10
    assert_close(*gradients)


def test_a_dynamic_model_breaks_the_graph_once_and_new_counts_do_not_recompile() -> None:
    pruned, images = small_vit()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(nn.Sequential(nn.Identity(), pruned, nn.ReLU()), backend="aot_eager")
    with torch.no_grad():
        for scale in (1.0, 3.0, 9.0):
            assert_close(compiled(images * scale), pruned(images * scale).relu())
    counters = torch._dynamo.utils.counters
    assert 1 <= sum(counters["graph_break"].values()) <= 3
    assert not counters["recompiles"]
    assert counters["stats"]["unique_graphs"] <= 2


def test_tracing_and_exporting_a_dynamic_model_say_what_to_do() -> None:
    pruned, images = small_vit()
    with pytest.raises(ExportError, match=r"madtp\.freeze.*madtp\.export"):
        torch.jit.trace(pruned, (images,))
    with pytest.raises(ExportError, match=r"madtp\.freeze.*madtp\.export"):
        torch.export.export(pruned, (images,))


def test_other_inputs_than_a_program_was_made_for_are_named(frozen: tuple[PrunedModel, Tensor]) -> None:
    pruned, _ = frozen
    with pytest.raises(ExportError, match="call the model once with such inputs"):
        torch.export.export(pruned, (torch.randn(2, 3, 32, 32),))


def test_the_record_is_empty_after_a_compiled_call(frozen: tuple[PrunedModel, Tensor]) -> None:
    pruned, images = frozen
    torch._dynamo.reset()
    with torch.no_grad():
        pruned(images)
    torch.compile(pruned, backend="aot_eager")(images)
    with pytest.raises(madtp.MadtpError, match="no forward has run"):
        pruned.token_counts()
    with pytest.raises(madtp.MadtpError, match="the last forward has none"):
        pruned.alignment_loss()


@pytest.mark.parametrize("any_batch", [False, True])
def test_a_pt2_file_is_called_as_the_model_is(
    frozen: tuple[PrunedModel, Tensor], tmp_path: Path, any_batch: bool
) -> None:
    pruned, images = frozen
    pruned.train()
    written = madtp.export(pruned, tmp_path / "vit.pt2", {"x": images}, any_batch=any_batch)
    assert pruned.training
    pruned.eval()
    assert written.format == "pt2"
    assert written.difference < 1e-5
    module = torch.export.load(tmp_path / "vit.pt2").module()
    with torch.no_grad():
        assert_close(module(x=images), pruned(images))
        if any_batch:
            assert_close(module(x=images[:2]), pruned(images[:2]))


def test_an_onnx_file_takes_named_arguments_in_any_order(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    pruned, inputs = frozen_case("towers_batch_first_post")
    run = madtp.export(pruned, tmp_path / "towers.onnx", dict(inputs)).open()
    turned = dict(reversed(inputs.items()))
    assert list(turned) != list(inputs)
    with torch.no_grad():
        assert_close(run(**turned), pruned(**inputs))
    first = next(iter(inputs))
    with pytest.raises(ExampleInputsError, match="was exported with 0 positional arguments and those named"):
        run(**{name: value for name, value in inputs.items() if name != first})
    with pytest.raises(ExampleInputsError, match="misspelt"):
        run(**{("misspelt" if name == first else name): value for name, value in inputs.items()})


class InContainers(nn.Module):
    """Returns its logits, an argument and more, in containers."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, pixels: Tensor) -> dict[str, object]:
        logits = self.tower(pixels)
        return {"logits": logits, "pixels": 2 * pixels, "more": (logits.sum(1), None), "nested": {"a b": -logits}}


def test_an_onnx_file_runs_in_onnx_runtime_and_names_its_outputs_by_their_places(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    model, images = InContainers(tiny()), torch.randn(4, 3, 64, 64)
    pruned = madtp.rewrite(model.eval(), (images,), config=CONFIG).eval()
    madtp.freeze(pruned, [(images,)])
    written = madtp.export(pruned, tmp_path / "vit.onnx", (images,), any_batch=True)
    assert written.format == "onnx"
    with torch.no_grad():
        wanted = pruned(images[:3])
    assert_close(open_artefact(tmp_path / "vit.onnx")(images[:3]), wanted)
    session = onnxruntime.InferenceSession(str(tmp_path / "vit.onnx"))
    assert [one.name for one in session.get_outputs()] == ["logits", "pixels.output", "more.0", "nested.ab"]
    (logits,) = session.run(["logits"], {"pixels": images[:3].numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), wanted["logits"], rtol=1e-3, atol=1e-4)


def test_a_joint_stream_becomes_an_onnx_file(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    inputs = {"pixels": torch.randn(3, 3, 32, 32), **text(3, 12)}
    config = madtp.PruningConfig(alignment_tokens=8, score_queries=3)
    pruned = madtp.rewrite(lively(SingleStream()).eval(), inputs, config=config)
    madtp.freeze(pruned, [inputs])
    assert madtp.export(pruned, tmp_path / "joint.onnx", inputs).difference < 1e-5


@pytest.mark.parametrize(
    ("wanted", "found", "difference"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([1.0, 2.0], [1.0, 1.0], 0.5),
        ([1e-5, 2e-5], [0.0, 0.0], 1.0),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([0.0, 0.0], [0.0, 1e-9], torch.inf),
        ([-torch.inf, 2.0], [-torch.inf, 2.0], 0.0),
        ([-torch.inf, 2.0], [-torch.inf, 0.0], 1.0),
        ([-torch.inf, 2.0], [torch.inf, 2.0], torch.inf),
        ([-torch.inf, 2.0], [torch.nan, torch.nan], torch.inf),
        ([torch.nan, 2.0], [torch.nan, 2.0], 0.0),
        ([1.0, 2.0], [torch.nan, 2.0], torch.inf),
        ([1.0, 2.0], [1.0], torch.inf),
    ],
)
def test_differences_are_measured_by_the_largest_finite_entry(
    wanted: list[float], found: list[float], difference: float
) -> None:
    assert export_module._difference([torch.tensor(wanted)], [torch.tensor(found)]) == pytest.approx(difference)


def test_a_file_says_what_it_is(frozen: tuple[PrunedModel, Tensor], tmp_path: Path) -> None:
    pruned, images = frozen
    facts = []
    for prunes in (True, False):
        with nullcontext() if prunes else pruned.dense():
            madtp.export(pruned, tmp_path / "vit.pt2", (images,))
        extra = {"madtp.json": ""}
        torch.export.load(tmp_path / "vit.pt2", extra_files=extra)
        facts.append(json.loads(extra["madtp.json"]))
    assert [fact["prunes"] for fact in facts] == [True, False]
    assert facts[0]["static_counts"] == pruned.madtp.control.static_counts
    assert facts[1]["static_counts"] == {}
    assert facts[0]["gain"] == pruned.gain


def test_a_call_that_regions_do_not_reproduce_stays_as_it_is_when_compiled() -> None:
    torch.manual_seed(0)
    inputs = {"pixels": torch.randn(3, 3, 32, 32), **text(3, 7)}
    pruned = madtp.rewrite(lively(Collector()).eval(), inputs, config=CONFIG)
    madtp.freeze(pruned, [inputs])
    with torch.no_grad():
        wanted = pruned(**inputs, inner=True)
        torch._dynamo.reset()
        found = torch.compile(pruned, backend="aot_eager")(**inputs, inner=True)
    assert_close(found, wanted)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="needs a C++ compiler")
def test_a_compiled_package_runs(tmp_path: Path) -> None:
    pruned, images = small_vit(depth=1)
    madtp.freeze(pruned, [(images,)])
    with torch._inductor.config.patch(HASTE):
        written = madtp.export(pruned, tmp_path / "vit.pt2", (images,), format="aoti")
    with torch.no_grad():
        assert_close(written.open()(images), pruned(images))


def test_what_cannot_be_exported_leaves_nothing_behind(
    frozen: tuple[PrunedModel, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pruned, images = frozen
    (tmp_path / "folder.pt2").mkdir()
    for path, keywords, error in (
        ("vit.onnx", {"format": "pt2"}, "ends in .pt2"),
        ("vit.pt2", {"format": "tflite"}, "format is 'tflite'"),
        ("folder.pt2", {}, r"folder.pt2 is a folder"),
        ("vit.pt2", {"tolerance": float("nan")}, "tolerance is nan"),
    ):
        with pytest.raises(ConfigError, match=error):
            madtp.export(pruned, tmp_path / path, (images,), **keywords)
    with pytest.raises(ExampleInputsError):
        madtp.export(pruned, tmp_path / "vit.pt2", {"pixels": images})
    with pytest.raises(ExampleInputsError, match="is a list"):
        madtp.export(pruned, tmp_path / "vit.pt2", [images])  # type: ignore[arg-type]
    with pytest.raises(ExampleInputsError, match="one sample"):
        madtp.export(pruned, tmp_path / "vit.pt2", (images[:1],), any_batch=True)
    with pytest.raises(ExportError, match=r"madtp\.rewrite"):
        madtp.export(nn.Identity(), tmp_path / "vit.pt2", (images,))  # type: ignore[arg-type]
    dynamic, _ = small_vit()
    with pytest.raises(ExportError, match=r"madtp\.freeze"):
        madtp.export(dynamic, tmp_path / "vit.pt2", (images,))

    def fails(*args: object, **kwargs: object) -> None:
        raise RuntimeError("data-dependent")

    monkeypatch.setattr(torch.export, "export", fails)
    with pytest.raises(ExportError, match="RuntimeError: data-dependent"):
        madtp.export(pruned, tmp_path / "vit.pt2", (images,))
    assert [path.name for path in tmp_path.iterdir()] == ["folder.pt2"]


@pytest.mark.parametrize("format", ["pt2", "onnx"])
def test_a_full_disk_leaves_nothing_behind(frozen: tuple[PrunedModel, Tensor], tmp_path: Path, format: str) -> None:
    """torch ends the process where its own writer of archives fails."""
    if format == "onnx":
        pytest.importorskip("onnxscript")
    pruned, images = frozen
    path = tmp_path / "runs" / f"vit{FORMATS[format].suffix}"
    with full_disk(), pytest.raises(UnwritableError, match=rf"^{path} cannot be written .*; free space there"):
        madtp.export(pruned, path, (images,), format=format)
    assert not list(tmp_path.iterdir())


def test_an_artefact_that_computes_something_else_is_refused(
    frozen: tuple[PrunedModel, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pruned, images = frozen
    (tmp_path / "vit.pt2").write_text("what was there before")
    opened = artefacts.FORMATS["pt2"]
    wrong = replace(opened, open=lambda path: lambda *args, **kwargs: [1.01 * x for x in opened.open(path)(*args)])
    monkeypatch.setitem(artefacts.FORMATS, "pt2", wrong)
    with pytest.raises(ExportError, match=r"off by 0\.01 of"):
        madtp.export(pruned, tmp_path / "vit.pt2", (images,))
    assert [file.name for file in tmp_path.iterdir()] == ["vit.pt2"]
    assert (tmp_path / "vit.pt2").read_text() == "what was there before"


class Named(NamedTuple):
    """An output with names."""

    scores: Tensor
    pair: tuple[Tensor, Tensor]


def test_outputs_with_names_become_dicts(tmp_path: Path) -> None:
    class Classifier(nn.Module):
        def __init__(self, tower: nn.Module) -> None:
            super().__init__()
            self.tower = tower

        def forward(self, x: Tensor) -> Named:
            scores = self.tower(x)
            return Named(scores, (scores.exp(), scores.mean(1)))

    torch.manual_seed(0)
    tower = timm.create_model("vit_tiny_patch16_224", depth=2, embed_dim=32, num_heads=2, img_size=64, num_classes=5)
    images = torch.randn(4, 3, 64, 64)
    pruned = madtp.rewrite(Classifier(tower).eval(), (images,), config=CONFIG)
    madtp.freeze(pruned, [(images,)])
    madtp.export(pruned, tmp_path / "vit.pt2", (images,))
    output = torch.export.load(tmp_path / "vit.pt2").module()(images)
    assert type(output) is dict
    assert output.keys() == {"scores", "pair"}
    with torch.no_grad():
        assert_close(output, pruned(images))


class Readout(nn.Module):
    """A text tower that is read at two positions that the input gives."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, input_ids: Tensor, first: Tensor, second: Tensor) -> Tensor:
        tokens = self.blocks(self.embedding(input_ids))
        rows = torch.arange(len(tokens))
        return tokens[rows, first] + tokens[rows, second]


def test_a_file_refuses_a_sample_with_more_readouts_than_there_is_room_for(tmp_path: Path) -> None:
    torch.manual_seed(0)
    same = torch.tensor([2, 3, 4])
    inputs = {"input_ids": torch.randint(0, 50, (3, 12)), "first": same, "second": same.clone()}
    config = madtp.PruningConfig(towers=("text",), alignment_tokens=8, min_tokens=0)
    pruned = madtp.rewrite(Readout().eval(), inputs, config=config)
    pruned.gain = 1e6  # keeps the readouts and nothing else
    madtp.freeze(pruned, [inputs])
    assert set(pruned.madtp.control.static_room.values()) == {1}
    madtp.export(pruned, tmp_path / "text.pt2", inputs)
    module = torch.export.load(tmp_path / "text.pt2").module()
    module(**inputs)
    with pytest.raises(RuntimeError, match="more than 1 tokens that must survive"):
        module(**{**inputs, "second": same + 1})
    with pytest.raises(madtp.MadtpError, match="2 tokens that must survive at a site that was frozen to 1"):
        pruned(**{**inputs, "second": same + 1})


def test_damaged_and_missing_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "vit.pt2").write_bytes(b"not an archive")
    with pytest.raises(ExportError, match=r"vit\.pt2 cannot be read as pt2"):
        open_artefact(tmp_path / "vit.pt2")
    with pytest.raises(ExportError, match="there is no file"):
        open_artefact(tmp_path / "other.pt2")
