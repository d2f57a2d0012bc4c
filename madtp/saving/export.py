"""Models that leave Python: :func:`export` writes a frozen model as one artefact, and checks what it wrote.

``artefacts.py`` holds the file formats. An artefact computes what the frozen model computes, for inputs of the sizes that it
was exported with.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

import madtp
from madtp.atomic_files import check_writable, is_write_failure, replacing_file
from madtp.calls.batch import sample_dims
from madtp.calls.call import Call, Inputs
from madtp.errors import ConfigError, ExampleInputsError, ExportError, MadtpError
from madtp.pruned.model import HOW_TO_EXPORT, PrunedModel
from madtp.saving.artefacts import FORMATS, ArtefactFormat, Opened, reason_of, tensors_of
from madtp.tuning.batches import as_call, evaluating


@dataclass(frozen=True)
class Exported:
    """What :func:`export` wrote.

    Attributes:
        path: the file.
        format: ``"pt2"``, ``"onnx"`` or ``"aoti"``.
        megabytes: its size.
        difference: largest difference of any output from that of the frozen model, as a fraction of the output's largest
            entry, on the example inputs and on the same samples in reverse order.
    """

    path: Path
    format: str
    megabytes: float
    difference: float

    def open(self) -> Opened:
        """Return the artefact, ready to be called as the model is; see :func:`open_artefact`."""
        return open_artefact(self.path, self.format)


def export(
    pruned: PrunedModel,
    path: str | os.PathLike[str],
    example_inputs: Inputs,
    *,
    format: str | None = None,
    any_batch: bool = False,
    tolerance: float = 1e-4,
) -> Exported:
    """Write a frozen model as a file that runs without Python code of the model, and check that it computes the same.

    Outputs with named fields, such as named tuples and data classes, become dicts.

    Args:
        pruned: a model with fixed counts (:func:`madtp.freeze`). It is exported in eval mode; its mode is restored.
        path: the file to write. It appears only when it is complete and checked.
        example_inputs: inputs as the model takes them, a dict of keyword arguments or a tuple of positional ones. The artefact
            is called in the same way, with inputs of these sizes; arguments that are not tensors keep these values.
        format: ``"pt2"``, a program of ``torch.export``; ``"onnx"``; or ``"aoti"``, compiled to machine code by AOTInductor,
            which needs a C++ compiler. None decides by the suffix of ``path``: ``.onnx``, else pt2.
        any_batch: the artefact takes any number of samples, 2 or more. The example inputs need 2 or more then.
        tolerance: how far outputs may be off, as a fraction of the largest entry of each.

    Returns:
        What was written, with the difference that was found.

    Raises:
        ConfigError: there is no such format, or ``path`` has the suffix of another.
        ExampleInputsError: the inputs do not fit the model.
        ExportError: the model is not frozen, something in it depends on values, a library or compiler is missing, or the
            artefact computes something else. Nothing is left at ``path`` that was not there before.
        UnwritableError: there is no room for the file, or no right to write it.
    """
    if not isinstance(pruned, PrunedModel):
        raise ExportError(f"a {type(pruned).__name__} is no pruned model; rewrite it with madtp.rewrite first.")
    if not isinstance(example_inputs, (Mapping, tuple)):
        raise ExampleInputsError(
            f"example_inputs is a {type(example_inputs).__name__}; pass a dict of keyword arguments or a tuple of positional "
            "ones."
        )
    if not isinstance(tolerance, (int, float)) or not 0.0 < tolerance < math.inf:
        raise ConfigError(f"tolerance is {tolerance!r}; allowed: a finite number above 0")
    path = Path(path)
    chosen = format_of(path, format)
    _check_target(path)
    if pruned.madtp.control.active and not pruned.madtp.control.counts_are_fixed():
        raise ExportError(f"token counts depend on the input, so shapes are not known. {HOW_TO_EXPORT}")
    as_call(pruned, example_inputs)
    # The artefact is called as the example is given, by name or by position.
    call = Call((), dict(example_inputs)) if isinstance(example_inputs, Mapping) else Call(tuple(example_inputs), {})
    if any_batch and call.samples() < 2:
        raise ExampleInputsError(
            "the example inputs hold one sample; to leave the number of samples free, give 2 or more."
        )
    with torch.no_grad(), evaluating(pruned):
        batches = _check_batches(call, any_batch=any_batch)
        expected = [tensors_of(pruned(*one.args, **one.kwargs)) for one in batches]
        program = export_program(pruned, call, any_batch=any_batch)
        with replacing_file(path) as draft:
            found = _written(chosen, program, _describe(pruned, call), draft, batches, expected)
            if not found <= tolerance:
                raise ExportError(
                    f"the artefact is off by {found:.2g} of an output's largest entry, more than {tolerance:g}. Scores "
                    "that are equal up to rounding may select other tokens; if other inputs differ as much, use another "
                    "format, or in half precision a larger tolerance."
                )
    return Exported(path, chosen.name, path.stat().st_size / 2**20, found)


def _check_target(path: Path) -> None:
    """Refuse a path at which no file can be written, before the work."""
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; name a file in it.")
    blocking = next((parent for parent in path.parents if parent.exists()), None)
    if blocking is not None and not blocking.is_dir():
        raise ConfigError(f"{blocking} is a file, so {path} cannot be written.")
    check_writable(path)


def _written(
    chosen: ArtefactFormat,
    program: ExportedProgram,
    description: Mapping[str, object],
    draft: Path,
    batches: list[Call],
    expected: list[list[Tensor]],
) -> float:
    """Write a file, and return how far its outputs are off."""
    try:
        chosen.write(program, description, draft)
        run = chosen.open(draft)
        return max(_difference(own, run(*one.args, **one.kwargs)) for own, one in zip(expected, batches, strict=True))
    except MadtpError:
        raise
    except Exception as error:  # writers and runtimes fail in many ways
        if is_write_failure(error, draft):
            raise
        raise ExportError(
            f"the model cannot be written or run as {chosen.name} ({type(error).__name__}: {reason_of(error)})."
        ) from error


def open_artefact(path: str | os.PathLike[str], format: str | None = None) -> Opened:
    """Open what :func:`export` wrote.

    Args:
        path: the file.
        format: its format; None decides by the suffix.

    Returns:
        A function that takes what the model takes, and returns the tensors among the leaves of the model's output.

    Raises:
        ConfigError: there is no such format.
        ExportError: ONNX Runtime is missing, or the file cannot be read.
    """
    path = Path(path)
    chosen = format_of(path, format)
    if not path.is_file():
        raise ExportError(f"there is no file {path}; give a file that madtp.export wrote.")
    try:
        return chosen.open(path)
    except MadtpError:
        raise
    except Exception as error:  # readers of damaged files fail in many ways
        raise ExportError(
            f"{path} cannot be read as {chosen.name} ({type(error).__name__}: {reason_of(error)}); name its format if it has "
            "another, or export the model again."
        ) from error


def export_program(pruned: PrunedModel, call: Call, *, any_batch: bool) -> ExportedProgram:
    """Return a frozen model as a program of ``torch.export``.

    Args:
        pruned: in eval mode.
        call: the call to export.
        any_batch: leave the number of samples free.

    Raises:
        ExportError: something in the model depends on values.
    """
    shapes = _free_batch(pruned, call) if any_batch else None
    try:
        # Tensors keep the marks that an export puts on them, so it gets others.
        args, kwargs = pytree.tree_map_only(Tensor, lambda value: value.detach().clone(), (call.args, call.kwargs))
        with pruned.madtp.aside(), _original_signature(pruned):
            return torch.export.export(pruned, args, kwargs, dynamic_shapes=shapes)
    except MadtpError:
        raise
    except Exception as error:  # exporting fails in many ways
        raise ExportError(
            f"torch.export cannot follow the model ({type(error).__name__}: {reason_of(error)}). "
            + ("Without any_batch it may." if any_batch else "Something in it depends on the values of its inputs.")
        ) from error


@contextmanager
def _original_signature(pruned: PrunedModel) -> Iterator[None]:
    """Inside the block the model's forward names its arguments as the original does, and returns plain containers."""

    @functools.wraps(pruned.forward)
    def forward(*args: object, **kwargs: object) -> object:
        return _plain(type(pruned).forward(pruned, *args, **kwargs))

    forward.__signature__ = inspect.signature(pruned.forward)  # type: ignore[attr-defined]
    pruned.__dict__["forward"] = forward
    try:
        yield
    finally:
        del pruned.__dict__["forward"]


