"""An oracle for tests: the golden towers, run layer by layer with pruning as the authors' code does it.

Plain loops over the functions of ``madtp.method`` with ``PruningConfig.official()`` compare these functions with the golden
data without the rewriter. Start at :func:`run_vision` and :func:`run_text`; :func:`prune` is one pruning call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from functools import partial

import torch
from selecting import select
from torch import Tensor
from torch.nn import functional as F

from madtp.config import PruningConfig
from madtp.method.guidance import guidance, pooled_features
from madtp.method.importance import (
    AttentionStatistics,
    ImportanceTerms,
    attention_statistics,
    best_of,
    importance_terms,
)
from madtp.method.merging import merge_weights, merged_position, merged_token
from madtp.method.selection import candidates_of, sorted_positions, survivor_order
from madtp.method.threshold import keep_mask, threshold

WIDTH, HEADS, DEPTH = 64, 4, 4
Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Call:
    """What one pruning call decided; token axes are without the class token."""

    terms: ImportanceTerms
    scores: Tensor
    theta: Tensor
    above: Tensor
    keep: Tensor
    skipped: bool
    mask_in: Tensor | None
    mask_out: Tensor | None

    @property
    def count(self) -> int:
        return int(self.above.max())


@dataclass(frozen=True)
class Run:
    """Output ``[B, N, C]`` of a tower, features C ``[B, K, d_e]`` summed over its layers, and its pruning calls."""

    output: Tensor
    features: Tensor
    calls: tuple[Call, ...]


def _heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    scores = _heads(q) @ _heads(k).transpose(-2, -1) / (WIDTH // HEADS) ** 0.5
    if mask is not None:
        scores = scores + mask
    probabilities = scores.softmax(-1)
    return probabilities, probabilities @ _heads(v)


def _join(heads: Tensor) -> Tensor:
    return heads.transpose(1, 2).flatten(2)


def _linear(weights: Weights, x: Tensor, name: str) -> Tensor:
    return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])


def _norm(weights: Weights, epsilon: float, x: Tensor, name: str) -> Tensor:
    return F.layer_norm(x, (WIDTH,), weights[f"{name}.weight"], weights[f"{name}.bias"], epsilon)


def prune(
    x: Tensor,
    statistics: AttentionStatistics,
    score: Tensor,
    config: PruningConfig,
    mask: Tensor | None,
    order: Tensor | None,
) -> tuple[Tensor, Tensor | None, Call]:
    """Prune once.

    Args:
        x: ``[B, N, C]`` residual stream behind the self-attention.
        statistics: of the self-attention.
        score: G ``[B, N - 1, K]``, without the class token.
        config: official.
        mask: additive ``[B, N]``; None for images.
        order: ``[B, k]``, the order of the survivors in the golden data, class token not counted. It is an accident of top-k
            in the authors' code, so it is used where it holds the set of tokens that is kept here.
    """
    batch, count = x.shape[:2]
    valid = torch.ones(batch, count, dtype=torch.bool) if mask is None else mask == 0
    protected = torch.zeros(batch, count, dtype=torch.bool)
    protected[:, 0] = True
    candidates = candidates_of(valid, protected, config)
    full = F.pad(score, (0, 0, 1, 0))
    terms = importance_terms(statistics, best_of(full), candidates, config)
    scores = terms.mean()
    theta = threshold(full, scores, candidates, config.temperature)
    judged = scores.numpy(), theta.numpy(), config.gain, candidates.numpy()
    above = torch.from_numpy(keep_mask(*judged, min_tokens=0, smallest_drop=0).sum(1))
    keep = select(terms, theta, candidates, config, gain=config.gain)
    skipped = bool((keep == candidates).all())
    mask_out = mask
    if not skipped:
        dropped = candidates & ~keep
        merged = merged_token(x, merge_weights(scores, dropped))
        survivors = survivor_order(keep | protected, scores, candidates, config.order)[:, : int(keep[0].sum()) + 1]
        if order is not None and torch.equal(order.sort(1).values + 1, survivors[:, 1:].sort(1).values):
            survivors = torch.cat([survivors[:, :1], order + 1], 1)
        if mask is not None:
            mask_out = mask.gather(1, sorted_positions(scores, candidates, int(keep[0].sum())))
            _, merged_is_valid = merged_position(scores, dropped, valid, config.merged_mask)
            assert torch.equal(merged_is_valid, mask_out[:, -1] == 0)
        x = torch.cat([x.gather(1, survivors.unsqueeze(-1).expand(-1, -1, x.shape[-1])), merged], 1)
    cut = ImportanceTerms(*(None if term is None else term[:, 1:] for term in astuple(terms)))
    call = Call(cut, scores[:, 1:], theta, above, keep[:, 1:], skipped, mask, mask_out)
    return x, mask_out, call


def run_vision(
    weights: Weights,
    images: Tensor,
    alignment_tokens: Tensor,
    config: PruningConfig,
    orders: Sequence[Tensor | None] = (None,) * DEPTH,
) -> Run:
    """Run the vision tower on ``images [B, 3, 32, 32]``, with the ``orders`` of :func:`prune`, one per layer."""
    linear, norm = partial(_linear, weights), partial(_norm, weights, 1e-6)

    x = F.conv2d(images, weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"], stride=4)
    x = torch.cat([weights["cls_token"].expand(len(images), -1, -1), x.flatten(2).transpose(1, 2)], 1)
    x = x + weights["pos_embed"]
    features: list[Tensor] = []
    calls: list[Call] = []
    for layer in range(DEPTH):
        block = f"blocks.{layer}"
        queries = x[:, 1:]
        score = guidance(queries, alignment_tokens)
        features.append(pooled_features(queries, score))
        probabilities, output = _attend(*linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv").chunk(3, -1))
        x = x + linear(_join(output), f"{block}.attn.proj")
        if config.temperature > 0:
            rows = torch.ones(x.shape[:2], dtype=torch.bool)
            rows[:, 0] = False
            x, _, call = prune(
                x, attention_statistics(probabilities, output, rows, 0), score, config, None, orders[layer]
            )
            calls.append(call)
        hidden = F.gelu(linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1"))
        x = x + linear(hidden, f"{block}.mlp.fc2")
    return Run(norm(x, "norm"), torch.stack(features).sum(0), tuple(calls))


def run_text(
    weights: Weights,
    ids: Tensor,
    attention_mask: Tensor,
    image_tokens: tuple[Tensor, Tensor],
    alignment_tokens: Tensor,
    config: PruningConfig,
    orders: Sequence[Tensor | None] = (None,) * DEPTH,
) -> Run:
    """Run the text encoder with its two cross-attentions, one to the ``image_tokens`` of each image of the pair."""
    linear = partial(_linear, weights)

    def norm(x: Tensor, name: str) -> Tensor:
        return _norm(weights, 1e-12, x, f"{name}.LayerNorm")

    def project(x: Tensor, source: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
        return linear(x, f"{name}.query"), linear(source, f"{name}.key"), linear(source, f"{name}.value")

    x = weights["embeddings.word_embeddings.weight"][ids]
    x = norm(x + weights["embeddings.position_embeddings.weight"][: ids.shape[1]], "embeddings")
    mask = (1.0 - attention_mask.float()) * -10000.0
    features: list[Tensor] = []
    calls: list[Call] = []
    for layer in range(DEPTH):
        block = f"encoder.layer.{layer}"
        queries = x[:, 1:]
        score = guidance(queries, alignment_tokens)
        features.append(pooled_features(queries, score))
        probabilities, output = _attend(*project(x, x, f"{block}.attention.self"), mask[:, None, None])
        x = norm(linear(_join(output), f"{block}.attention.output.dense") + x, f"{block}.attention.output")
        if config.temperature > 0:
            rows = torch.ones(x.shape[:2], dtype=torch.bool)
            rows[:, 0] = False
            x, pruned_mask, call = prune(
                x, attention_statistics(probabilities, output, rows, 0), score, config, mask, orders[layer]
            )
            assert pruned_mask is not None
            mask = pruned_mask
            calls.append(call)
        cross = f"{block}.crossattention"
        mixed = torch.zeros_like(x)
        for i, source in enumerate(image_tokens):
            _, output = _attend(*project(x, source, f"{cross}.self{i}"))
            mixed = mixed + linear(_join(output), f"{cross}.output.dense{i}") / 2
        x = norm(mixed + x, f"{cross}.output")
        hidden = F.gelu(linear(x, f"{block}.intermediate.dense"))
        x = norm(linear(hidden, f"{block}.output.dense") + x, f"{block}.output")
    return Run(x, torch.stack(features).sum(0), tuple(calls))
