"""Calls of every operation in the rule table, as data. Start at :data:`SAMPLES``; ``rule_harness.py` says what is checked.

Each rule comes in threes: a call where it fires, a commuted or unusual form where it fires too, and, in :data:`REFUSED`, a near
miss that must be refused.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from rule_harness import BATCH, TOKENS, Operand, Sample, sample

from madtp.tokens.attention import attention
from madtp.tokens.attention_maps import shares, total, weigh
from madtp.tokens.state import masked_mean

aten = torch.ops.aten
FAR = 9223372036854775807


def x(*dims: Any, kind: str = "float") -> Operand:
    """An operand; without sizes a stream [B, N, 4]."""
    return Operand(dims or ("B", "N", 4), kind)


def _unary() -> list[Sample]:
    names = """abs alias ceil celu clone contiguous cos detach elu erf exp expm1 floor gelu hardsigmoid hardswish hardtanh isinf
    isnan leaky_relu log log1p log2 logical_not mish nan_to_num neg ones_like reciprocal relu relu6 round rsqrt selu
    sigmoid sign silu sin softplus sqrt square tan tanh zeros_like"""
    flat = "ceil floor isinf isnan logical_not ones_like round sign zeros_like relu6 hardtanh".split()
    found = []
    for name in names.split():
        target = getattr(aten, name).default
        found.append(sample(target, x(), constant=name in flat))
        found.append(sample(target, x(4, "N", 1, "B"), constant=name in flat))
    return found


def _binary() -> list[Sample]:
    found = []
    for name in (
        "add atan2 copysign div floor_divide fmod lerp maximum minimum mul pow remainder sub true_divide xlogy".split()
    ):
        packet = getattr(aten, name)
        overload = {"pow": "Tensor_Tensor", "lerp": "Tensor"}.get(
            name, "Tensor" if "Tensor" in packet.overloads() else "default"
        )
        target = getattr(packet, overload)
        more = (x(4),) if name == "lerp" else ()
        flat = name in ("floor_divide", "copysign")
        found += [
            sample(target, x(), x(*dims), *more, constant=flat or name in ("maximum", "minimum", "fmod", "remainder"))
            for dims in SIDES
        ]
        found.append(sample(target, x(BATCH, TOKENS, 1), x(), *more, constant=True))
    for name in "eq ge gt le lt ne".split():
        target = getattr(aten, name).Tensor
        found += [sample(target, x(), x(*dims)) for dims in SIDES]
    for name in "bitwise_and bitwise_or bitwise_xor logical_and logical_or logical_xor __and__ __or__ __xor__".split():
        packet = getattr(aten, name)
        target = packet.Tensor if "Tensor" in packet.overloads() else packet.default
        found += [sample(target, x("B", "N", 4, kind="bool"), x(*dims, kind="bool")) for dims in SIDES]
    return found


# Second operands that broadcast against [B, N, 4]: along the tokens, along channels, full, one per sample.
SIDES: tuple[tuple[Any, ...], ...] = (
    ("B", "N", 4),
    (4,),
    (TOKENS, 1),
    (1, TOKENS, 4),
    (BATCH, TOKENS, 1),
    (BATCH, 1, 4),
    ("B", "N", 1),
)

ELEMENTWISE = [
    *_unary(),
    *_binary(),
    sample(aten.bitwise_not.default, x("B", "N", 4, kind="bool")),
    sample(aten.add.Scalar, x(), 2.0),
    sample(aten.addcmul.default, x(), x(TOKENS, 4), x("B", "N", 1)),
    sample(aten.clamp.default, x(), 0.0, 2.0),
    sample(aten.clamp_max.default, x(), 2.0),
    sample(aten.clamp_min.default, x(), 0.0),
    sample(aten.logit.default, x(), 0.01),
    sample(aten.logit.default, x(4, "N", 1, "B"), 0.01),
    sample(aten.special_logit.default, x(), 0.01),
    sample(aten.special_logit.default, x(4, "N", 1, "B"), 0.01),
    sample(aten.clip.default, x(), 0.0, 2.0),
    sample(aten.dropout.default, x(), 0.5, False),
    sample(aten.full_like.default, x(), 2.0, constant=True),
    sample(aten.masked_fill.Scalar, x(), x(BATCH, TOKENS, 1, kind="bool"), 0.0, constant=True),
    sample(aten.masked_fill.Scalar, x("B", "N", kind="bool"), x(TOKENS, kind="bool"), False),
    sample(aten.mul.Scalar, x(), 2.0),
    sample(aten.prelu.default, x(), x(1)),
    sample(aten.prelu.default, x("B", 4, "N"), x(4)),
    sample(aten.rsub.Scalar, x(), 1.0),
    sample(aten.rsub.Tensor, x(), x(TOKENS, 4)),
    sample(aten.to.dtype, x(), torch.float64),
    sample(aten.to.other, x(), x(2, 2)),
    sample(aten._to_copy.default, x(), dtype=torch.float64),
    sample(aten.type_as.default, x(), x(2, 7)),
    sample(aten.type_as.default, x("B", "N"), x()),
    sample(aten.where.self, x(BATCH, TOKENS, 1, kind="bool"), x(), x(4), constant=True),
    sample(aten.where.self, x("B", "N", 1, kind="bool"), x(4), x(TOKENS, 4)),
]

SHAPES = [
    sample(aten.view_as_complex.default, x("B", "N", 3, 2)),
    sample(aten.view_as_complex.default, x("B", 2, "N", 3, 2)),
    sample(aten.view_as_real.default, x("B", "N", 3, kind="complex")),
    sample(aten.mul.Tensor, x("B", 2, "N", 3, kind="complex"), x(TOKENS, 3, kind="complex")),
    sample(aten.complex.default, x("B", "N"), x(TOKENS)),
    sample(aten.polar.default, x("B", "N", 3), x(TOKENS, 3)),
    sample(aten.angle.default, x("B", "N", 3, kind="complex")),
    sample(aten.new_zeros.default, x(), [1, TOKENS, TOKENS]),
    sample(aten.new_ones.default, x("B", "N"), [BATCH, TOKENS]),
    sample(aten.new_full.default, x("N", "B", 4), [4], 2.0),
    sample(aten.transpose.int, x(), 1, 2),
    sample(aten.transpose.int, x(), -3, 1),
    sample(aten.t.default, x("B", "N")),
    sample(aten.mT.default, x()),
    sample(aten.permute.default, x("B", "N", 2, 3), [2, 0, -1, 1]),
    sample(aten.unsqueeze.default, x(), 1),
    sample(aten.unsqueeze.default, x(), -1),
    sample(aten.squeeze.dim, x("B", 1, "N", 4), 1),
    sample(aten.squeeze.dims, x(1, "B", "N", 1), [0, -1]),
    sample(aten.squeeze.default, x("B", 1, "N", 4)),
    sample(aten.view.default, x("B", "N", 6), [BATCH, TOKENS, 2, 3]),
    sample(aten.view.default, x("B", "N", 6), [-1, TOKENS, 2, 3]),
    sample(aten.view.default, x("B", "N", 4), [BATCH * TOKENS, 4]),
    sample(aten.view.default, x("B", "N", 4), [BATCH, TOKENS * 2, 2]),
    sample(aten.reshape.default, x(("B", "N"), 4), [BATCH, TOKENS, 4]),
    sample(aten.reshape.default, x("B", 2, "N", 4), [BATCH * 2, TOKENS, 4]),
    sample(aten.reshape.default, x(("B", 2), "N", 4), [BATCH, 2, -1, 4]),
    sample(aten.reshape.default, x(("N", "B"), 4), [TOKENS, BATCH, 2, 2]),
    sample(aten.reshape_as.default, x(("B", "N"), 4), x("B", "N", 2, 2)),
    sample(aten.view_as.default, x("N", "B", 6), x("N", "B", 2, 3)),
    sample(aten._unsafe_view.default, x("B", "N", 6), [BATCH, TOKENS, 3, 2]),
    sample(aten.flatten.using_ints, x("B", 2, "N", 4), 0, 1),
    sample(aten.flatten.using_ints, x("B", "N", 2, 4), 2),
    sample(aten.flatten.using_ints, x(), 0, 1),
    sample(aten.unflatten.int, x("B", "N", 6), -1, [2, 3]),
    sample(aten.unflatten.int, x(("B", "N"), 4), 0, [BATCH, TOKENS]),
    sample(aten.expand.default, x("B", "N", 1), [BATCH, TOKENS, 4]),
    sample(aten.expand.default, x("B", "N", 1), [2, -1, TOKENS, 4]),
    sample(aten.expand_as.default, x("B", "N", 1), x("B", "N", 4)),
    sample(aten.expand_as.default, x("B", "N", 1), x(BATCH, TOKENS, 4)),
    sample(aten.expand_as.default, x(4), x(), constant=True),
    sample(aten.repeat_interleave.self_int, x(), 2, 2),
    sample(aten.repeat.default, x(), [1, 1, 3]),
    sample(aten.repeat.default, x(), [2, 1, 1, 1]),
    sample(aten.cat.default, [x(), x("B", "N", 2)], -1),
    sample(aten.cat.default, [x(BATCH, TOKENS, 3), x()], 2),
    sample(aten.concat.default, [x(), x(BATCH, TOKENS, 2)], -1),
    sample(aten.cat.default, [x(0), x("B", 2, "N", 4)], -2),
    sample(aten.stack.default, [x(), x()], 0),
    sample(aten.stack.default, [x(), x(BATCH, TOKENS, 4)], -1),
    sample(aten.select.int, x(), 2, 1),
    sample(aten.slice.Tensor, x(), 2, 1, 3),
    sample(aten.slice.Tensor, x(), 1, 0, FAR),
    sample(aten.slice.Tensor, x(), 0, 0, FAR),
    sample(aten.chunk.default, x(), 2, -1),
    sample(aten.split.Tensor, x(), 2, 2),
    sample(aten.split_with_sizes.default, x(), [1, 3], 2),
    sample(aten.unbind.int, x(3, "B", "N", 4)),
    sample(aten.unbind.int, x("B", "N", 2), -1),
]

MIXING = [
    sample(aten.linear.default, x(), x(3, 4), x(3)),
    sample(aten.linear.default, x("B", 2, "N", 4), x(3, 4)),
    sample(aten.addmm.default, x(3), x(("B", "N"), 4), x(4, 3)),
    sample(aten.addmm.default, x(1, 3), x(("N", "B"), 4), x(4, 3), beta=0.5, alpha=2.0),
    sample(aten.mm.default, x(("B", "N"), 4), x(4, 3)),
    sample(aten.topk.default, x(), 2),
    sample(aten.topk.default, x("B", 5, "N"), 2, 1),
    sample(aten.one_hot.default, x("B", "N", kind="long"), 16),
    sample(aten.one_hot.default, x("N", "B", 2, kind="long"), 9),
    sample(aten.scatter.value, x("B", "N", 8), 2, x("B", "N", 2, kind="long"), 1.5),
    sample(aten.scatter.src, x(8, "N", "B"), 0, x(1, "N", "B", kind="long"), x(2, "N", "B")),
    sample(aten.repeat.default, x(("B", "N"), 4), [3, 1]),
    sample(aten.mm.default, x(3, 4), x(4, ("B", "N"))),
    sample(aten.matmul.default, x(), x(4, 3)),
    sample(aten.matmul.default, x("B", 2, "N", 4), x(BATCH, 2, 4, TOKENS)),
    sample(aten.matmul.default, x(3, 4), x("B", 4, "N")),
    sample(aten.bmm.default, x(), x("B", 4, 6)),
    sample(aten.bmm.default, x(("B", 2), "N", 4), x((BATCH * 2), 4, 3)),
    sample(aten.layer_norm.default, x(), [4], x(4), x(4)),
    sample(aten.layer_norm.default, x("N", "B", 2, 4), [2, 4]),
    sample(aten.rms_norm.default, x(), [4], x(4)),
    sample(aten.softmax.int, x(), -1),
    sample(aten.softmax.int, x("B", 3, "N"), 1),
    sample(aten.log_softmax.int, x(), 2),
    sample(aten.cumsum.default, x(), 2),
    sample(aten.mean.dim, x(), [-1], True),
    sample(aten.mean.dim, x(), [2]),
    sample(aten.sum.dim_IntList, x(), [-1]),
    sample(aten.sum.dim_IntList, x("B", 2, "N", 4), [1, 3]),
    sample(aten.amax.default, x(), [2], constant=True),
    sample(aten.amin.default, x(), [2], constant=True),
    sample(aten.var.correction, x(), [2]),
    sample(aten.any.dim, x("B", "N", 4, kind="bool"), -1),
    sample(aten.all.dim, x("B", "N", 4, kind="bool"), -1),
    sample(aten.linalg_vector_norm.default, x(), 2, [-1], True),
    sample(aten.norm.ScalarOpt_dim, x(), 2, [-1]),
    sample(aten.embedding.default, x(9, 4), x("B", "N", kind="long")),
    sample(attention, x("B", 2, "N", 4), x("B", 2, TOKENS, 4), x("B", 2, TOKENS, 4)),
    sample(attention, x("B", 2, "N", 4), x(BATCH, 2, 6, 4), x(BATCH, 2, 6, 3), x(BATCH, 1, 1, 6, kind="mask")),
    sample(attention, x("B", 2, "N", 4), x(BATCH, 2, 5, 4), x(BATCH, 2, 5, 3), x("B", 2, "N", 5)),
]

CHANNELS = [
    sample(aten.einsum.default, "bnc,cd->bnd", [x(), x(4, 3)]),
    sample(aten.einsum.default, "dc, bnc -> nbd", [x(3, 4), x()]),
    sample(aten.einsum.default, "bnc,bnc->bn", [x(), x()]),
    sample(aten.einsum.default, "bnc,bkc->bnk", [x(), x(BATCH, 5, 4)]),
    sample(aten.conv1d.default, x("B", 4, "N"), x(5, 4, 1), x(5)),
    sample(aten.conv1d.default, x("B", 4, "N"), x(4, 2, 1), None, [1], [0], [1], 2),
    sample(aten.conv2d.default, x("B", 4, "N", 3), x(5, 4, 1, 1), x(5)),
    sample(aten.conv2d.default, x("B", 4, 2, "N"), x(4, 2, 1, 1), None, [1, 1], [0, 0], [1, 1], 2),
    sample(shares, x("B", 2, "N", 5)),
    sample(shares, x("B", 2, "N", 5), torch.float64),
    sample(total, x("B", 2, "N", 5)),
    sample(total, x("B", "N", 5), True),
    sample(weigh, x("B", 2, "N", 5), x(BATCH, 2, 5, 3)),
    sample(weigh, x(BATCH, 2, 3, 5), x("B", 2, 5, "N")),
    sample(aten.batch_norm.default, x("B", 4, "N"), x(4), x(4), x(4), x(4), False, 0.1, 1e-5, False),
    sample(aten.batch_norm.default, x("B", 4, "N"), None, None, x(4), x(4), False, 0.1, 1e-5, False),
    sample(aten.view_as_complex.default, x("B", "N", 3, 2)),
    sample(aten.view_as_real.default, x("B", "N", 3, kind="complex")),
    sample(aten.index_select.default, x(), 2, x(2, kind="long")),
    sample(aten.index_select.default, x("N", "B", 4), -1, x(3, kind="long")),
    sample(aten.gather.default, x("B", "N", 5), 2, x("B", "N", 2, kind="long")),
    sample(aten.gather.default, x(), 2, x(BATCH, TOKENS, 2, kind="long")),
    sample(aten.gather.default, x(("B", 2), "N", 5), -1, x(2 * BATCH, TOKENS, 3, kind="long")),
    sample(aten.add.Tensor, x(("B", 2), "N", 4), x(2 * BATCH, TOKENS, 4)),
    sample(aten.mul.Tensor, x(TOKENS, 1), x(("B", 2), "N", 4)),
]

READOUTS = [
    sample(aten.split.Tensor, x(), 2, 1),
    sample(aten.split_with_sizes.default, x("N", "B", 4), [1, 3, 2]),
    sample(aten.chunk.default, x("N", "B", 4), 1, 0),
    sample(aten.select.int, x(), 1, 0),
    sample(aten.select.int, x(), 1, -1),
    sample(aten.select.int, x("N", "B", 4), 0, 0),
    sample(aten.slice.Tensor, x(), 1, 0, 2),
    sample(aten.slice.Tensor, x(), 1, 1, FAR),
    sample(aten.slice.Tensor, x("N", "B", 4), 0, 2, TOKENS),
    sample(aten.slice.Tensor, x(), 1, 1, 4),
    sample(aten.slice.Tensor, x(), 1, -1, FAR),
    sample(aten.slice.Tensor, x("N", "B", 4), 0, 0, -1),
    sample(aten.cat.default, [x(), x(BATCH, 2, 4)], 1),
    sample(aten.cat.default, [x(1, "B", 4), x("N", "B", 4)], 0),
    sample(aten.cat.default, [x(), x()], 1),
    sample(aten.mean.dim, x(), [1]),
    sample(aten.mean.dim, x("N", "B", 4), [0], True),
    sample(aten.amax.default, x(), [1]),
    sample(masked_mean, x(), x(BATCH, TOKENS, 1), 1, False, None),
    sample(masked_mean, x(), x(1, TOKENS, 1), 1, True, 1.0),
    sample(aten.index.Tensor, x(), [x(BATCH, kind="arange"), x(BATCH, kind="kept")]),
    sample(aten.sym_size.int, x(), 1),
    sample(aten.sym_size.int, x(), 0),
    sample(aten.split.Tensor, x(), 2),
    sample(aten.split_with_sizes.default, x(), [1, 2]),
    sample(aten.chunk.default, x(), 3),
    sample(aten.slice.Tensor, x(), 0, 1, 3),
    sample(aten.repeat_interleave.self_int, x(), 2, 0),
]

SAMPLES = [*ELEMENTWISE, *SHAPES, *MIXING, *CHANNELS, *READOUTS]

# Near misses: what a rule must not let pass, and a word of the reason.
REFUSED: list[tuple[Sample, str]] = [
    (sample(aten.polar.default, x("B", "N"), x("B", "M")), "nothing to do with each other"),
    (sample(aten.prelu.default, x(), x(TOKENS)), "mixes"),
    (sample(aten.add.Tensor, x(), x("B", "M", 4)), "nothing to do with each other"),
    (sample(aten.view.default, x("B", "N", 4), [BATCH, 2, TOKENS // 2, 4]), "cuts"),
    (sample(aten.view.default, x("B", "N", 4), [TOKENS, BATCH, 4]), "cut"),
    (sample(aten.reshape.default, x("N", "B", 4), [BATCH, TOKENS, 4]), "cut"),
    (sample(aten.reshape_as.default, x("B", "N", 6), x("B", TOKENS, 2, 3)), "other tokens"),
    (sample(aten.view_as.default, x("B", "N", 4), x("B", "M", 4)), "other tokens"),
    (sample(aten.repeat.default, x(), [1, 2, 1]), "repeat"),
    (sample(aten.topk.default, x(), 2, 1), "mixes"),
    (sample(aten.scatter.value, x("B", "N", 8), 2, x(BATCH, TOKENS, 2, kind="long"), 1.5), "other tokens"),
    (sample(aten.scatter.value, x(), 1, x("B", "N", 4, kind="long"), 1.5), "mixes"),
    (sample(aten.repeat_interleave.self_int, x(), 2, 1), "repeat"),
    (sample(aten.repeat_interleave.self_int, x(), 2), "repeat"),
    (sample(aten.expand_as.default, x(), x("B", "M", 4)), "nothing to do with each other"),
    (sample(aten.cat.default, [x(), x(BATCH, TOKENS, 4)], 0), "cat"),
    (sample(aten.cat.default, [x("B", "N", "M"), x("B", 3, "M")], 1), "batches do not agree"),
    (sample(aten.cat.default, [x("B", "N", 6), x("B", 1, "M")], 1), "batches do not agree"),
    (sample(aten.slice.Tensor, x(), 1, 0, FAR, 2), "slice"),
    (sample(aten.unbind.int, x(), 1), "unbind"),
    (sample(aten.unbind.int, x("N", "B", 4)), "unbind"),
    (sample(aten.einsum.default, "bnc,bnd->bcd", [x(), x("B", "N", 3)]), "mixes"),
    (sample(aten.einsum.default, "bnc,nc->bn", [x(), x(TOKENS, 4)]), "one operand"),
    (sample(aten.einsum.default, "...c,cd->...d", [x(), x(4, 3)]), "form"),
    (sample(aten.conv1d.default, x("B", 4, "N"), x(5, 4, 3), None, [1], [1]), "every position"),
    (sample(aten.conv1d.default, x("B", "N", 4), x(5, TOKENS, 1)), "mixes"),
    (
        sample(
            aten.batch_norm.default, x("B", "N", 4), x(TOKENS), x(TOKENS), x(TOKENS), x(TOKENS), False, 0.1, 1e-5, False
        ),
        "mixes",
    ),
    (sample(aten.batch_norm.default, x("B", 4, "N"), x(4), x(4), x(4), x(4), True, 0.1, 1e-5, False), "training"),
    (sample(aten.index_select.default, x(), 1, x(2, kind="long")), "index_select"),
    (sample(aten.gather.default, x(), 1, x(BATCH, 2, 4, kind="long")), "one token a sample"),
    (sample(aten.gather.default, x(), 2, x("B", "M", 2, kind="long")), "other tokens"),
    (sample(aten.gather.default, x("B", "N", 5), 2, x(BATCH, TOKENS - 1, 2, kind="long")), "other tokens"),
    (sample(aten.add.Tensor, x((2, "B"), "N", 4), x(2 * BATCH, TOKENS, 4)), "folded"),
    (sample(aten.masked_scatter.default, x(), x(BATCH, TOKENS, 4, kind="bool"), x(BATCH, TOKENS, 4)), "every position"),
    (sample(aten.linear.default, x("B", 4, "N"), x(3, TOKENS)), "mixes"),
    (sample(aten.linear.default, x(2, 4), x("N", 4)), "parameter"),
    (sample(aten.addmm.default, x(3), x(4, ("B", "N")), x(BATCH * TOKENS, 3)), "mixes"),
    (sample(aten.addmm.default, x(BATCH * TOKENS, 3), x(("B", "N"), 4), x(4, 3)), "by its place"),
    (sample(aten.addmm.default, x(BATCH * TOKENS), x(2, 4), x(4, ("B", "N"))), "parameter"),
    (sample(aten.mm.default, x(3, ("B", "N")), x(BATCH * TOKENS, 4)), "mixes"),
    (sample(aten.matmul.default, x("B", 4, "N"), x(TOKENS, 3)), "mixes"),
    (sample(aten.bmm.default, x("B", 4, "N"), x()), "mixes"),
    (sample(aten.layer_norm.default, x(), [TOKENS, 4]), "mixes"),
    (sample(aten.layer_norm.default, x("B", 4, "N"), [TOKENS]), "mixes"),
    (sample(aten.softmax.int, x(), 1), "mixes"),
    (sample(aten.cumsum.default, x(), 1), "mixes"),
    (sample(aten.sum.dim_IntList, x(), [1]), "sum"),
    (sample(aten.mean.dim, x(), [1, 2]), "mean"),
    (sample(aten.mean.default, x()), "all dimensions"),
    (sample(aten.var.correction, x(), [1]), "var"),
    (sample(aten.index.Tensor, x(), [x(2, kind="long")]), "index"),
    (sample(aten.index.Tensor, x(), [x(BATCH, kind="long"), x(BATCH, kind="long")]), "index"),
    (sample(aten.embedding.default, x("N", 4), x(2, kind="long")), "parameter"),
    (sample(attention, x("B", 2, 6, 4), x("B", 2, "N", 4), x(BATCH, 2, TOKENS, 4)), "keys and values"),
    (sample(attention, x("B", 2, "N", 4), x("B", 2, "N", 4), x("B", 2, "N", 4), x("B", 1, "M", TOKENS)), "mask"),
    (sample(attention, x(BATCH, 2, 6, 4), x("B", 2, "N", 4), x("B", 2, "N", 4), x("B", 1, "N", TOKENS)), "mask"),
    (sample(attention, x("B", "N", 2, 4), x("B", "N", 2, 4), x("B", "N", 2, 4)), "mixes"),
    (sample(masked_mean, x(), x("B", "N", 1), 1, False, None), "parameter"),
    (sample(aten.conv2d.default, x("B", 4, "N", 3), x(5, 4, 1, 3)), "every position"),
    (sample(aten.conv2d.default, x("B", 4, "N", 3), x(5, 4, 1, 1), None, [1, 2]), "every position"),
    (sample(aten.conv2d.default, x("B", 4, "N", 3), x(5, 4, 1, 1), None, [1, 1], [0, 1]), "pads"),
    (sample(aten.conv2d.default, x("B", "N", 4, 3), x(5, TOKENS, 1, 1)), "mixes"),
    (sample(shares, x(2, "B", "N")), "first dimension"),
    (sample(shares, x(2, ("B", "N"))), "folded"),
    (sample(total, x(2, "B", "N")), "first dimension"),
    (sample(weigh, x("B", 2, 3, "N"), x(BATCH, 2, TOKENS, 4)), "different tokens"),
    (sample(weigh, x("B", 2, 3, "N"), x("B", 2, "M", 4)), "different tokens"),
    (sample(weigh, x("B", "N", 3, 5), x(BATCH, TOKENS, 5, 4)), "mixes"),
    (sample(masked_mean, x(), x(BATCH, TOKENS, 1), 2, False, None), "mean"),
    (sample(aten.flip.default, x(), [1]), "no rule"),
    (sample(aten.roll.default, x(), [1], [1]), "every position"),
    (sample(aten.sort.default, x(), 1), "no rule"),
]

GETITEM = operator.getitem