def _plain(output: object) -> object:
    """An output without classes that a process that reads the artefact may lack: what has named fields becomes a dict."""
    if isinstance(output, Mapping):
        return {name: _plain(value) for name, value in output.items()}
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        return {name: _plain(getattr(output, name)) for name in output._fields}
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        return {field.name: _plain(getattr(output, field.name)) for field in dataclasses.fields(output)}
    if isinstance(output, (list, tuple)):
        return type(output)(_plain(value) for value in output)
    return output


def format_of(path: Path, name: str | None) -> ArtefactFormat:
    """Return the format of a file, by its name or by the suffix of its path.

    Raises:
        ConfigError: there is no such format, or ``path`` has the suffix of another.
    """
    name = name or ("onnx" if path.suffix == ".onnx" else "pt2")
    if name not in FORMATS:
        raise ConfigError(f"format is {name!r}; allowed: {', '.join(map(repr, FORMATS))}")
    if path.suffix != FORMATS[name].suffix:
        raise ConfigError(f"the file is named {path.name}; a file of format {name} ends in {FORMATS[name].suffix}")
    return FORMATS[name]


def _free_batch(pruned: PrunedModel, call: Call) -> dict[str, object]:
    """The dimensions of a call's tensors that are its samples, marked as free, by argument."""
    leaves, spec = pytree.tree_flatten((call.args, call.kwargs))
    dims = sample_dims(leaves)
    if dims is None:
        raise ExportError("the inputs do not tell which of their dimensions are samples; export without any_batch.")
    free = [None if dim is None else {dim: torch.export.Dim.DYNAMIC} for dim in dims]
    args, kwargs = pytree.tree_unflatten(free, spec)
    return dict(inspect.signature(pruned.forward).bind(*args, **kwargs).arguments)


