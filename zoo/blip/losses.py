"""Losses of the text decoders. Start with :func:`next_token_losses`.

Axes: B texts, T tokens of a text, W words of the vocabulary, A answers, L tokens of an answer.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

IGNORED = -100
SMOOTHING = 0.1


def next_token_losses(
    logits: Tensor, input_ids: Tensor, attention_mask: Tensor, *, prompt: int = 0, smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy of each token given those before it.

    Args:
        logits: ``[B, T, W]`` of the token after each.
        input_ids: ``[B, T]``.
        attention_mask: ``[B, T]``, 1 for a token, 0 for padding.
        prompt: Number of tokens at the start that are given, not predicted.
        smoothing: Share of the target that is spread over all words.

    Returns:
        Losses ``[B, T - 1]``, 0 where no token is predicted, and a mask ``[B, T - 1]`` bool, True where one is.
    """
    targets = input_ids.masked_fill(attention_mask == 0, IGNORED)
    targets[:, :prompt] = IGNORED
    targets = targets[:, 1:]
    losses = F.cross_entropy(
        logits[:, :-1].transpose(1, 2), targets, ignore_index=IGNORED, reduction="none", label_smoothing=smoothing
    )
    return losses, targets != IGNORED


def answer_loss(
    logits: Tensor,
    answer_ids: Tensor,
    answer_mask: Tensor,
    weights: Tensor,
    questions: int,
    *,
    smoothing: float = SMOOTHING,
) -> Tensor:
    """Return the weighted sum of the answers' losses, divided by the number of questions; a scalar.

    Args:
        logits: ``[A, L, W]`` of the token after each.
        answer_ids: ``[A, L]``.
        answer_mask: ``[A, L]``, 1 for a token, 0 for padding.
        weights: [A].
        questions: How many questions the answers belong to.
        smoothing: Share of the target that is spread over all words.
    """
    losses, _ = next_token_losses(logits, answer_ids, answer_mask, smoothing=smoothing)
    return (losses.sum(dim=1) * weights).sum() / questions
