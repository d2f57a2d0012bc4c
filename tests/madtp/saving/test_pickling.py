"""Pickled pruned models: rewritten again when they are read."""

from __future__ import annotations

import io
import pickle

import torch
from small_vit import images, rewritten

import madtp

BATCH = images(2, 0)


def test_a_pickled_model_prunes_as_before() -> None:
    pruned = rewritten(1)
    pruned.gain, pruned.madtp.alignment_weight = 2.0, 0.25
    torch.nn.init.normal_(pruned.madtp.alignment.tokens)
    again = pickle.loads(pickle.dumps(pruned))
    assert isinstance(again, madtp.PrunedModel)
    assert (again.gain, again.madtp.alignment_weight, again.training) == (2.0, 0.25, False)
    with torch.no_grad():
        assert torch.equal(again(BATCH), pruned(BATCH))


def test_torch_saves_whole_models_with_fixed_counts() -> None:
    pruned = rewritten(1)
    madtp.freeze(pruned, [(BATCH,)])
    file = io.BytesIO()
    torch.save(pruned, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    with torch.no_grad():
        assert torch.equal(again(BATCH), pruned(BATCH))
