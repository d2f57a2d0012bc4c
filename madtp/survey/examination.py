"""Examine one model: rewrite it, and measure whether the invariants hold.

Start at :func:`examine`. Each :class:`Probe` measures one invariant.
"""

from __future__ import annotations

import copy
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

import madtp
from madtp.calls.agreement import differ_by_rounding
from madtp.errors import CaptureError, LeftAloneError, MadtpError, NoSiteError
from madtp.pruned import PrunedModel
from madtp.report import RewriteReport
from madtp.sites.preserved_state import trial_run
from madtp.survey.attention_calls import AttentionCalls, traits
from madtp.survey.outputs import (
    batch_size,
    in_double_precision,
    output_tensors,
    relative_error,
    repeat_samples,
    take_sample,
    tensor_error,
)
from madtp.survey.record import IDENTITY, INDEPENDENCE, Record, RefusalRecord, with_outcome
from madtp.survey.source import Source

Inputs = Mapping[str, object]

STRONG_GAIN = 4.0
# The default number of alignment tokens suits widths of about 768; small models have about a twelfth of that.
CONFIG = madtp.PruningConfig(alignment_tokens=8)
STEPS = 10
LEARNING_RATES = (1e-3, 1e-4)
LAST_STEPS = 3


@dataclass(frozen=True)
class Probe:
    """Measures one invariant of a pruned model.

    Attributes:
        field: field of :class:`Record` that holds the result.
        measure: takes the original, the pruned model and example inputs.
        fails: whether a result breaks the invariant.
    """

    field: str
    measure: Callable[[nn.Module, PrunedModel, Inputs], float | bool | None]
    fails: Callable[[float | bool | None], bool]

    def recorded(self, record: Record, value: float | bool | None) -> Record:
        """Return the record with a result."""
        update: Callable[..., Record] = replace
        return update(record, **{self.field: value})


def examine(name: str, source: Source) -> Record:
    """Build a model and its inputs, rewrite it, and measure the invariants. Exceptions become part of the record.

    Args:
        name: of the model.
        source: makes it, and its inputs.
    """
    started = time.perf_counter()
    record = _examine(Record(name, "error"), source)
    return replace(record, seconds=time.perf_counter() - started)


def _examine(record: Record, source: Source) -> Record:
    torch.manual_seed(0)
    try:
        model, inputs = source.build(record.name)
        model.eval()
        record = replace(record, kind=type(model).__name__, parameters=sum(p.numel() for p in model.parameters()))
        with torch.no_grad(), AttentionCalls() as calls:
            model(**inputs)
    except Exception as error:
        return replace(record, outcome="unbuildable", failure=text_of(error))
    record = replace(record, traits=traits(calls, inputs))
    started = time.perf_counter()
    try:
        pruned = madtp.rewrite(model, dict(inputs), config=CONFIG)
    except MadtpError as error:
        return _refused(record, error, calls.count, time.perf_counter() - started)
    except Exception as error:
        return replace(record, failure=text_of(error))
    record = _reported(record, pruned.madtp.report, time.perf_counter() - started)
    if pruned.madtp.config.towers is not None:  # set by the rewrite itself, for a language model
        record = _language(record)
    return _probed(record, model, pruned, inputs)


def _refused(record: Record, error: MadtpError, attentions: int, seconds: float) -> Record:
    outcome = "refused" if attentions or not isinstance(error, NoSiteError) else "no transformer"
    by_policy = isinstance(error, LeftAloneError) and error.by_policy
    outcome = "left alone" if by_policy else outcome
    refusal = RefusalRecord("", f"{type(error).__name__}: {error}", by_policy=by_policy)
    return replace(record, outcome=outcome, refusals=(refusal,), rewrite_seconds=seconds)


def _language(record: Record) -> Record:
    return replace(record, traits=("language", *(record.traits or ())))


