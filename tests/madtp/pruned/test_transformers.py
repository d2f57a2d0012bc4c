"""A pruned transformers model in the hands of Trainer, pipeline, accelerate, PEFT and save_pretrained."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import madtp
from madtp import PrunedModel

transformers = pytest.importorskip("transformers")
SIZE, WORDS, LENGTH = 32, 50, 8
STRENGTH = 2.0


def host() -> Any:
    """A small model of images and texts with a loss of its own."""
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        vision_config={**tower, "image_size": SIZE, "patch_size": 8},
        text_config={**tower, "vocab_size": WORDS, "max_position_embeddings": LENGTH, "eos_token_id": 2},
        projection_dim=16,
    )
    torch.manual_seed(0)
    return transformers.CLIPModel(config).eval()


def batch(count: int = 4) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {"pixel_values": torch.randn(count, 3, SIZE, SIZE), "input_ids": torch.randint(3, WORDS, (count, LENGTH))}


def rewritten(model: Any = None) -> PrunedModel:
    pruned = madtp.rewrite(host() if model is None else model, batch(), config=madtp.PruningConfig(alignment_tokens=4))
    pruned.madtp.gain = STRENGTH
    return pruned


class Pairs(torch.utils.data.Dataset[dict[str, Any]]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, number: int) -> dict[str, Any]:
        own = torch.Generator().manual_seed(number)
        pixels = torch.randn(3, SIZE, SIZE, generator=own)
        return {
            "pixel_values": pixels,
            "input_ids": torch.randint(3, WORDS, (LENGTH,), generator=own),
            "unknown": 0,
        }


def collated(samples: list[dict[str, Any]]) -> dict[str, Any]:
    assert "unknown" not in samples[0], "Trainer drops columns that the model's forward does not name"
    return {**torch.utils.data.default_collate(samples), "return_loss": True}


def trainer(model: Any, folder: Path, **settings: Any) -> Any:
    arguments = transformers.TrainingArguments(
        str(folder),
        per_device_train_batch_size=4,
        max_steps=4,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **settings,
    )
    return transformers.Trainer(
        model=model, args=arguments, train_dataset=Pairs(), eval_dataset=Pairs(), data_collator=collated
    )


@pytest.mark.slow
def test_trainer_trains_evaluates_saves_and_resumes_to_the_same_model(tmp_path: Path) -> None:
    first = rewritten()
    first.madtp.alignment_weight = 0.1
    before = first.madtp.alignment.tokens.detach().clone()
    run = trainer(first, tmp_path, save_steps=2)
    run.train()
    assert "eval_loss" in run.evaluate()
    assert not torch.equal(first.madtp.alignment.tokens, before)
    second = rewritten()
    second.madtp.alignment_weight = 0.1
    trainer(second, tmp_path / "again", save_strategy="no").train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for (name, one), other in zip(first.named_parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(one, other, msg=name)
    assert all((kept < 17).any() for name, kept in first.token_counts().items() if "vision" in name)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"bf16": True}, {"gradient_checkpointing": True}])
def test_trainer_trains_with(settings: dict[str, bool], tmp_path: Path) -> None:
    pruned = rewritten()
    before = {name: value.detach().clone() for name, value in pruned.named_parameters()}
    trainer(pruned, tmp_path, save_strategy="no", **settings).train()
    still = [name for name, value in pruned.named_parameters() if torch.equal(value, before[name])]
    # Post-norm of unpooled tokens and guidance of fixed decisions have no gradient, in the original and in ours.
    assert all(name.startswith("madtp.") or "post_layernorm" in name for name in still)


@pytest.mark.slow
def test_the_alignment_loss_joins_the_models_own() -> None:
    pruned = rewritten().train()
    plain = pruned(**batch(), return_loss=True).loss
    alignment = pruned.alignment_loss()
    pruned.madtp.alignment_weight = 0.5
    torch.testing.assert_close(pruned(**batch(), return_loss=True).loss, plain + 0.5 * alignment)
    pruned.eval()
    assert pruned(**batch(), return_loss=True).loss < plain + 0.5 * alignment


def test_pipeline_answers() -> None:
    from PIL import Image

    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=SIZE, patch_size=8
    )
    pruned = madtp.rewrite(
        transformers.ViTForImageClassification(config).eval(), {"pixel_values": batch()["pixel_values"]}
    )
    processor = transformers.ViTImageProcessor(size={"height": SIZE, "width": SIZE})
    ask = transformers.pipeline("image-classification", model=pruned, image_processor=processor, device="cpu")
    assert {answer["label"] for answer in ask(Image.new("RGB", (40, 40)))} == {"LABEL_0", "LABEL_1"}
    assert pruned.config is not pruned.madtp.config


@torch.no_grad()
def test_a_saved_folder_is_the_hosts_and_ours(tmp_path: Path) -> None:
    pruned = rewritten()
    nn.init.normal_(pruned.madtp.alignment.tokens)
    pruned.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    original = transformers.CLIPModel.from_pretrained(tmp_path)
    assert not isinstance(original, PrunedModel)
    with pruned.madtp.dense():
        torch.testing.assert_close(pruned(**batch()).logits_per_image, original(**batch()).logits_per_image)
    loaded = madtp.load(tmp_path, original)
    assert loaded.madtp.gain == STRENGTH
    assert torch.equal(loaded(**batch()).logits_per_image, pruned(**batch()).logits_per_image)
    with pytest.raises(madtp.MadtpError, match=r"CLIPModel\.from_pretrained"):
        madtp.load(tmp_path)
    damaged = json.loads((tmp_path / "madtp.json").read_text())
    (tmp_path / "madtp.json").write_text(json.dumps({**damaged, "sites": 3}))
    with pytest.raises(madtp.MadtpError, match="damaged"):
        madtp.load(tmp_path, original)


def test_a_folder_that_cannot_be_written_is_left_as_it_was(tmp_path: Path) -> None:
    pruned = rewritten()
    with pytest.raises(TypeError):
        pruned.save_pretrained(tmp_path / "new", max_shard_size=object())
    assert not (tmp_path / "new" / "madtp.json").exists()


@torch.no_grad()
def test_methods_classes_and_configuration_are_the_hosts() -> None:
    pruned, model = rewritten(), host()
    with pruned.madtp.dense():
        found, wanted = (one.get_image_features(pixel_values=batch()["pixel_values"]) for one in (pruned, model))
    torch.testing.assert_close(getattr(found, "pooler_output", found), getattr(wanted, "pooler_output", wanted))
    assert (pruned.device, pruned.dtype, type(pruned.config)) == (model.device, model.dtype, type(model.config))
    assert isinstance(pruned, transformers.CLIPModel)
    again = pickle.loads(pickle.dumps(pruned))
    assert torch.equal(again(**batch()).logits_per_image, pruned(**batch()).logits_per_image)


def test_a_switch_of_the_configuration_is_followed() -> None:
    pruned = rewritten()
    pruned.config.vision_config.output_hidden_states = True
    states = pruned(**batch()).vision_model_output.hidden_states
    assert states is not None
    assert len(states) == 3


def test_accelerate_prepares_and_trains() -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(True)
    pruned = rewritten().train()
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    model, optimiser = accelerator.prepare(pruned, torch.optim.SGD(pruned.parameters(), 0.1))
    loss = model(**batch(), return_loss=True).loss
    accelerator.backward(loss)
    optimiser.step()
    assert accelerator.unwrap_model(model) is pruned
    assert pruned.get_parameter("visual_projection.weight").grad is not None


@pytest.mark.slow
def test_lora_adapts_before_and_after(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2)
    for model in (peft.get_peft_model(rewritten(), settings), rewritten(peft.get_peft_model(host(), settings))):
        model.train()
        model(**batch(), return_loss=True).loss.backward()
        adapters = [p for name, p in model.named_parameters() if "lora_B" in name]
        assert adapters
        assert all(p.grad is not None for p in adapters)
    peft.get_peft_model(rewritten(), settings).save_pretrained(tmp_path)
    assert (tmp_path / "adapter_config.json").exists()
