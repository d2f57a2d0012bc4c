"""Hosts of several kinds, and what people do with a model: each use asserts what the original would do.

Start at :data:`HOSTS` and :data:`USES`; docs/compatibility.md prints the table.
"""

from __future__ import annotations

import copy
import io
import pickle
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from small_vit import images, vit
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from two_towers import TwoTowers

import madtp
from madtp import PrunedModel

Inputs = dict[str, Any]
CONFIG = madtp.PruningConfig(alignment_tokens=4)
STRENGTH = 2.0


def _transformers() -> tuple[nn.Module, Inputs]:
    transformers = pytest.importorskip("transformers")
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        vision_config={**tower, "image_size": 32, "patch_size": 8},
        text_config={**tower, "vocab_size": 50, "max_position_embeddings": 8, "eos_token_id": 2},
        projection_dim=16,
    )
    return transformers.CLIPModel(config), {"input_ids": torch.randint(3, 50, (4, 8)), "pixel_values": _pixels(32)}


def _open_clip() -> tuple[nn.Module, Inputs]:
    clip = pytest.importorskip("open_clip.model")
    vision = clip.CLIPVisionCfg(layers=2, width=32, head_width=16, patch_size=8, image_size=32)
    text = clip.CLIPTextCfg(context_length=8, vocab_size=50, width=32, heads=2, layers=2)
    return clip.CLIP(16, vision, text, output_dict=True), {"image": _pixels(32), "text": torch.randint(1, 50, (4, 8))}


def _timm() -> tuple[nn.Module, Inputs]:
    return vit(2), {"x": images(4, 0)}


def _hand_written() -> tuple[nn.Module, Inputs]:
    model = TwoTowers(batch_first=True, norm_first=True, mean=False)
    ids = torch.randint(1, 90, (4, 7))
    return model, {"pixels": _pixels(32), "input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _pixels(size: int) -> Tensor:
    return torch.randn(4, 3, size, size)


@dataclass(frozen=True)
class Host:
    """A model of one kind, rewritten.

    Attributes:
        original: The model, in eval mode.
        inputs: A call of it.
        rewritten: What :func:`madtp.rewrite` made of it.
    """

    original: nn.Module
    inputs: Inputs
    rewritten: PrunedModel

    def pruned(self) -> PrunedModel:
        """A pruned model of its own."""
        return copy.deepcopy(self.rewritten)

    def same(self, one: nn.Module, other: nn.Module, **tolerance: float) -> None:
        """Two models return the same."""
        with torch.no_grad():
            pairs = zip(tensors(one(**self.inputs)), tensors(other(**self.inputs)), strict=True)
        for found, wanted in pairs:
            torch.testing.assert_close(found, wanted, **tolerance)

    def loss(self, model: nn.Module) -> Tensor:
        """A scalar with a gradient."""
        return torch.stack([x.float().square().mean() for x in tensors(model(**self.inputs)) if x.requires_grad]).sum()

    def learning(self, model: nn.Module) -> set[str]:
        """The host's parameters that get a gradient; the model is in training mode afterwards."""
        model.train().zero_grad()
        self.loss(model).backward()
        named = model.named_parameters()
        return {name for name, p in named if p.grad is not None and not name.startswith("madtp.")}


def tensors(output: object) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(output) if isinstance(x, Tensor) and x.is_floating_point()]


BUILDERS: dict[str, Callable[[], tuple[nn.Module, Inputs]]] = {
    "transformers": _transformers,
    "timm": _timm,
    "open_clip": _open_clip,
    "hand-written": _hand_written,
}


@cache
def host(kind: str) -> Host:
    """The host of a kind."""
    torch.manual_seed(0)
    model, inputs = BUILDERS[kind]()
    pruned = madtp.rewrite(model.eval(), inputs, config=CONFIG)
    pruned.madtp.gain = STRENGTH
    return Host(model, inputs, pruned)


def prunes(pruned: PrunedModel) -> None:
    """The last call dropped tokens."""
    counts = pruned.madtp.token_counts()
    tokens = {site.name: site.tokens for site in pruned.madtp.report.sites}
    assert any(bool((kept < tokens[name]).any()) for name, kept in counts.items())


def calls(host: Host) -> None:
    pruned = host.pruned()
    with pruned.madtp.dense():
        host.same(pruned, host.original)
    pruned(**host.inputs)
    prunes(pruned)
    assert isinstance(pruned, type(host.original))


