"""Measure what can be guessed about scenes without looking or without reading: :func:`report`.

    python -m zoo.scenes.bias

Every row is a guesser's accuracy on held-out statements with its standard error; 50% is chance. The last row is the
strictest check on the words: over statements that came up often, how far truth strays from even odds, against what
fair coins would show.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from zoo.scenes.dataset import Sample, draw_sample
from zoo.scenes.objects import COLOURS, SHAPES, SIZES
from zoo.scenes.statements import Statement
from zoo.scenes.tokens import VOCABULARY, encode

_OFTEN = 10
_FEWEST_PIXELS = 8

Features = Callable[[Sample, Statement], Tensor]


@dataclass(frozen=True)
class Guess:
    """Accuracy of one guesser on ``items`` held-out statements."""

    name: str
    accuracy: float
    items: int

    @property
    def error(self) -> float:
        """Standard error of the accuracy of a coin on as many items."""
        return 0.5 / math.sqrt(self.items)


@dataclass(frozen=True)
class BiasReport:
    """What was measured.

    Attributes:
        guesses: one for each guesser.
        true_by_kind: share of true statements of each kind.
        strings: statements (as strings) that came up at least 10 times.
        dispersion: sum of squared standardised deviations from even odds over those strings, divided by their number;
            1 is what fair coins give.
        dispersion_error: standard deviation of that figure under fair coins.
    """

    guesses: tuple[Guess, ...]
    true_by_kind: dict[str, float]
    strings: int
    dispersion: float
    dispersion_error: float

    def table(self) -> Table:
        """Return the report for the terminal."""
        table = Table("guesser", "held-out accuracy", "chance", title="What scenes give away", title_justify="left")
        for guess in self.guesses:
            table.add_row(guess.name, f"{guess.accuracy:.2%}", f"50% ± {guess.error:.2%}")
        for kind, share in self.true_by_kind.items():
            table.add_row(f"true statements among {kind}", f"{share:.2%}", "50%")
        table.add_row(
            f"dispersion of truth over {self.strings} strings",
            f"{self.dispersion:.3f}",
            f"1 ± {self.dispersion_error:.3f}",
        )
        return table


def report(pairs: int = 6000, statements: int = 8, seed: int = 0, console: Console | None = None) -> BiasReport:
    """Measure and print the table; a third of the pairs is held out from the guessers."""
    samples = [draw_sample(seed, "train", index, statements) for index in range(pairs)]
    cut = pairs * 2 // 3
    seen, unseen = samples[:cut], samples[cut:]
    guesses = [
        _by_table("statement: majority of its string", seen, unseen, lambda statement: statement.text),
        _by_table("statement: majority of its wording", seen, unseen, _wording),
        _by_line("statement: words and word pairs, logistic", seen, unseen, _words),
        _by_line("pictures: their contents, logistic", seen, unseen, _contents),
        _by_line("pictures: 8 by 8 pixels, logistic", seen, unseen, _pixels),
    ]
    drawn = [statement for sample in samples for statement in sample.statements]
    kinds: defaultdict[str, list[bool]] = defaultdict(list)
    strings: defaultdict[str, list[bool]] = defaultdict(list)
    for statement in drawn:
        kinds[statement.kind].append(statement.label)
        strings[statement.text].append(statement.label)
    often = [labels for labels in strings.values() if len(labels) >= _OFTEN]
    deviations = [(2 * sum(labels) - len(labels)) ** 2 / len(labels) for labels in often]
    # The square of a standardised binomial at even odds has mean 1 and variance 2 - 2 / n.
    spread = math.sqrt(sum(2 - 2 / len(labels) for labels in often)) / max(1, len(often))
    found = BiasReport(
        guesses=tuple(guesses),
        true_by_kind={kind: float(np.mean(labels)) for kind, labels in sorted(kinds.items())},
        strings=len(often),
        dispersion=float(np.mean(deviations)) if often else 1.0,
        dispersion_error=spread,
    )
    (console or Console()).print(found.table())
    return found


def _wording(statement: Statement) -> str:
    """Return the statement with colours, shapes and sizes blanked."""
    blank = {*COLOURS, *SIZES, *SHAPES, "shape", "shapes", "circles", "squares", "triangles", "crosses"}
    return " ".join("_" if word in blank else word for word in statement.text.split())


def _by_table(name: str, seen: Sequence[Sample], unseen: Sequence[Sample], key: Callable[[Statement], str]) -> Guess:
    votes: Counter[str] = Counter()
    for sample in seen:
        for statement in sample.statements:
            votes[key(statement)] += 1 if statement.label else -1
    right = [(votes[key(s)] > 0) == s.label for sample in unseen for s in sample.statements]
    return Guess(name, float(np.mean(right)), len(right))


def _by_line(name: str, seen: Sequence[Sample], unseen: Sequence[Sample], features: Features) -> Guess:
    """Fit a logistic regression with a little weight decay; report its held-out accuracy."""
    inputs, labels = _matrix(seen, features)
    mean, scale = inputs.mean(0), inputs.std(0).clamp_min(1e-3)
    weight = torch.zeros(inputs.shape[1] + 1, requires_grad=True)
    optimiser: torch.optim.Optimizer = torch.optim.LBFGS([weight], max_iter=60, line_search_fn="strong_wolfe")

    def logits(x: Tensor) -> Tensor:
        return (x - mean) / scale @ weight[:-1] + weight[-1]

    def loss() -> float:
        optimiser.zero_grad()
        value = F.binary_cross_entropy_with_logits(logits(inputs), labels) + 1e-4 * weight.square().sum()
        torch.autograd.backward(value)
        return float(value.detach())

    optimiser.step(loss)
    test_inputs, test_labels = _matrix(unseen, features)
    right = (logits(test_inputs) > 0) == (test_labels > 0.5)
    return Guess(name, float(right.float().mean()), len(right))


def _matrix(samples: Sequence[Sample], features: Features) -> tuple[Tensor, Tensor]:
    rows = [features(sample, statement) for sample in samples for statement in sample.statements]
    labels = [float(statement.label) for sample in samples for statement in sample.statements]
    return torch.stack(rows), torch.tensor(labels)


def _words(sample: Sample, statement: Statement) -> Tensor:
    del sample
    ids = encode([statement.text])[0][0]
    size = len(VOCABULARY)
    row = torch.zeros(size + 211)
    row[ids] = 1
    # Word pairs share 211 cells by their remainder.
    row[size + (ids[:-1] * size + ids[1:]) % 211] = 1
    return row


def _contents(sample: Sample, statement: Statement) -> Tensor:
    del statement
    row = torch.zeros(2, len(COLOURS) + len(SHAPES) + len(SIZES) + 1)
    for side, things in enumerate(sample.pair.pictures):
        for thing in things:
            row[side, thing.colour] += 1
            row[side, len(COLOURS) + thing.shape] += 1
            row[side, len(COLOURS) + len(SHAPES) + thing.size] += 1
        row[side, -1] = len(things)
    left, right = row
    return torch.cat([left, right, (left - right).abs()])


def _pixels(sample: Sample, statement: Statement) -> Tensor:
    del statement
    return F.adaptive_avg_pool2d(sample.images.float(), _FEWEST_PIXELS).flatten()


if __name__ == "__main__":
    report()
