"""Image-text retrieval with transformers' CLIP, pruned without training.

Shows   rewriting a model of transformers, teaching it without labels which tokens matter, and choosing a strength.
Needs   pip install 'madtp[hf]'
Prints  for each strength the MACs saved, the image tokens that are left, how often the right caption comes first, and the time.

The weights are small ones that ship with madtp. The comments show the lines for a published checkpoint.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.benchmark import Timer
from transformers import CLIPModel

import madtp
from stand_ins import captioned_pictures, small_clip

PAIRS = 64


@torch.inference_mode()
def recall(model: CLIPModel, pairs: dict[str, Tensor]) -> float:
    """Return how often the right caption of a picture comes first, by features that are computed one kind at a time."""
    images = model.get_image_features(pixel_values=pairs["pixel_values"]).pooler_output
    texts = model.get_text_features(input_ids=pairs["input_ids"]).pooler_output
    best = (F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T).argmax(1)
    return (best == torch.arange(len(best))).float().mean().item()


def seconds(call: Callable[[], object]) -> float:
    return Timer("call()", globals={"call": call}).blocked_autorange(min_run_time=1).median


def main() -> None:
    torch.set_num_threads(1)
    model = small_clip()  # CLIPModel.from_pretrained("openai/clip-vit-base-patch32").eval()
    # processor = CLIPProcessor.from_pretrained("openai/clip-vit-base-patch32")
    # pairs = processor(text=captions, images=pictures, padding=True, return_tensors="pt")
    pairs = captioned_pictures("test", PAIRS)
    calibration = captioned_pictures("val", 32)  # other pictures than those that results are measured on
    print(f"{'MACs saved':>10}  {'image tokens':>12}  {'recall@1':>8}  {'time':>5}")
    print(f"{'dense':>10}  {145:>12}  {recall(model, pairs):>8.1%}  {1:>5.2f}")

    # Each word of a caption counts, so only image tokens are dropped.
    pruned = madtp.rewrite(model, calibration, config=madtp.PruningConfig(towers=("image",)))
    madtp.teach(pruned, [calibration], steps=50)
    dense_time = seconds(lambda: recall(model, pairs))
    for reduction in (0.2, 0.4):
        found = madtp.calibrate(pruned, [calibration], reduction=reduction)
        right = recall(pruned, pairs)
        left = pruned.madtp.surviving("vision_model").sum(1).float().mean()
        ratio = seconds(lambda: recall(pruned, pairs)) / dense_time
        print(f"{found.reduction_reached:>10.1%}  {left:>12.1f}  {right:>8.1%}  {ratio:>5.2f}")
    print("A larger saving needs training: see lora.py, or `madtp compress`. Small models save less time than MACs.")

    with tempfile.TemporaryDirectory() as folder:
        pruned.save_pretrained(folder)  # transformers' own files, and madtp.json
        # madtp.load(folder, CLIPModel.from_pretrained(folder)) reads it
        print("saved as", ", ".join(sorted(os.listdir(folder))))


if __name__ == "__main__":
    main()
