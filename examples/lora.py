"""LoRA wins back what pruning costs: transformers' CLIP, pruned, with adapters of PEFT.

Shows   that PEFT adapts a pruned model as it adapts any, and that adapters can be merged into it.
Needs   pip install 'madtp[hf,lora]'
Prints  parameters that are trained, and recall of the dense model, of the pruned one before and after training, and merged.

The weights are small ones that ship with madtp. The comments show the lines for a published checkpoint.
"""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import madtp
from stand_ins import captioned_pictures, small_clip

STEPS, BATCH = 12, 32


@torch.inference_mode()
def recall(model: nn.Module, pairs: dict[str, Tensor]) -> float:
    """Return how often the right caption of a picture comes first."""
    found = model(**pairs).logits_per_image.argmax(1)
    return (found == torch.arange(len(found))).float().mean().item()


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = small_clip()  # CLIPModel.from_pretrained("openai/clip-vit-base-patch32").eval()
    # test = processor(text=captions, images=pictures, padding=True, return_tensors="pt")
    test = captioned_pictures("test", 64)
    training = captioned_pictures("train", STEPS * BATCH)
    print(f"dense:             {recall(model, test):.1%} recall@1")

    calibration = {name: value[:32] for name, value in training.items()}
    # Each word of a caption counts, so only image tokens are dropped.
    pruned = madtp.rewrite(model, calibration, config=madtp.PruningConfig(towers=("image",)))
    found = madtp.calibrate(pruned, [calibration], reduction=0.4)
    print(f"pruned:            {recall(pruned, test):.1%} recall@1, {found.reduction_reached:.0%} fewer MACs")

    adapters = LoraConfig(r=8, target_modules=["q_proj", "k_proj", "v_proj", "fc1", "fc2"])
    adapted = get_peft_model(pruned, adapters)
    learning = [value for value in adapted.parameters() if value.requires_grad]
    share = sum(map(torch.numel, learning)) / sum(map(torch.numel, adapted.parameters()))
    print(f"training {share:.1%} of the parameters, {STEPS} steps of {BATCH} pairs")
    optimiser = torch.optim.AdamW(learning, lr=1e-3)
    adapted.train()
    for start in range(0, STEPS * BATCH, BATCH):
        batch = {name: value[start : start + BATCH] for name, value in training.items()}
        loss = adapted(**batch, return_loss=True).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    adapted.eval()
    print(f"pruned, with LoRA: {recall(adapted, test):.1%} recall@1")
    merged = adapted.merge_and_unload()  # a pruned model without adapters
    assert isinstance(merged, madtp.PrunedModel)
    print(f"merged:            {recall(merged, test):.1%} recall@1")


if __name__ == "__main__":
    main()
