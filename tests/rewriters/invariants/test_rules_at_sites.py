"""Rules that need no training, at the sites of rewritten models: what they keep, and what they leave fused."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from cached_decoders import IMAGE, Reader, reader
from model_case import Tensors
from rewritten_models import eager_arithmetic, gap
from small_vit import images, rewritten
from torch import Tensor, nn

import madtp
from madtp.errors import ConfigError, RewriteError
from madtp.method.diversity import determinantal_order, max_min_order, relevance_to, similarities
from madtp.method.selectors import STEP, Ballot, DistinctAboveThreshold


def read(selection: str, **settings: Any) -> tuple[Reader, Tensors, madtp.PrunedModel]:
    model, inputs = reader()
    config = madtp.PruningConfig(selection=selection, keep_ratio=0.25, layers=(1,), **settings)
    with eager_arithmetic():
        return model, inputs, madtp.rewrite(model, inputs, config=config)


def residual_at(model: Reader, inputs: Tensors, block: int) -> Tensor:
    """The residual stream at the input of a block."""
    found: list[Tensor] = []
    with model.body.blocks[block].register_forward_pre_hook(lambda _, given: found.append(given[0])), torch.no_grad():
        model(**inputs)
    return found[0]


def image_tokens(inputs: Tensors, row: int) -> np.ndarray[Any, Any]:
    return np.flatnonzero((inputs["input_ids"][row] == IMAGE).numpy())


def kept_images(pruned: madtp.PrunedModel, inputs: Tensors, row: int) -> set[int]:
    kept = pruned.kept_tokens()["body.blocks.1"][row]
    return set(np.flatnonzero((kept & (inputs["input_ids"][row] == IMAGE)).numpy()))


def assert_alone_as_in_the_batch(pruned: madtp.PrunedModel, inputs: Tensors) -> None:
    together = pruned(**inputs)
    kept = pruned.kept_tokens()["body.blocks.1"]
    for row in range(3):
        alone = pruned(**{name: x[row : row + 1] for name, x in inputs.items()})
        assert torch.equal(pruned.kept_tokens()["body.blocks.1"][0], kept[row])
        words = inputs["attention_mask"][row] > 0
        assert gap(alone[0][words], together[row][words]) < 1e-4


@pytest.mark.parametrize("selection", ["diversity", "conditional_diversity"])
@torch.no_grad()
def test_diversity_rules_pick_by_the_features_at_the_block(selection: str) -> None:
    model, inputs, pruned = read(selection)
    attend = nn.functional.scaled_dot_product_attention
    with patch.object(nn.functional, "scaled_dot_product_attention", wraps=attend) as fused:
        pruned(**inputs)
    assert fused.call_count >= 3, "every attention is fused"
    stream = residual_at(model, inputs, 1)
    for row in range(3):
        at = image_tokens(inputs, row)
        words = (inputs["input_ids"][row] != IMAGE) & (inputs["attention_mask"][row] > 0)
        x, text = stream[row, torch.from_numpy(at)], stream[row, words].mean(0)
        order = (
            max_min_order(similarities(x), 4)
            if selection == "diversity"
            else determinantal_order(similarities(x), relevance_to(x, text), 4)
        )
        assert kept_images(pruned, inputs, row) == set(at[order])


@torch.no_grad()
def test_tokens_that_matter_and_differ_survive_and_their_number_is_their_own() -> None:
    """A token survives if its distance to the nearest survivor, times the root of S over theta, is above the gain's limit."""
    model, inputs = reader()
    config = madtp.PruningConfig(selection="distinct", layers=(1,), alignment_tokens=5, gain=4.0, merge=False)
    with eager_arithmetic():
        pruned = madtp.rewrite(model, inputs, config=config)
    ballots: list[Ballot] = []
    keep = DistinctAboveThreshold.keep
    with patch.object(
        DistinctAboveThreshold,
        "keep",
        lambda self, ballot, config: ballots.append(ballot) or keep(self, ballot, config),
    ):
        pruned(**inputs)
    stream, (ballot,) = residual_at(model, inputs, 1), ballots
    counts = set()
    for row in range(3):
        at = image_tokens(inputs, row)
        distance = 1 - similarities(stream[row, torch.from_numpy(at)])
        ratio = np.sqrt(ballot.importance[row, at] / ballot.theta[row])
        kept: list[int] = []
        nearest = np.full(len(at), distance.max())
        while True:
            value = ratio * nearest
            value[kept] = -1
            if value.max() <= 4.0 * STEP:
                break
            kept.append(int(value.argmax()))
            nearest = np.minimum(nearest, distance[kept[-1]])
        assert kept_images(pruned, inputs, row) == set(at[kept])
        counts.add(len(kept))
    assert len(counts) > 1


