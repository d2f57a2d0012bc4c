"""What a test case is: a small model and what an independent oracle must know about it.

Start at :class:`Case`; `case_models.py` lists the cases. The statements are written by hand, from reading each model's own
code: which attention reads which tokens, where residual values can be observed, which tokens are protected. Nothing
here asks the rewriter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

VOCABULARY = 99
END = 98
PATCH = 8
WIDTH = 16
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Keys:
    """Keys of the attention in modules whose path matches `pattern`: tokens of `stream`.

    The pattern's group is the layer; tokens dropped in earlier layers are gone. Without a group all layers of the stream
    lie before. `part` is the half of the stream's batch that is read; the first `skip` tokens are not.
    """

    pattern: str
    stream: str
    part: int | None = None
    skip: int = 0


@dataclass(frozen=True)
class Case:
    """One model.

    Attributes:
        inputs: keyword arguments for a batch size and a text length; rows end in different amounts of padding.
        keys: of all attention modules. layers: self-attention layers by stream.
        residual: path of the module whose input or output ("path:input") is the residual value at the site of a layer.
        final: path of the module whose output is the stream's last token values; `norm` of it maps the residual to them.
        protected: positions [B, N] that must survive, by stream.
        full: output leaves that hold a token for each position, and their stream.
        repool: computes leaves anew that pool tokens, from all tokens and the final survivors.
        alone: leaves that couple samples by design (a similarity matrix); they are compared on the diagonal.
        exact: attention keeps its spelling, so equality is bit for bit. sequence_first: tokens are [N, B, C] inside.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int, int], dict[str, Tensor]]
    keys: tuple[Keys, ...]
    layers: dict[str, int]
    residual: dict[str, str]
    final: dict[str, str]
    norm: dict[str, str | None]
    protected: Callable[[dict[str, Tensor]], dict[str, Tensor]]
    full: dict[str, str] = field(default_factory=dict)
    repool: Callable[[nn.Module, Tensors, Tensors, Tensors], Tensors] | None = None
    alone: tuple[str, ...] = ()
    exact: bool = True
    sequence_first: bool = False

    @property
    def text(self) -> bool:
        """Whether the model reads text."""
        return "text" in self.layers

    def valid(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Which tokens are not padding [B, N], by stream."""
        found = {}
        for stream, where in self.protected(inputs).items():
            mask = text_mask(inputs) if stream == "text" else None
            found[stream] = torch.ones_like(where) if mask is None else mask
        return found


def text_mask(inputs: dict[str, Tensor]) -> Tensor | None:
    """True at text tokens [B, T]."""
    return inputs["attention_mask"].bool() if "attention_mask" in inputs else None


def text(batch: int, length: int) -> dict[str, Tensor]:
    """Ids and mask [B, T]: row i ends in i % 3 padding tokens; END closes each text."""
    lengths = torch.tensor([max(3, length - i % 3) for i in range(batch)])
    mask = torch.arange(length) < lengths[:, None]
    ids = torch.randint(4, END, (batch, length))
    ids[torch.arange(batch), lengths - 1] = END
    return {"input_ids": ids.masked_fill(~mask, 0), "attention_mask": mask.long()}


def marks(batch: int, length: int, *positions: int) -> Tensor:
    """[B, N] bool, True at the given positions."""
    found = torch.zeros(batch, length, dtype=torch.bool)
    for position in positions:
        found[:, position] = True
    return found


def lively(model: nn.Module, seed: int = 7) -> nn.Module:
    """The model with weights so large that every token matters to the outputs, in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                fan = parameter[0].numel() if "embed" not in name and "token" not in name else 1
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * (1.5 / fan**0.5))
            elif parameter.dim() == 1 and "norm" not in name.lower():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()
