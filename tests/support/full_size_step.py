"""Run a training step of the full-size BLIP-NLVR model at batch 2 on the CPU, and print its peak memory.

``tests/madtp/programs/test_gradient_checkpointing.py`` runs it. By hand:
``python tests/support/full_size_step.py [--checkpointing]``.
"""

from __future__ import annotations

import json
import resource
import sys
import time

import torch
from torch.nn import functional as F

import madtp
import zoo


def peak() -> float:
    """Return the largest resident memory so far, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    torch.manual_seed(0)
    model = zoo.create("blip_nlvr")
    size = model.config.vision.image_size
    ids = torch.randint(1, 1000, (2, 24))
    mask = torch.ones_like(ids)
    mask[1, 20:] = 0
    batch = {"images": torch.randn(2, 2, 3, size, size), "input_ids": ids, "attention_mask": mask}
    pruned = madtp.rewrite(model, batch).train()
    pruned.gradient_checkpointing = "--checkpointing" in sys.argv
    optimiser = torch.optim.AdamW(pruned.parameters(), lr=1e-5)
    began = time.perf_counter()
    loss = F.cross_entropy(pruned(**batch), torch.tensor([0, 1])) + 0.1 * pruned.alignment_loss()
    loss.backward()
    before = peak()
    optimiser.step()
    found = {
        "seconds": time.perf_counter() - began,
        "GiB before the optimiser": before,
        "peak GiB": peak(),
        "gradients": sum(p.grad is not None for p in pruned.parameters()),
        "parameters": sum(1 for _ in pruned.parameters()),
        "loss": loss.item(),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
