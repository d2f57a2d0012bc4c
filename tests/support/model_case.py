"""What a test case is: a small model and what an independent oracle must know about it.

Start at :class:`Case`; ``case_models.py`` lists the cases. The statements are written by hand, from reading each model's own
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
# The first block of a tower sees all tokens, the second what the first one keeps.
DEPTH = 2
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Keys:
    """Which tokens the attention of some modules reads as keys.

    Attributes:
        pattern: regular expression for the paths of the modules. Its group is the layer: tokens dropped in earlier layers are
            gone. Without a group, all layers of the stream lie before.
        stream: whose tokens are read.
        part: which half of the stream's batch is read; None for all of it.
        skip: how many of the first tokens are not read.
    """

    pattern: str
    stream: str
    part: int | None = None
    skip: int = 0


@dataclass(frozen=True)
class Case:
    """One model, and what is known about it.

    Attributes:
        name: of the case.
        build: makes the model.
        inputs: keyword arguments for a batch size and a text length; rows end in different amounts of padding.
        keys: of all attention modules.
        layers: number of self-attention layers by stream.
        residual: by stream, path of the module whose input (``"path:input"``) or output (``"path:output"``) is the residual
            stream at the site of a layer.
        final: by stream, path of the module whose output is the last token values.
        norm: by stream, path of the norm that maps the residual stream to these values, or None.
        protected: positions ``[B, N]`` that must survive, by stream.
        full: output leaves that hold a token for each position, with their stream.
        repool: recomputes leaves that pool tokens, from all tokens and the final survivors.
        coupled: leaves that couple the samples of a batch by design (a similarity matrix); they are compared on the diagonal.
        exact: whether attention keeps its spelling, so that equality is bit for bit.
        sequence_first: whether tokens are ``[N, B, C]`` inside.
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
    coupled: tuple[str, ...] = ()
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
    """``[B, T]``, True at text tokens; None if the inputs have no mask."""
    return inputs["attention_mask"].bool() if "attention_mask" in inputs else None


def text(batch: int, length: int) -> dict[str, Tensor]:
    """Ids and mask ``[B, T]``: row i ends in i % 3 padding tokens; END closes each text."""
    lengths = torch.tensor([max(3, length - i % 3) for i in range(batch)])
    mask = torch.arange(length) < lengths[:, None]
    ids = torch.randint(4, END, (batch, length))
    ids[torch.arange(batch), lengths - 1] = END
    return {"input_ids": ids.masked_fill(~mask, 0), "attention_mask": mask.long()}


def positions_mask(batch: int, length: int, *positions: int) -> Tensor:
    """``[B, N]`` bool, True at the given positions."""
    mask = torch.zeros(batch, length, dtype=torch.bool)
    for position in positions:
        mask[:, position] = True
    return mask


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