@pytest.mark.parametrize("batching", ["ragged", "uniform"])
def test_alike_tokens_of_a_tower_count_once(batching: str) -> None:
    """A picture whose lower half repeats one patch keeps less of it than of the upper half."""
    picture = images(2, 1)
    rows = picture.shape[2] // 2
    picture[:, :, rows:] = 0.5
    pruned = rewritten(selection="distinct", layers=(0,), batching=batching, merge=False, gain=2.0)
    with torch.no_grad():
        pruned(picture)
    kept = pruned.kept_tokens()["blocks.0"][:, 1:]
    half = kept.shape[1] // 2
    assert bool((kept[:, half:].sum(1) < kept[:, :half].sum(1)).all())


@torch.no_grad()
def test_the_last_token_picks_what_it_attends_to() -> None:
    model, inputs, pruned = read("last_token_attention")
    pruned(**inputs)
    seen: list[Tensor] = []
    attend = nn.functional.scaled_dot_product_attention

    def watch(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        scores = (query @ key.transpose(2, 3)) * query.shape[-1] ** -0.5
        seen.append(scores.masked_fill(~mask, float("-inf")).softmax(-1)[:, :, -1].mean(1))
        return attend(query, key, value, mask)

    with patch.object(nn.functional, "scaled_dot_product_attention", watch):
        model(**inputs)
    for row in range(3):
        at = image_tokens(inputs, row)
        best = seen[1][row, torch.from_numpy(at)].topk(4).indices.numpy()
        assert kept_images(pruned, inputs, row) == set(at[best])


@pytest.mark.parametrize("selection", ["last_token_attention", "diversity", "conditional_diversity"])
@torch.no_grad()
def test_a_sample_keeps_alone_what_it_keeps_in_a_batch(selection: str) -> None:
    _, inputs, pruned = read(selection)
    assert_alone_as_in_the_batch(pruned, inputs)


def test_the_class_token_picks_what_it_attends_to() -> None:
    pruned = rewritten(selection="class_token_attention", keep_ratio=0.25, layers=(1,))
    with torch.no_grad():
        pruned(images(2, 1))
    assert pruned.token_counts()["blocks.1"].tolist() == [17, 17]
    assert bool(pruned.kept_tokens()["blocks.1"][:, 0].all())


def test_a_stream_that_does_not_have_what_a_rule_reads_is_an_error() -> None:
    with pytest.raises(RewriteError, match="needs causal attention; restrict"):
        rewritten(selection="last_token_attention", keep_ratio=0.25)


@torch.no_grad()
def test_what_is_distinct_depends_on_no_other_sample() -> None:
    model, inputs = reader()
    config = madtp.PruningConfig(selection="distinct", layers=(1,), alignment_tokens=5, gain=3.0)
    with eager_arithmetic():
        pruned = madtp.rewrite(model, inputs, config=config)
    assert_alone_as_in_the_batch(pruned, inputs)


@pytest.mark.parametrize("selection", ["threshold", "diversity"])
@torch.no_grad()
def test_each_image_keeps_its_best_tokens(selection: str) -> None:
    """Three images of one sample, the last of another size than the rule would leave it."""
    model, inputs = reader()
    inputs["input_ids"][0, 2:18] = torch.tensor([IMAGE] * 5 + [20] + [IMAGE] * 7 + [30] + [IMAGE] * 2)
    inputs["input_ids"][0, 18:20] = IMAGE
    runs = [range(2, 7), range(8, 15), range(16, 20)]
    kept = {}
    for least in (0, 3):
        share = {} if selection == "threshold" else {"keep_ratio": 0.1, "selection": selection}
        config = madtp.PruningConfig(
            temperature=20.0, layers=(1,), min_tokens_per_image=least, merge=False, alignment_tokens=5, **share
        )
        with eager_arithmetic():
            pruned = madtp.rewrite(model, inputs, config=config)
        pruned(**inputs)
        kept[least] = pruned.kept_tokens()["body.blocks.1"]
    assert any(int(kept[0][0, list(run)].sum()) < 3 for run in runs)
    assert all(int(kept[3][0, list(run)].sum()) >= 3 for run in runs)
    assert bool((kept[3] | ~kept[0]).all()), "it only adds"
    assert all(int(kept[3][row, image_tokens(inputs, row)].sum()) >= 3 for row in (1, 2))
    with pytest.raises(ConfigError, match="set it to 0"):
        madtp.freeze(pruned, [inputs])


def test_a_tower_keeps_tokens_of_each_image() -> None:
    counts = {}
    for least in (0, 40):
        pruned = rewritten(min_tokens_per_image=least, temperature=20.0, layers=(1,), merge=False)
        with torch.no_grad():
            pruned(images(2, 1))
        counts[least] = pruned.token_counts()["blocks.1"]
    assert bool((counts[0] < 41).all())
    assert counts[40].tolist() == [41, 41]
    with pytest.raises(ConfigError, match="needs batching='ragged'"):
        madtp.PruningConfig(min_tokens_per_image=1, batching="uniform")
