"""A scorer of your own: what the tokens of a layer are ranked by.

Shows   a subclass of `Scorer`, what it may read, and a comparison with the rules that come with madtp at equal MACs.
Needs   pip install 'madtp[hf]'
Prints  for each rule how often the right caption of a picture comes first where half of the image tokens are left.

A site has three parts: a scorer ranks tokens, a selector decides how many survive, a reducer decides what becomes of the rest
(docs/method.md, "The parts of a site"). A registered scorer keeps a share of the tokens, `keep_ratio`, which
`madtp.calibrate` finds.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

import madtp
from madtp import PruningConfig
from madtp.method.parts import register_scorer
from madtp.method.scorers import Evidence, Needs, Scorer
from stand_ins import captioned_pictures, small_clip


class Unusual(Scorer):
    """Tokens that point elsewhere than the mean of their picture: 1 - cos(x_j, mean x)."""

    name = "unusual"  # what PruningConfig(selection=...) finds it by
    needs: ClassVar[Needs] = Needs(features=True)  # what it reads; nothing else is computed, and attention stays fused

    def score(self, evidence: Evidence[Any], config: PruningConfig) -> Tensor:
        """Return scores `[B, N]`, the larger the better; those of class token and padding are not looked at."""
        features = evidence.features
        assert features is not None  # as `needs` asks for them
        tokens = features.tokens.float()  # the residual stream at the block's input, [B, N, C]
        counted = tokens.new_ones(tokens.shape[:2]) if features.candidates is None else features.candidates.float()
        mean = (tokens * counted[..., None]).sum(1, keepdim=True) / counted.sum(1)[:, None, None].clamp(min=1)
        return 1 - F.cosine_similarity(tokens, mean, dim=-1)


def main() -> None:
    torch.set_num_threads(1)
    register_scorer(Unusual())
    model = small_clip()  # CLIPModel.from_pretrained("openai/clip-vit-base-patch32").eval()
    pairs = captioned_pictures("test", 64)
    # Behind the attention of the third block of the vision tower alone, so that all rules save alike.
    config = PruningConfig(selection="unusual", keep_ratio=0.5, merge=False, layers={"vision*": (2,), "*": ()})
    pruned = madtp.rewrite(model, pairs, config=config)
    print(f"{'selection':<22}{'MACs saved':>10}{'recall@1':>10}")
    for selection in ("unusual", "diversity", "class_token_attention", "random"):
        pruned.madtp.config = dataclasses.replace(config, selection=selection)  # needs no further rewrite
        with torch.inference_mode():
            found = pruned(**pairs).logits_per_image.argmax(1)
        recall = (found == torch.arange(64)).float().mean()
        saved = 1 - pruned.madtp.macs() / sum(pruned.madtp.macs_by_module("all").values())
        print(f"{selection:<22}{saved:>10.1%}{recall:>10.1%}")


if __name__ == "__main__":
    main()
