"""Sets of operations, by the name that :func:`~rewriters.graph.nodes.op_name` gives them.

Each set states one property, exactly. A rule that needs another property says so where it derives its own set from these
(``VIEWS | {"expand"}``).
"""

from __future__ import annotations

# Another type (or device) for the same values.
CASTS = frozenset("to _to_copy type_as float".split())
# The same values in memory of their own or in the memory of the operand.
COPIES = frozenset("clone contiguous alias".split())
# The result equals the first operand, up to its type, and gradients pass to the operand. These may be left out or moved.
SAME_VALUES = CASTS | COPIES
# The result equals the first operand, up to its type, but gradients may stop. Rules that replace a computation must not leave
# ``detach`` out; rules that only find out where a value comes from may.
KEEPS_VALUES = SAME_VALUES | {"detach"}

# The same entries in the same order in another shape. The first three take the new sizes as their second argument.
SIZED_VIEWS = frozenset("view reshape _unsafe_view".split())
RESHAPES = SIZED_VIEWS | frozenset("flatten unflatten view_as reshape_as".split())
# Reshapes, and those that add or drop dimensions of size 1.
VIEWS = RESHAPES | frozenset("unsqueeze squeeze".split())
# The same entries with dimensions in another order.
PERMUTATIONS = frozenset("permute transpose".split())
# Lists of tensors that are cut from the operand along one dimension: in pieces, or in entries without that dimension.
SPLITS = frozenset("split split_with_sizes chunk".split())
PARTS = SPLITS | {"unbind"}
CONCATENATIONS = frozenset("cat concat".split())

# Each entry of the result depends on the entries at the same (broadcast) place of the operands only.
ELEMENTWISE = frozenset(
    """
abs add addcmul alias angle atan2 bitwise_and bitwise_not bitwise_or bitwise_xor ceil celu clamp clamp_max clamp_min
clip clone complex contiguous copysign cos detach div dropout elu eq erf exp expm1 fill floor floor_divide fmod
full_like ge gelu gt hardsigmoid hardswish hardtanh isinf isnan le leaky_relu lerp log log1p log2 logical_and
logical_not logical_or logical_xor logit lt masked_fill maximum minimum mish mod mul nan_to_num ne neg ones_like polar
pow reciprocal relu relu6 remainder round rsqrt rsub selu sigmoid sign silu sin softplus special_logit sqrt square sub
tan tanh true_divide where xlogy zeros_like __and__ __or__ __xor__
""".split()
)
# Tensors of one number, or of none: of an operand they read type, device and shape.
MAKERS = frozenset(
    "empty zeros ones full new_empty new_zeros new_ones new_full empty_like zeros_like ones_like".split()
)
# Draw each entry by itself; of the operand they read the shape, or the probability at the same place.
DRAWS = frozenset(
    "bernoulli bernoulli_ uniform normal normal_ exponential random rand_like randn_like randint_like empty_like".split()
)
# Each entry by itself, times or divided by something, or dropped.
SCALINGS = frozenset("mul div dropout".split())
# Sums of two values, each of them scaled or not; ``graph/residual.py`` tells which arguments these are.
ADDS = frozenset("add lerp addcmul".split())
NORMS = frozenset("layer_norm rms_norm".split())
# Norms as torch spells them before they are canonical, too.
NATIVE_NORMS = NORMS | frozenset("native_layer_norm _fused_rms_norm".split())
# What may stand between two values of one residual stream; the token axis may change its place.
RESIDUAL_STEPS = KEEPS_VALUES | SCALINGS | PERMUTATIONS

# Products of matrices or of batches of them.
PRODUCTS = frozenset("matmul bmm baddbmm".split())
SOFTMAXES = frozenset("softmax _softmax _safe_softmax".split())
# Attention as one node, and the product with the values of an attention map that keeps its spelling.
ATTENTION = frozenset("attention weigh".split())
# Steps of attention maps that keep their spelling (``madtp/tokens/attention_maps.py``).
MAP_STEPS = frozenset("shares total weigh".split())
CONVOLUTIONS = frozenset("conv1d conv2d conv3d".split())
PADS = frozenset("pad constant_pad_nd".split())
# Reductions that take the order of the norm before the dimensions.
VECTOR_NORMS = frozenset("linalg_vector_norm norm".split())
# Operations that put a number where a mask says so.
FILLS = frozenset("masked_fill where".split())