def _check_batches(call: Call, *, any_batch: bool) -> list[Call]:
    """The calls that an artefact is checked on: as given, with the samples in reverse order, and with one sample fewer."""
    leaves = call.flat()[0]
    dims = sample_dims(leaves)
    batches = [call]
    if dims is None:
        return batches

    def changed(change: Callable[[Tensor, int], Tensor]) -> Call:
        return call.with_leaves(
            [
                leaf if dim is None or not isinstance(leaf, Tensor) else change(leaf, dim)
                for leaf, dim in zip(leaves, dims, strict=True)
            ]
        )

    batches.append(changed(lambda tensor, dim: tensor.flip(dim)))
    if any_batch and call.samples() > 2:
        batches.append(changed(lambda tensor, dim: tensor.narrow(dim, 0, tensor.size(dim) - 1)))
    return batches


def _difference(expected: list[Tensor], found: list[Tensor]) -> float:
    """The largest difference, as a fraction of the largest entry of its tensor; infinite if shapes differ."""
    if [one.shape for one in expected] != [one.shape for one in found]:
        return float("inf")
    worst = 0.0
    for own, other in zip(expected, found, strict=True):
        own, other = own.double().cpu(), other.double().cpu()
        finite = own.isfinite()
        # What is not finite, such as the logits of masked answers, has to be the same.
        if not torch.equal(own[~finite].nan_to_num(nan=0.5), other[~finite].nan_to_num(nan=0.5)):
            return math.inf
        if not bool(finite.any()):
            continue
        gap, largest = float((own[finite] - other[finite]).abs().max()), float(own[finite].abs().max())
        if not gap < math.inf:
            return math.inf
        worst = max(worst, gap / largest if largest else (math.inf if gap else 0.0))
    return worst


def _describe(pruned: PrunedModel, call: Call) -> Mapping[str, object]:
    control = pruned.madtp.control
    return {
        "madtp": madtp.__version__,
        "torch": str(torch.__version__),
        "model": type(pruned).__qualname__,
        "arguments": {"positional": len(call.args), "named": list(call.kwargs)},
        "prunes": control.active,
        "pruning": pruned.madtp.config.to_dict(),
        "temperature": pruned.madtp.temperature,
        "gain": pruned.madtp.gain,
        "static_counts": dict(control.static_counts) if control.active else {},
    }
