"""Second forms of operations that ``rule_samples.py`` calls once, and near misses of rules that have none there.

Together the two files hold each rule in threes: a call where it fires, a commuted or unusual form where it fires too, and a
near miss that must be refused. ``tests/rewriters/axes/test_table.py`` sees to it that none is missing.
"""

from __future__ import annotations

import torch
from rule_harness import BATCH, TOKENS, Sample, sample
from rule_samples import x

aten = torch.ops.aten
FLIPPED = (4, "N", 1, "B")

FORMS: list[Sample] = [
    # element-wise, with the dimensions in another order
    sample(aten.bitwise_not.default, x(*FLIPPED, kind="bool")),
    sample(aten.addcmul.default, x(TOKENS, 4), x(), x(4)),
    sample(aten.angle.default, x("N", "B", 3, kind="complex")),
    sample(aten.clamp.default, x(*FLIPPED), None, 2.0),
    sample(aten.clamp_max.default, x(*FLIPPED), 2.0),
    sample(aten.clamp_min.default, x(*FLIPPED), 0.0),
    sample(aten.clip.default, x(*FLIPPED), 0.0),
    sample(aten.complex.default, x(TOKENS), x("B", "N")),
    sample(aten.polar.default, x(TOKENS, 3), x("B", "N", 3)),
    sample(aten.dropout.default, x(*FLIPPED), 0.1, False),
    sample(aten.full_like.default, x(*FLIPPED), 2.0, constant=True),
    sample(aten.fill.Scalar, x(), 2.0, constant=True),
    sample(aten.fill.Scalar, x(*FLIPPED), 0.5, constant=True),
    sample(aten._to_copy.default, x(*FLIPPED), dtype=torch.float64),
    sample(aten.new_zeros.default, x(*FLIPPED), [TOKENS, 2]),
    sample(aten.new_ones.default, x(*FLIPPED), [4], dtype=torch.bool),
    sample(aten.new_full.default, x(), [BATCH, 1, TOKENS], -1.0),
    # dimensions move
    sample(aten.t.default, x(("B", "N"), 4)),
    sample(aten.mT.default, x("B", 2, 4, "N")),
    sample(aten.permute.default, x("N", "B", 2, 3), [-3, -2, -4, -1]),
    sample(aten._unsafe_view.default, x(("B", "N"), 4), [BATCH, TOKENS, 2, 2]),
    sample(aten.reshape_as.default, x("B", 2, "N", 3), x(("B", 2), "N", 3)),
    sample(aten.view_as.default, x("B", "N", 2, 2), x("B", "N", 4)),
    sample(aten.concat.default, [x(BATCH, 1, TOKENS), x("B", 2, "N")], 1),
    # channels are mixed or reduced
    sample(aten.rms_norm.default, x("N", "B", 2, 4), [2, 4]),
    sample(aten.log_softmax.int, x("B", 3, "N"), 1),
    sample(aten.cumsum.default, x("B", 3, "N"), 1),
    sample(aten.amin.default, x("B", 3, "N"), [1], True, constant=True),
    sample(aten.var.correction, x("B", 3, 4, "N"), [1, 2], keepdim=True),
    sample(aten.any.dim, x("B", 3, "N", kind="bool"), 1, True),
    sample(aten.all.dim, x("B", 3, "N", kind="bool"), 1, True),
    sample(aten.linalg_vector_norm.default, x("B", 3, "N"), 1.0, [1]),
    sample(aten.norm.ScalarOpt_dim, x("B", 3, "N"), 1, [1], True),
    sample(aten.embedding.default, x(9, 4), x("N", "B", 2, kind="long")),
    sample(aten.gather.default, x("N", 5, "B"), 1, x("N", 2, "B", kind="long")),
    # one token of each sample
    sample(aten.index.Tensor, x("B", "N", 2, 3), [x(BATCH, kind="arange"), x(BATCH, kind="kept")]),
    # entries of another dimension
    sample(aten.index.Tensor, x("B", "N", 6, 3), [None, None, x(1, kind="long")]),
    sample(aten.index.Tensor, x("B", 4, "N"), [None, x(2, 3, kind="long")]),
]

NEAR_MISSES: list[tuple[Sample, str]] = [
    (sample(aten.where.self, x("B", "M", 1, kind="bool"), x(), x(4)), "nothing to do with each other"),
    (sample(aten.stack.default, [x(), x("B", "M", 4)], 0), "nothing to do with each other"),
    (sample(aten.select.int, x(), 0, 1), "select along"),
    (sample(aten.sym_size.int, x(("B", "N"), 4), 0), "folded"),
    (sample(aten.index.Tensor, x("N", "B", 4), [x(BATCH, kind="kept"), x(BATCH, kind="arange")]), "one token a sample"),
    (sample(aten.index.Tensor, x(4, 3, "N"), [x(2, kind="long"), x(2, kind="long")]), "beside a token axis"),
    (sample(aten.matmul.default, x(), x(4)), "vector"),
    (sample(aten.rms_norm.default, x("B", 4, "N"), [TOKENS]), "mixes"),
    (sample(aten.log_softmax.int, x(), 1), "mixes"),
    (sample(aten.concat.default, [x(), x(BATCH, TOKENS, 4)], 0), "cat"),
    (sample(aten.amin.default, x(), [1]), "amin"),
    (sample(aten.any.dim, x("B", "N", 4, kind="bool"), 1), "any"),
    (sample(aten.all.dim, x("B", "N", 4, kind="bool"), 1), "all"),
    (sample(aten.linalg_vector_norm.default, x(), 2, [1]), "linalg_vector_norm"),
    (sample(aten.linalg_vector_norm.default, x()), "all dimensions"),
    (sample(aten.norm.ScalarOpt_dim, x(), 2, [1]), "norm"),
    (sample(aten.split.Tensor, x(("B", "N"), 4), 2), "folded"),
    (sample(aten.split_with_sizes.default, x(("B", "N"), 4), [3, 15]), "folded"),
    (sample(aten.unflatten.int, x(), 1, [2, 3]), "cuts"),
]
