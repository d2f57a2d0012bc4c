"""An oracle for tests: the original model, run eagerly, with dropped tokens masked out of every later attention.

Start at :func:`masked_run`. It knows nothing of graphs: it replaces torch's attention functions while the model runs, and the
path of the running module says which tokens its keys are, by the hand-written statements of ``model_case.py``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from model_case import Case
from torch import Tensor, nn

Kept = dict[str, list[Tensor]]


@dataclass
class Run:
    """What the masked original did.

    Attributes:
        outputs: leaves by dotted path.
        residual: values ``[B, N, C]`` at each site, by stream.
        tokens: last values ``[B, N, C]``, by stream.
    """

    outputs: dict[str, Tensor]
    residual: dict[str, list[Tensor]] = field(default_factory=dict)
    tokens: dict[str, Tensor] = field(default_factory=dict)


def leaves(output: Any, path: str = "") -> dict[str, Tensor]:
    """Tensors of an output structure by dotted path; a bare tensor has the path ""."""
    if isinstance(output, Tensor):
        return {path: output}
    found: dict[str, Tensor] = {}
    if not isinstance(output, (Mapping, list, tuple)):
        return found
    items = output.items() if isinstance(output, Mapping) else enumerate(output)
    for key, value in items:
        found |= leaves(value, f"{path}.{key}" if path else str(key))
    return found


def survivors(case: Case, forced: dict[str, list[Tensor]], inputs: dict[str, Tensor]) -> Kept:
    """Return what must survive at each site if ``forced [B, N]`` is: protected tokens too, and no token that was dropped."""
    protected, valid = case.protected(inputs), case.valid(inputs)
    kept: Kept = {}
    for stream, wanted in forced.items():
        now = torch.ones_like(protected[stream])
        kept[stream] = []
        for one in wanted:
            now = now & ((one & valid[stream]) | protected[stream])
            kept[stream].append(now)
    return kept


def masked_run(case: Case, model: nn.Module, inputs: dict[str, Tensor], kept: Kept) -> Run:
    """Run the original with all but the ``kept`` tokens masked out."""
    stack: list[str] = []
    run = Run({}, {s: [] for s in case.layers})
    handles = _watch(case, model, run, stack)
    try:
        with hidden_keys(lambda: _visible(case, stack, kept)):
            run.outputs = leaves(model(**inputs))
    finally:
        for handle in handles:
            handle.remove()
    return run


def expected(case: Case, model: nn.Module, inputs: dict[str, Tensor], kept: Kept) -> dict[str, Tensor]:
    """Return the outputs that the pruned model must have without merging: a dropped token has the last value it had."""
    run = masked_run(case, model, inputs, kept)
    tokens = {}
    for stream, last in run.tokens.items():
        tokens[stream] = last
        norm = case.norm[stream]
        for site in reversed(range(len(kept[stream]))):
            value = run.residual[stream][site]
            value = model.get_submodule(norm)(value) if norm else value
            tokens[stream] = torch.where(kept[stream][site][:, :, None], tokens[stream], value)
    outputs = dict(run.outputs)
    for leaf, stream in case.full.items():
        outputs[leaf] = tokens[stream]
    if case.repool is not None:
        outputs |= case.repool(model, inputs, tokens, {s: k[-1] for s, k in kept.items()})
    return outputs


def _visible(case: Case, stack: list[str], kept: Kept) -> Tensor | None:
    """Keys ``[B, K]`` that the attention of the running module may see."""
    for keys in case.keys:
        for path in stack:
            found = re.search(keys.pattern, path)
            if not found or keys.stream not in kept:
                continue
            before = int(found.group(1)) if found.groups() else len(kept[keys.stream])
            if before == 0:
                return None
            visible = kept[keys.stream][before - 1][:, keys.skip :]
            if bool(visible.all()):
                return None
            return visible if keys.part is None else visible.chunk(2)[keys.part]
    return None


@contextmanager
def hidden_keys(visible: Callable[[], Tensor | None]) -> Iterator[None]:
    """Replace torch's attention and softmax, inside the block, by functions that hide all but the ``visible`` keys."""
    sdpa, softmaxes = F.scaled_dot_product_attention, (F.softmax, torch.softmax, Tensor.softmax)
    fastpath = torch.backends.mha.get_fastpath_enabled()

    def hidden_sdpa(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        show = visible()
        if show is not None:
            names = ("dropout_p", "is_causal")
            kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
            bias = query.new_zeros(()) if attn_mask is None else attn_mask
            if bias.dtype == torch.bool:
                bias = query.new_zeros(bias.shape).masked_fill(~bias, float("-inf"))
            if kwargs.pop("is_causal", False):
                size = query.shape[-2], key.shape[-2]
                bias = bias + torch.full(size, float("-inf")).triu(1)
            shape = (len(show), 1, 1, show.shape[1]) if query.dim() == 4 else (len(show), 1, show.shape[1])
            attn_mask = bias + query.new_zeros(shape).masked_fill(~show.reshape(shape), float("-inf"))
            args = ()
        return sdpa(query, key, value, attn_mask, *args, **kwargs)

    def hidden_softmax(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def softmax(scores: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            show = visible()
            if show is not None:
                if scores.dim() == 3:
                    show = show.repeat_interleave(scores.shape[0] // show.shape[0], 0)
                scores = scores.masked_fill(~show.reshape(len(show), *(1,) * (scores.dim() - 2), -1), float("-inf"))
            return original(scores, *args, **kwargs)

        return softmax

    torch.backends.mha.set_fastpath_enabled(False)
    F.scaled_dot_product_attention = hidden_sdpa  # type: ignore[assignment]
    F.softmax, torch.softmax = hidden_softmax(softmaxes[0]), hidden_softmax(softmaxes[1])  # type: ignore[assignment]
    Tensor.softmax = hidden_softmax(softmaxes[2])  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = sdpa
        F.softmax, torch.softmax, Tensor.softmax = softmaxes  # type: ignore[assignment, method-assign]
        torch.backends.mha.set_fastpath_enabled(fastpath)


def _watch(case: Case, model: nn.Module, run: Run, stack: list[str]) -> list[Any]:
    """Keep the paths of the running modules in ``stack``, and record residual values and last tokens."""
    handles: list[Any] = []
    for path, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda m, i, p=path: stack.append(p)))
        handles.append(module.register_forward_hook(lambda m, i, o: _leave(stack)))
    for stream, count in case.layers.items():
        for layer in range(count):
            path, _, side = case.residual[stream].format(layer).partition(":")
            handles.append(_record(case, model, path, side, run.residual[stream].append))
        last = model.get_submodule(case.final[stream])
        handles.append(last.register_forward_hook(_once(run.tokens, stream, case)))
    return handles


def _leave(stack: list[str]) -> None:
    stack.pop()


def _once(tokens: dict[str, Tensor], stream: str, case: Case) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        tokens.setdefault(stream, _first(case, output))

    return hook


def _record(case: Case, model: nn.Module, path: str, side: str, note: Callable[[Tensor], None]) -> Any:
    module = model.get_submodule(path)
    if side == "input":
        return module.register_forward_pre_hook(lambda m, i: note(_first(case, i)))
    return module.register_forward_hook(lambda m, i, o: note(_first(case, o)))


def _first(case: Case, value: Any) -> Tensor:
    tensor = value if isinstance(value, Tensor) else next(iter(leaves(value).values()))
    return tensor.transpose(0, 1) if case.sequence_first and tensor.dim() == 3 else tensor