def _reported(record: Record, report: RewriteReport, seconds: float) -> Record:
    blocks = Counter(f"{block.norm}-norm {block.kind}" for block in report.blocks)
    streams = {block.stream for block in report.blocks if block.kind == "self"}
    names = {site.name for site in report.sites}
    pruned = {block.stream for block in report.blocks if block.path in names}
    chosen = {refusal.block for refusal in report.refusals if refusal.by_policy}
    left = {block.stream for block in report.blocks if block.path in chosen} - pruned
    # A refusal of a whole submodule names no node, and counts as one more stream without a site. The model itself is counted by
    # its regions, and by the refusals of others.
    submodules = [refusal for refusal in report.refusals if not refusal.node and refusal.block != record.kind]
    return replace(
        record,
        outcome="rewritten",
        capture=report.capture,
        blocks=dict(blocks),
        streams=len(streams) + len(submodules),
        pruned=len(pruned & streams),
        left=len(left & streams) + sum(refusal.by_policy for refusal in submodules),
        sites=len(report.sites),
        refusals=tuple(RefusalRecord(r.block, r.reason, r.help, r.by_policy) for r in report.refusals),
        rewrite_seconds=seconds,
    )


def _probed(record: Record, model: nn.Module, pruned: PrunedModel, inputs: Inputs) -> Record:
    """The record with the results of the probes. A probe that is refused, as training may be, is recorded as a refusal."""
    faults: list[str] = []
    for probe in PROBES:
        try:
            value = probe.measure(model, pruned, inputs)
        except MadtpError as error:
            refusals = (*record.refusals, RefusalRecord(probe.field, f"{type(error).__name__}: {error}"))
            record = replace(record, refusals=refusals)
            continue
        except Exception as error:
            return replace(record, outcome="error", failure=f"{probe.field}: {text_of(error)}")
        record = probe.recorded(record, value)
        if probe.fails(value):
            faults.append(f"{probe.field}: {value if isinstance(value, bool) else f'{value:.1e}'}")
    if faults:
        return replace(record, outcome="wrong", failure="; ".join(faults))
    return with_outcome(record)


@torch.no_grad()
def identity(model: nn.Module, pruned: PrunedModel, inputs: Inputs) -> float:
    """Return the largest error with pruning off, at the example's batch size and at another one.

    The original itself may round by more than the limit in single precision. If the pruned model is then about as close to the
    original in double precision as the original in single precision is, the error in double precision counts.
    """
    batches = [given for given in (inputs, repeat_samples(inputs, 3)) if given is not None]
    with pruned.madtp.dense():
        error = max(relative_error(_outputs(model, given), _outputs(pruned, given)) for given in batches)
        return error if error <= IDENTITY else min(error, _exact_identity(model, pruned, batches))


def _exact_identity(model: nn.Module, pruned: PrunedModel, batches: Sequence[Inputs]) -> float:
    """The error in double precision; infinite where the error in single precision is larger than rounding."""
    exact_model, exact_pruned = copy.deepcopy(model).double(), copy.deepcopy(pruned).double()
    errors = []
    for given in batches:
        truth = partial(_outputs, exact_model, in_double_precision(given))
        if not differ_by_rounding(truth, partial(_outputs, model, given), partial(_outputs, pruned, given)):
            return float("inf")
        with exact_pruned.madtp.dense():  # the block around this call does not hold for copies
            errors.append(relative_error(truth(), _outputs(exact_pruned, in_double_precision(given))))
    return max(errors)


@torch.no_grad()
def reduction(model: nn.Module, pruned: PrunedModel, inputs: Inputs) -> float:
    """Return the fraction of the multiply-accumulates that a strong setting saves."""
    with pruned.madtp.dense():
        pruned(**inputs)
        before = pruned.madtp.macs()
    with strongly(pruned):
        pruned(**inputs)
        return 1.0 - pruned.madtp.macs() / before


@torch.no_grad()
def independence(model: nn.Module, pruned: PrunedModel, inputs: Inputs) -> float | None:
    """Return the largest error of a sample alone against itself in the batch, with strong pruning.

    ``None`` if the original itself couples the samples of a batch in every output. Tokens whose scores differ only by rounding
    may swap ranks. In double precision they do not, so a large error is measured again there.
    """
    error = _single_sample_error(model, pruned, inputs)
    if error is None or error <= INDEPENDENCE:
        return error
    return _single_sample_error(
        copy.deepcopy(model).double(), copy.deepcopy(pruned).double(), in_double_precision(inputs)
    )


