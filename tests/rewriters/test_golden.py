"""The rewriter with `PruningConfig.official()` against golden data of the authors' code, end to end.

tests/data/golden/README.md describes the data. The reference's text masks are misaligned with its tokens; `mask_order="sorted"`
reproduces that.
"""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest
import torch
from project_paths import DATA
from safetensors.torch import load_file
from torch import Tensor, nn

import madtp
from zoo.blip.config import NlvrConfig, TextConfig, VisionConfig
from zoo.blip.nlvr import BlipNlvr
from zoo.blip.text import key_mask

GOLDEN = DATA / "golden"
MANIFEST: dict[str, list[dict[str, Any]]] = json.loads((GOLDEN / "manifest.json").read_text())["cases"]
CONFIG = NlvrConfig(
    vision=VisionConfig(image_size=32, patch_size=4, width=64, depth=4, heads=4, mlp_width=128),
    text=TextConfig(vocabulary=120, positions=32, width=64, depth=4, heads=4, mlp_width=128),
)


class Towers(nn.Module):
    """The golden towers with their class tokens as outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.model = BlipNlvr(CONFIG)

    def forward(self, images: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        first, second = self.model.encode_images(images)
        text = self.model.text_encoder(ids, key_mask(mask), first, second)
        return torch.cat([first[:, 0], second[:, 0]]), text[:, 0]


@functools.cache
def data() -> dict[str, Tensor]:
    return {k: v.float() if v.is_floating_point() else v for k, v in load_file(GOLDEN / "cases.safetensors").items()}


@functools.cache
def pruned() -> madtp.PrunedModel:
    towers = Towers().eval()
    towers.model.visual_encoder.load_state_dict(load_file(GOLDEN / "weights_vit.safetensors"))
    towers.model.text_encoder.load_state_dict(load_file(GOLDEN / "weights_nlvr.safetensors"))
    rewritten = madtp.rewrite(towers, inputs([0, 1]), config=madtp.PruningConfig.official())
    with torch.no_grad():
        rewritten.get_submodule("madtp").alignment.tokens.copy_(data()["in/space_dict"])
    return rewritten


def inputs(samples: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    images = data()["in/images"].unflatten(0, (2, 4)).transpose(0, 1)
    return images[samples], data()["in/ids"][samples].long(), data()["in/attention_mask"][samples].long()


@pytest.mark.parametrize("case", sorted(MANIFEST))
def test_rewritten_towers_equal_the_official_code(case: str) -> None:
    _, batch, temperature = case.split("/")
    samples = [int(batch[-1])] if batch.startswith("alone") else list(range(int(batch[1:])))
    model = pruned()
    model.temperature = float(temperature[1:])
    vision, text = model(*inputs(samples))
    golden = data()
    for name, ours in (("out_cls_vit", vision), ("out_cls_text", text)):
        if f"{case}/{name}" in golden:
            torch.testing.assert_close(ours, golden[f"{case}/{name}"], atol=1e-4, rtol=0)
    if model.temperature == 0:
        return
    if f"{case}/loss_sim" in golden:
        torch.testing.assert_close(model.alignment_loss(), golden[f"{case}/loss_sim"], atol=1e-5, rtol=0)
    counts = list(model.token_counts().values())
    for call, ours in zip(MANIFEST[case], counts, strict=True):
        assert ours.tolist() == [call["n_out"] + 1] * len(ours), call["tag"]


def test_kept_sets_equal_the_official_code() -> None:
    model = pruned()
    model.temperature = 4.0
    model(*inputs([0, 1, 2, 3]))
    kept = list(model.kept_tokens().values())
    alive = None
    for call, ours in enumerate(kept[:4]):
        order = data()[f"nlvr/B4/T4/v{call}/order"].long()
        if alive is None:
            alive = torch.arange(64).expand(8, 64).clone()
        expected = torch.zeros(8, 65, dtype=torch.bool)
        expected[:, 0] = True
        positions = alive.gather(1, order)
        rows, columns = (positions >= 0).nonzero(as_tuple=True)
        expected[rows, positions[rows, columns] + 1] = True
        assert torch.equal(ours, expected), call
        merged = order.size(1) < alive.size(1)
        alive = torch.cat([positions, torch.full((8, 1), -1)], 1) if merged else alive
