"""Rewritten models in what people wrap models in: DDP, FSDP, averaged weights, LoRA, autocast, gradient accumulation."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import tiny_training as tiny
import torch
from process_group import run_workers
from torch import Tensor, nn

from madtp.errors import MadtpError
from madtp.processes import current
from madtp.pruned import PrunedModel

CLOSE = {"rtol": 1e-5, "atol": 1e-7}


def inputs(rows: range = range(4)) -> dict[str, Tensor]:
    """Texts are cut or padded to ten words, so that parts of a batch are alike."""
    made = tiny.samples(0, rows)
    ids = nn.functional.pad(made["input_ids"], (0, 10 - made["input_ids"].shape[1]))
    return {"pixels": made["pixels"], "input_ids": ids, "attention_mask": (ids != 0).long()}


def loss(output: Any, pruned: PrunedModel) -> Tensor:
    return output["score"].square().mean() + 0.3 * pruned.alignment_loss()


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def whole_batch() -> dict[str, Tensor]:
    pruned = tiny.rewritten()
    loss(pruned(**inputs()), pruned).backward()
    return gradients(pruned)


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **CLOSE, msg=lambda text, n=name: f"{n}: {text}")


def test_accumulated_gradients_equal_those_of_the_big_batch() -> None:
    pruned = tiny.rewritten()
    for start in range(0, 4, 2):
        (loss(pruned(**inputs(range(start, start + 2))), pruned) / 2).backward()
    same(gradients(pruned), whole_batch())


def test_calls_aside_leave_the_record_of_the_forward_before() -> None:
    pruned = tiny.rewritten()
    pruned(**inputs())
    counts, macs, alignment = pruned.token_counts(), pruned.macs(), pruned.alignment_loss()
    with pruned.aside():
        pruned(**inputs(range(2)))
        assert all(len(kept) == 2 for kept in pruned.token_counts().values())
    with pytest.raises(RuntimeError, match="in between"), pruned.aside():
        raise RuntimeError("in between")
    assert all(torch.equal(kept, counts[name]) for name, kept in pruned.token_counts().items())
    assert pruned.macs() == macs
    assert torch.equal(pruned.alignment_loss(), alignment)
    pruned(**inputs(range(3)))
    assert all(len(kept) == 3 for kept in pruned.token_counts().values())


def test_aside_of_no_forward_there_is_no_record() -> None:
    pruned = tiny.rewritten()
    with pruned.aside():
        pruned(**inputs())
    with pytest.raises(MadtpError, match="no forward has run yet"):
        pruned.macs()


def wrapped(folder: Path) -> dict[str, Any]:
    """In workers: DDP around the rewritten model itself, and FSDP around another."""
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    rank = current().rank
    part = inputs(range(2 * rank, 2 * rank + 2))
    found: dict[str, Any] = {}
    pruned = tiny.rewritten()
    parallel = DistributedDataParallel(pruned)  # raises in the second step if a parameter got no gradient in the first
    for _ in range(2):
        parallel.zero_grad()
        loss(parallel(**part), pruned).backward()
    found["ddp"] = gradients(pruned)
    pruned = tiny.rewritten()
    for layer in pruned.modules():
        if (
            isinstance(layer, nn.Linear)
            and min(layer.weight.shape) >= 16
            and "NonDynamically" not in type(layer).__name__
        ):
            fully_shard(layer)
    fully_shard(pruned)
    optimiser = torch.optim.SGD(pruned.parameters(), lr=0.1)
    loss(pruned(**part), pruned).backward()
    found["fsdp"] = {name: p.grad.full_tensor() for name, p in pruned.named_parameters() if p.grad is not None}
    optimiser.step()
    found["kept"] = sum(int(counts.sum()) for counts in pruned.token_counts().values())
    found["after"] = {name: p.full_tensor().detach() for name, p in pruned.named_parameters()}
    return found


def test_ddp_and_fsdp_have_the_gradients_of_one_process(tmp_path: Path) -> None:
    expected = whole_batch()
    started = dict(tiny.rewritten().named_parameters())
    for found in run_workers(wrapped, tmp_path):
        same(found["ddp"], expected)
        same(found["fsdp"], expected)
        same(found["after"], {name: p.detach() - 0.1 * expected[name] for name, p in started.items()})
        assert found["kept"] > 0


def test_a_copy_prunes_by_itself_and_forgets_the_last_forward() -> None:
    pruned = tiny.rewritten()
    pruned(**inputs())
    twin = copy.deepcopy(pruned)
    twin.gain = 3.0
    assert pruned.gain == 1.0
    assert twin.madtp.control.alignment is twin.madtp.alignment
    few, many = (sum(int(c.sum()) for c in m.token_counts().values()) for m in (twin, pruned) if m(**inputs()))
    assert few < many
    loss(twin(**inputs()), twin).backward()
    assert not gradients(pruned)


@pytest.mark.parametrize("library", ["torch", "timm"])
def test_averaged_weights_are_a_pruned_model(library: str) -> None:
    from timm.utils import ModelEmaV3
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    pruned = tiny.rewritten()
    pruned(**inputs())
    start = {name: p.detach().clone() for name, p in pruned.named_parameters()}
    if library == "torch":
        average: Any = AveragedModel(pruned, multi_avg_fn=get_ema_multi_avg_fn(0.75))
        average.update_parameters(pruned)  # the first one copies
    else:
        average = ModelEmaV3(pruned, decay=0.75)
    with torch.no_grad():
        for parameter in pruned.parameters():
            parameter.add_(1.0)
    (average.update_parameters if library == "torch" else average.update)(pruned)
    for name, value in average.module.named_parameters():
        torch.testing.assert_close(value, start[name] + 0.25)
    average.eval()
    with torch.no_grad():
        assert average.module(**inputs())["score"].isfinite().all()
    assert average.module.token_counts()


LAYERS = ["linear1", "linear2"]


def test_lora_on_a_rewritten_model_and_a_rewrite_of_lora_are_one() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=LAYERS, init_lora_weights=False)
    torch.manual_seed(0)
    after = peft.get_peft_model(tiny.rewritten(), config)
    torch.manual_seed(0)
    before = tiny.rewrite(peft.get_peft_model(tiny.towers(), config)).train()
    # In the order of the modules, which both share.
    lora = [{n: p for n, p in m.named_parameters() if "lora" in n} for m in (after, before)]
    assert [p.shape for p in lora[0].values()] == [p.shape for p in lora[1].values()]
    with torch.no_grad():
        for one, other in zip(*(part.values() for part in lora), strict=True):
            other.copy_(one)
    outputs = [m(**inputs()) for m in (after, before)]
    torch.testing.assert_close(outputs[0]["score"], outputs[1]["score"])
    for output, model in zip(outputs, (after, before), strict=True):
        (output["score"].square().mean() + model.alignment_loss()).backward()
    for one, other in zip(*(part.values() for part in lora), strict=True):
        assert one.grad is not None
        torch.testing.assert_close(one.grad, other.grad)
    assert all("lora" in name for name in gradients(after))


def test_autocast_computes_in_bfloat16_and_trains_all() -> None:
    pruned = tiny.rewritten().float()
    call = inputs()
    call["pixels"] = call["pixels"].float()
    exact = pruned(**call)["score"]
    with torch.autocast("cpu", torch.bfloat16), warnings.catch_warnings():
        warnings.simplefilter("error")
        output = pruned(**call)
        value = loss(output, pruned)
    value.backward()
    assert len(gradients(pruned)) == sum(1 for _ in pruned.parameters())
    assert all(gradient.dtype == torch.float32 and gradient.isfinite().all() for gradient in gradients(pruned).values())
    assert (output["score"] - exact).abs().max() < 0.2