def state_dicts(host: Host) -> None:
    pruned, other = host.pruned(), host.pruned()
    for parameter in other.parameters():
        nn.init.normal_(parameter.data, std=0.05)
    pruned.load_state_dict(other.state_dict())
    host.same(pruned, other)
    missing, unexpected = pruned.load_state_dict(host.original.state_dict(), strict=False)
    assert all(name.startswith("madtp.") for name in missing)
    assert not unexpected


def copies(host: Host) -> None:
    pruned = host.pruned()
    host.same(copy.deepcopy(pruned), pruned)
    host.same(copy.copy(pruned), pruned)


def pickles(host: Host) -> None:
    pruned = host.pruned()
    host.same(pickle.loads(pickle.dumps(pruned)), pruned)


def torch_save(host: Host) -> None:
    pruned, file = host.pruned(), io.BytesIO()
    torch.save(pruned, file)
    file.seek(0)
    host.same(torch.load(file, weights_only=False), pruned)


def saves(host: Host) -> None:
    pruned = host.pruned()
    with tempfile.TemporaryDirectory() as folder:
        host.same(madtp.load(madtp.save(pruned, Path(folder, "model")), copy.deepcopy(host.original)), pruned)


def threads(host: Host) -> None:
    pruned, failures = host.pruned(), []
    with torch.no_grad():
        wanted = tensors(pruned(**host.inputs))

    def work() -> None:
        try:
            with torch.no_grad():
                for _ in range(4):
                    torch.testing.assert_close(tensors(pruned(**host.inputs)), wanted)
                    prunes(pruned)
        except BaseException as error:
            failures.append(error)

    running = [threading.Thread(target=work) for _ in range(4)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert not failures, failures


def casts(host: Host) -> None:
    pruned, model = host.pruned().double(), copy.deepcopy(host.original).double()
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in host.inputs.items()}
    with pruned.madtp.dense():
        Host(model, inputs, pruned).same(pruned, model)
    pruned = host.pruned().bfloat16()
    inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in host.inputs.items()}
    assert all(x.dtype == torch.bfloat16 for x in tensors(pruned(**inputs)))
    prunes(pruned)


def autocast(host: Host) -> None:
    pruned = host.pruned()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        wanted, found = tensors(host.original(**host.inputs)), tensors(pruned(**host.inputs))
    assert [x.dtype for x in found] == [x.dtype for x in wanted]
    prunes(pruned)


def inference(host: Host) -> None:
    pruned = host.pruned()
    with torch.inference_mode():
        pruned(**host.inputs)
    prunes(pruned)


def trains(host: Host) -> None:
    pruned, model = host.pruned(), copy.deepcopy(host.original)
    assert host.learning(pruned) == host.learning(model)
    prunes(pruned)


def recomputes(host: Host) -> None:
    pruned, plain = host.pruned(), host.pruned()
    pruned.madtp.gradient_checkpointing = True
    torch.manual_seed(1)
    first = host.learning(pruned)
    torch.manual_seed(1)
    assert first == host.learning(plain)
    for one, other in zip(pruned.parameters(), plain.parameters(), strict=True):
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad)


def checkpoints(host: Host) -> None:
    pruned = host.pruned().train()
    found = torch.utils.checkpoint.checkpoint(lambda: pruned(**host.inputs), use_reentrant=False)
    torch.stack([x.square().mean() for x in tensors(found) if x.requires_grad]).sum().backward()
    assert any(p.grad is not None for p in pruned.parameters())


def hooks(host: Host) -> None:
    def called(model: nn.Module) -> list[str]:
        names: list[str] = []
        for name, module in model.named_modules():
            if name and name.partition(".")[0] != "madtp":
                module.register_forward_hook(lambda module, args, output, name=name: names.append(name))
        with torch.no_grad():
            model(**host.inputs)
        return names

    pruned = host.pruned()
    assert called(pruned) == called(copy.deepcopy(host.original))
    assert any("hooks on" in note for note in pruned.madtp.report.notes)


def averages(host: Host) -> None:
    pruned = host.pruned()
    averaged = torch.optim.swa_utils.AveragedModel(pruned)
    averaged.update_parameters(pruned)
    host.same(averaged, pruned)


def compiles(host: Host) -> None:
    pruned = host.pruned()
    with torch.no_grad():
        host.same(torch.compile(pruned, backend="eager"), pruned)  # type: ignore[arg-type]


