"""Prompts for a model that generates, made of its example inputs, and what it writes behind them.

Start at :class:`Prompts`. Libraries agree on the method ``generate`` and on little else, so what it takes is tried out on the
dense model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from madtp.survey.outputs import tensor_error

NOT_PROMPTS = ("labels", "decoder_input_ids", "decoder_attention_mask")
PAD = 0


@dataclass(frozen=True)
class Writing:
    """What a model has written behind its prompts.

    Attributes:
        words: ``[B, T]``.
        logits: ``[B, T, V]``, from which they were chosen.
    """

    words: Tensor
    logits: Tensor

    @classmethod
    def of(cls, output: Any, tokens: int) -> Writing:
        """Read the last tokens of what ``generate`` returned."""
        return cls(output.sequences[:, -tokens:], torch.stack(output.logits, 1))

    @classmethod
    def joined(cls, parts: Sequence[Writing]) -> Writing:
        """Those of several batches."""
        return cls(torch.cat([one.words for one in parts]), torch.cat([one.logits for one in parts]))

    def equals(self, other: Writing) -> bool:
        """Whether the words are the same, bit for bit."""
        return torch.equal(self.words, other.words)

    def agrees(self, other: Writing, tolerance: float) -> bool:
        """Whether the words are the same, and the logits but for an error relative to the largest of them."""
        return self.equals(other) and tensor_error(self.logits, other.logits) <= tolerance


@dataclass(frozen=True)
class Prompts:
    """A batch of prompts.

    Attributes:
        inputs: what ``generate`` takes, besides :attr:`settings`.
        size: number of prompts.
        settings: greedy decoding of a fixed number of tokens, in the words that the model takes.
        tokens: how many new tokens it writes.
    """

    inputs: Mapping[str, Any]
    size: int
    settings: Mapping[str, Any]
    tokens: int

    @classmethod
    def of(cls, example: Mapping[str, Any], tokens: int) -> Prompts:
        """Make prompts of example inputs; padding moves to the left, where generation wants it.

        Args:
            example: arguments of the model's forward.
            tokens: number of new tokens.
        """
        inputs = _prompts_of(example)
        ids = inputs.get("input_ids")
        sizes = [len(x) for x in ([ids] if isinstance(ids, Tensor) else inputs.values()) if isinstance(x, Tensor)]
        settings = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": PAD}
        return cls(inputs, min(sizes, default=0), settings, tokens)

    def of_form(self, example: Mapping[str, Any]) -> Prompts:
        """As many prompts, with the same settings, made of inputs in another form."""
        return replace(self, inputs=_prompts_of(example))

    def alone(self, row: int) -> Prompts:
        """The prompt of one sample, without its padding. What holds the patches of all images in one row is split evenly."""
        ids, mask = self.inputs.get("input_ids"), self.inputs.get("attention_mask")
        start = 0
        if isinstance(ids, Tensor) and isinstance(mask, Tensor) and mask.shape == ids.shape:
            start = int((mask[row] != 0).int().argmax())
        inputs = {}
        for name, x in self.inputs.items():
            if isinstance(x, Tensor) and x.dim() and len(x) and len(x) % self.size == 0:
                along = isinstance(ids, Tensor) and x.shape[:2] == ids.shape
                x = x.unflatten(0, (self.size, -1))[row]
                x = x[:, start:] if along else x
            inputs[name] = x
        return replace(self, inputs=inputs, size=1)

    def longer(self, words: Tensor) -> Prompts:
        """The prompts that begin with all ``words [B, T]``, of which a part is there."""
        ids: Tensor = self.inputs["input_ids"]
        more = words.shape[1] - ids.shape[1]
        inputs = {name: _extended(x, more, along=ids) for name, x in self.inputs.items()}
        return replace(self, inputs={**inputs, "input_ids": words})

    def generated(self, model: nn.Module, **settings: object) -> Any:
        """What ``generate`` of a model returns, with the logits.

        Args:
            model: the dense or the pruned model.
            settings: of ``generate``, besides those of the prompts.
        """
        generate: Any = model.generate
        told = {"return_dict_in_generate": True, "output_logits": True}
        with torch.no_grad():
            return generate(**self.inputs, **{**self.settings, **told, **settings})

    def written(self, model: nn.Module, **settings: object) -> Writing:
        """What a model writes; the arguments are those of :meth:`generated`."""
        return Writing.of(self.generated(model, **settings), self.tokens)

    def that_it_takes(self, model: nn.Module) -> Prompts:
        """The prompts with the settings that ``generate`` of a dense model takes.

        Raises:
            Exception: it takes none; the last error of the model's own.
        """
        own: Any = getattr(model, "generation_config", None)
        encodes = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        if encodes and own is not None and own.decoder_start_token_id is None and own.bos_token_id is None:
            own.decoder_start_token_id = PAD
        found = self
        try:
            written = self.written(model)
        except TypeError:  # its own code sets some of them itself
            found = replace(self, settings={k: v for k, v in self.settings.items() if k != "pad_token_id"})
            written = found.written(model)
        return found._in_words(written.logits.shape[-1])

    def _in_words(self, vocabulary: int) -> Prompts:
        """With none but words of the prompts allowed: a model with random weights would write tokens of images."""
        ids = self.inputs.get("input_ids")
        if not isinstance(ids, Tensor):
            return self
        row = ids[0]
        usual = int(row.mode().values)
        words = set(row[int((row == usual).nonzero().max()) + 1 :].tolist()) or set(row.tolist())
        others = [token for token in range(vocabulary) if token not in words]
        return replace(self, settings={**self.settings, "suppress_tokens": others})


def _prompts_of(example: Mapping[str, Any]) -> dict[str, Any]:
    return _padded_on_the_left({name: x for name, x in example.items() if name not in NOT_PROMPTS})


def _padded_on_the_left(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs with what stands behind the words of a sample in front of them."""
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if not isinstance(ids, Tensor) or not isinstance(mask, Tensor) or mask.shape != ids.shape:
        return dict(inputs)
    behind = (mask.flip(1) != 0).int().argmax(1)
    places = (torch.arange(ids.shape[1]) - behind[:, None]) % ids.shape[1]
    moved = dict(inputs)
    for name, x in inputs.items():
        if isinstance(x, Tensor) and x.shape[:2] == ids.shape:
            rows = torch.arange(len(ids))[:, None]
            moved[name] = x[rows, places]
    return moved


def _extended(value: Any, more: int, *, along: Tensor) -> Any:
    """What runs along the prompts, with what it says of the last word for more words."""
    if not isinstance(value, Tensor) or value.shape[:2] != along.shape:
        return value
    return torch.cat([value, value[:, -1:].expand(-1, more, *value.shape[2:])], dim=1)
