"""A vision transformer of timm: trained, pruned, and fine-tuned with transformers' Trainer.

Shows   that a pruned model trains like the original, in code that knows nothing of pruning.
Needs   pip install 'madtp[hf]'
Prints  accuracy of the dense model, of the pruned one before and after fine-tuning, and which tokens it keeps.

The task is to name the colour of a small square in a noisy picture, so most tokens are of no use. The model is small enough to
be trained here; the comments show the lines for a published checkpoint.
"""

from __future__ import annotations

import tempfile

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

import madtp

COLOURS = torch.tensor([(1.0, 0, 0), (0, 1.0, 0), (0, 0, 1.0), (1.0, 1.0, 0), (1.0, 0, 1.0), (0, 1.0, 1.0)])
SIZE, SQUARE = 32, 8


class Squares(Dataset[dict[str, Tensor]]):
    """Pictures of 32x32 pixels and the number of the colour of their square; the same index gives the same picture."""

    def __init__(self, count: int, first: int = 0) -> None:
        self.count, self.first = count, first

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        own = torch.Generator().manual_seed(self.first + index)
        colour = torch.randint(len(COLOURS), (), generator=own)
        top, left = torch.randint(SIZE - SQUARE + 1, (2,), generator=own).tolist()
        picture = 0.5 + 0.1 * torch.randn(3, SIZE, SIZE, generator=own)
        picture[:, top : top + SQUARE, left : left + SQUARE] += COLOURS[colour][:, None, None] - 0.5
        return {"x": picture, "label": colour}


def loss_of(logits: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """What Trainer makes small; models of transformers return their loss by themselves."""
    return F.cross_entropy(logits, labels)


def train(model: nn.Module, steps: int, learning_rate: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=32,
            learning_rate=learning_rate,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        )
        Trainer(model, arguments, train_dataset=Squares(10_000), compute_loss_func=loss_of).train()
    model.eval()


@torch.inference_mode()
def accuracy(model: nn.Module, samples: dict[str, Tensor]) -> float:
    return (model(samples["x"]).argmax(-1) == samples["label"]).float().mean().item()


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = timm.models.VisionTransformer(
        img_size=SIZE, patch_size=4, embed_dim=64, depth=4, num_heads=4, num_classes=len(COLOURS)
    )  # timm.create_model("vit_small_patch16_224", pretrained=True)
    test = torch.utils.data.default_collate(list(map(Squares(200, first=10**6).__getitem__, range(200))))
    train(model, steps=100, learning_rate=2e-3)
    print(f"dense:                     {accuracy(model, test):.1%} right")

    calibration = {"x": test["x"][:32]}
    pruned = madtp.rewrite(model, calibration)
    print(madtp.calibrate(pruned, [calibration], reduction=0.8))
    print(f"pruned:                    {accuracy(pruned, test):.1%} right")
    train(pruned, steps=20, learning_rate=1e-3)
    print(f"pruned and fine-tuned:     {accuracy(pruned, test):.1%} right")
    saved = 1 - madtp.count_macs(pruned, calibration) / madtp.count_macs(model, calibration)
    print(f"MACs saved after training: {saved:.1%}")
    for site, counts in pruned.madtp.token_counts().items():
        print(f"  {site}: {counts.float().mean():.1f} of 65 tokens left")

    with tempfile.TemporaryDirectory() as folder:
        madtp.save(pruned, folder)
        print(f"saved and loaded:          {accuracy(madtp.load(folder, model), test):.1%} right")


if __name__ == "__main__":
    main()