def _single_sample_error(model: nn.Module, pruned: PrunedModel, inputs: Inputs) -> float | None:
    """Where the batch size is frozen, a batch of copies stands for the single sample."""
    size = batch_size(inputs)
    if size is None:
        return None
    together = _outputs(model, inputs)
    errors: list[float] = []
    for row in range(size):
        one = take_sample(inputs, row, size)
        alone = _outputs(model, one)
        independent = [key for key, value in alone.items() if _same_row(together.get(key), value, row, 1e-4)]
        with strongly(pruned):
            batch = _outputs(pruned, inputs)
            try:
                single = _outputs(pruned, one)
            except CaptureError:
                single = _outputs(pruned, {**inputs, **(repeat_samples(one, size) or {})})
        errors += [_row_error(batch[key], single[key], row) for key in independent if key in single]
    return max(errors, default=None)


def _outputs(model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """Outputs by path. Random draws of the model, such as an order of patches, are the same at every call."""
    with trial_run(model, inputs):
        return output_tensors(model(**inputs))


def _row_error(batch: Tensor, single: Tensor, row: int) -> float:
    return tensor_error(batch[row : row + 1], single[:1])


def _same_row(together: Tensor | None, alone: Tensor, row: int, tolerance: float) -> bool:
    if together is None or not together.dim() or together.shape[1:] != alone.shape[1:] or alone.shape[0] != 1:
        return False
    return row < together.shape[0] and tensor_error(together[row : row + 1], alone) <= tolerance


def trains(model: nn.Module, pruned: PrunedModel, inputs: Inputs) -> bool | None:
    """Whether a loss falls over ten steps of training at one of the learning rates; the larger one may overshoot.

    ``None`` if no output of the original has a gradient either.
    """
    if _loss(output_tensors(model(**inputs)), {}) is None:
        return None
    return any(_falls(pruned, inputs, rate) for rate in LEARNING_RATES)


def _falls(pruned: PrunedModel, inputs: Inputs, rate: float) -> bool:
    """Whether the loss falls over ten steps of Adam; the weights are restored afterwards."""
    state = {name: value.clone() for name, value in pruned.state_dict().items()}
    pruned.train()
    optimiser = torch.optim.Adam([p for p in pruned.parameters() if p.requires_grad], lr=rate)
    targets: dict[str, Tensor] = {}
    losses = []
    try:
        for step in range(STEPS):
            torch.manual_seed(step)
            loss = _loss(output_tensors(pruned(**inputs)), targets)
            assert loss is not None
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            optimiser.step()
            losses.append(float(loss.detach()))
    finally:
        pruned.load_state_dict(state)
        pruned.eval()
    return min(losses[-LAST_STEPS:]) < losses[0]


def _loss(outputs: Mapping[str, Tensor], targets: dict[str, Tensor]) -> Tensor | None:
    """Mean squared distance of the differentiable outputs to fixed random targets."""
    terms = []
    for key, value in outputs.items():
        if not (value.requires_grad and value.dtype.is_floating_point):
            continue
        usable = torch.isfinite(value.detach()) & (value.detach().abs() < 1e4)
        if key not in targets:
            generator = torch.Generator().manual_seed(len(targets))
            targets[key] = torch.randn(value.shape, generator=generator)
        if value.shape == targets[key].shape and bool(usable.any()):
            terms.append((value.float()[usable] - targets[key][usable]).square().mean())
    return torch.stack(terms).mean() if terms else None


@contextmanager
def strongly(pruned: PrunedModel) -> Iterator[None]:
    """Prune strongly inside the block."""
    before, pruned.madtp.gain = pruned.madtp.gain, STRONG_GAIN
    try:
        yield
    finally:
        pruned.madtp.gain = before


def text_of(error: Exception) -> str:
    """The exception in one line, and the place in this project that raised it."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "site-packages" not in f.filename]
    place = f" ({frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno})" if frames else ""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}{place}"


PROBES = (
    Probe("identity", identity, lambda error: error is None or not error <= IDENTITY),
    Probe("reduction", reduction, lambda saved: False),
    Probe("independence", independence, lambda error: error is not None and not error <= INDEPENDENCE),
    Probe("trains", trains, lambda falls: falls is False),
)