def compiles_frozen(host: Host) -> None:
    pruned = host.pruned()
    madtp.freeze(pruned, [host.inputs])
    with torch.no_grad():
        host.same(torch.compile(pruned, backend="eager", fullgraph=True), pruned)  # type: ignore[arg-type]


def exports(host: Host) -> None:
    pruned = host.pruned()
    madtp.freeze(pruned, [host.inputs])
    with tempfile.TemporaryDirectory() as folder:
        madtp.export(pruned, Path(folder, "model.pt2"), host.inputs)


def quantises(host: Host) -> None:
    pruned = host.pruned()
    found = torch.ao.quantization.quantize_dynamic(pruned, {nn.Linear}, dtype=torch.qint8)
    with torch.no_grad():
        found(**host.inputs)
    prunes(found)


def data_parallel(host: Host) -> None:
    host.pruned()._replicate_for_data_parallel()


def adapts(host: Host) -> None:
    peft = pytest.importorskip("peft")
    pruned = host.pruned()
    linear = [name for name, module in pruned.named_modules() if type(module) is nn.Linear and name[:6] != "madtp."]
    model = peft.get_peft_model(pruned, peft.LoraConfig(target_modules=linear, r=2)).train()
    host.loss(model).backward()
    adapters = [p for name, p in model.named_parameters() if "lora_B" in name]
    assert adapters
    assert any(p.grad is not None for p in adapters)
    prunes(pruned)


def accelerates(host: Host) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(True)
    pruned = host.pruned().train()
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    model, optimiser = accelerator.prepare(pruned, torch.optim.SGD(pruned.parameters(), 0.1))
    accelerator.backward(host.loss(model))
    optimiser.step()
    prunes(pruned)


WORKS, REFUSED, UNPRUNED = "works", "refused", "unpruned"


@dataclass(frozen=True)
class Use:
    """Something that people do with a model.

    Attributes:
        name: Its name in the table.
        run: Does it, and asserts what the original would do.
        outcome: What comes out: it works, is refused with a message, or runs unpruned with a note.
        why: Why it does not work, and what does.
    """

    name: str
    run: Callable[[Host], None]
    outcome: str = WORKS
    why: str = ""


USES = (
    Use("call, with pruning on and off", calls),
    Use("`state_dict`, `load_state_dict`", state_dicts),
    Use("`copy.copy`, `copy.deepcopy`", copies),
    Use("`pickle`, spawned processes", pickles),
    Use("`torch.save(model)`", torch_save),
    Use("`madtp.save`, `madtp.load`", saves),
    Use("calls in several threads", threads),
    Use("`.double()`, `.bfloat16()` after the rewrite", casts),
    Use("`torch.autocast`", autocast),
    Use("`torch.inference_mode`", inference),
    Use("training: every parameter that learned learns", trains),
    Use("gradient checkpointing (`pruned.madtp.gradient_checkpointing`)", recomputes),
    Use("`torch.utils.checkpoint` around the model", checkpoints),
    Use(
        "hooks on all modules",
        hooks,
        UNPRUNED,
        "modules whose place a program takes are not called, so such calls run as the original does, and the report says so; "
        "hooks on single linear layers, norms and embeddings, and on the model itself, run in pruned calls",
    ),
    Use("averaged weights (`AveragedModel`)", averages),
    Use("`torch.compile`", compiles),
    Use("`madtp.freeze`, `torch.compile(fullgraph=True)`", compiles_frozen),
    Use("`madtp.freeze`, `madtp.export`", exports),
    Use("`quantize_dynamic` after the rewrite", quantises),
    Use("PEFT (LoRA)", adapts),
    Use("accelerate, bfloat16", accelerates),
    Use(
        "`nn.DataParallel` on several GPUs",
        data_parallel,
        REFUSED,
        "it copies the model for every call, and programs belong to one copy; use `DistributedDataParallel`",
    ),
)


def table() -> str:
    """The table of docs/compatibility.md, in Markdown."""
    lines = ["| use | " + " | ".join(BUILDERS) + " |", "|---" * (len(BUILDERS) + 1) + "|"]
    reasons = [use for use in USES if use.why]
    for use in USES:
        mark = use.outcome if not use.why else f"{use.outcome} ({reasons.index(use) + 1})"
        lines.append(f"| {use.name} | " + " | ".join([mark] * len(BUILDERS)) + " |")
    return "\n".join([*lines, "", *(f"{number}. {use.name}: {use.why}." for number, use in enumerate(reasons, 1))])
