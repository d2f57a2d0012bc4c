"""File formats of exported models: how each is written, opened and called. Start at :data:`FORMATS`.

Every format stores one ``ExportedProgram`` of ``torch.export``. An opened artefact is called as the model is, and returns the
tensors of its output in order.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from madtp.errors import ExampleInputsError, ExportError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

Opened: TypeAlias = Callable[..., list[Tensor]]
"""An opened artefact: takes what the model takes, returns the tensors among the leaves of its output."""

DESCRIPTION = "madtp.json"
ANSI = re.compile(r"\x1b\[[0-9;]*m")
ONNX_LIMIT = 2**31 - 2**20
"""Bytes of weights from which an ONNX file cannot hold them."""


@dataclass(frozen=True)
class ArtefactFormat:
    """A file format.

    Attributes:
        name: how commands call it.
        suffix: of its files.
        write: writes a program with a description to a path.
        open: opens a file.
    """

    name: str
    suffix: str
    write: Callable[[ExportedProgram, Mapping[str, object], Path], None]
    open: Callable[[Path], Opened]


def tensors_of(output: object) -> list[Tensor]:
    """Return the tensors among the leaves of an output, in order."""
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


class _PatientFile(io.FileIO):
    """A file to write that keeps its first error until :meth:`close`: torch ends the process if writing an archive fails."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "w+")
        self._failure: OSError | None = None

    def write(self, data: ReadableBuffer, /) -> int:
        """Write all of ``data``, or pretend to."""
        rest = memoryview(data).cast("B")
        size = len(rest)
        try:
            while rest and self._failure is None:
                rest = rest[super().write(rest) :]
        except OSError as error:
            self._failure = error
        return size

    def close(self) -> None:
        """Close the file.

        Raises:
            OSError: not all has been written.
        """
        super().close()
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure


def _write_pt2(program: ExportedProgram, description: Mapping[str, object], path: Path) -> None:
    with _PatientFile(path) as file:
        torch.export.save(program, file, extra_files={DESCRIPTION: json.dumps(description)})


def _open_pt2(path: Path) -> Opened:
    module = torch.export.load(path).module()
    return lambda *args, **kwargs: tensors_of(module(*args, **kwargs))


def _write_aoti(program: ExportedProgram, description: Mapping[str, object], path: Path) -> None:
    with _PatientFile(path) as file:
        try:
            torch._inductor.aoti_compile_and_package(
                program,
                package_path=file,
                inductor_configs={"aot_inductor.metadata": {"madtp": json.dumps(description)}},
            )
        except Exception as error:  # compilers fail in many ways
            raise ExportError(
                f"AOTInductor could not compile the model ({type(error).__name__}: {reason_of(error)}). It needs a C++ "
                "compiler; the format pt2 needs none."
            ) from error


def _open_aoti(path: Path) -> Opened:
    module: Callable[..., object] = torch._inductor.aoti_load_package(str(path))
    return lambda *args, **kwargs: tensors_of(module(*args, **kwargs))


def _write_onnx(program: ExportedProgram, description: Mapping[str, object], path: Path) -> None:
    size = sum(value.numel() * value.itemsize for value in program.state_dict.values())
    if size > ONNX_LIMIT:
        raise ExportError(f"the weights take {size / 2**30:.1f} GiB; an ONNX file holds 2. Use the format pt2 or aoti.")
    try:
        converted = torch.onnx.export(program, dynamo=True, verbose=False, output_names=output_names(program))
    except ImportError as error:
        raise ExportError(f"the ONNX exporter lacks a library ({error}); pip install 'madtp[onnx]'.") from error
    except Exception as error:  # an operation without a translation, or a library of another version
        raise ExportError(
            f"the ONNX exporter failed ({type(error).__name__}: {reason_of(error)}). The formats pt2 and aoti need no ONNX."
        ) from error
    assert converted is not None
    converted.model.metadata_props["madtp"] = json.dumps(description)
    converted.save(str(path))


def output_names(program: ExportedProgram) -> list[str]:
    """Return a name for each tensor that a program returns: where it stands in the result, as ``text.last_hidden_state``."""
    spec = program.call_spec.out_spec
    returned = program.graph_signature.user_outputs
    placed = pytree.tree_unflatten(list(range(len(returned))), spec)
    given = set(program.graph_signature.user_inputs)
    names = []
    for keys, number in pytree.tree_flatten_with_path(placed)[0]:
        if isinstance(returned[number], str):  # what is no tensor is no output of a file
            parts = [re.sub(r"\W", "", pytree.keystr((key,))) for key in keys]
            name = ".".join(parts if parts and not parts[0].isdigit() else ["output", *parts])
            names.append(f"{name}.output" if name in given else name)
    return names


def _open_onnx(path: Path) -> Opened:
    try:
        import onnxruntime
    except ImportError as error:
        raise ExportError("ONNX Runtime is not installed; pip install 'madtp[onnx]'.") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    arguments = json.loads(session.get_modelmeta().custom_metadata_map.get("madtp", "{}")).get("arguments")

    def run(*args: Any, **kwargs: Any) -> list[Tensor]:
        if arguments is not None:
            kwargs = _in_order(arguments, args, kwargs)
        given = [tensor.detach().cpu().contiguous().numpy() for tensor in tensors_of((args, kwargs))]
        if len(given) != len(names):
            raise ExampleInputsError(
                f"the file takes {len(names)} tensors ({', '.join(names)}); {len(given)} were given."
            )
        return [torch.from_numpy(value) for value in session.run(None, dict(zip(names, given, strict=True)))]

    return run


def _in_order(arguments: Mapping[str, Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The named arguments of a call in the order in which the file was exported with them."""
    if len(args) != arguments["positional"] or set(kwargs) != set(arguments["named"]):
        raise ExampleInputsError(
            f"the file was exported with {arguments['positional']} positional arguments and those named "
            f"{', '.join(arguments['named']) or '(none)'}; it was called with {len(args)} and {', '.join(kwargs) or '(none)'}."
        )
    return {name: kwargs[name] for name in arguments["named"]}


def reason_of(error: BaseException) -> str:
    """Return the first line of the innermost cause of an error, as plain text."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in ANSI.sub("", str(error)).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


FORMATS: dict[str, ArtefactFormat] = {
    one.name: one
    for one in (
        ArtefactFormat("pt2", ".pt2", _write_pt2, _open_pt2),
        ArtefactFormat("onnx", ".onnx", _write_onnx, _open_onnx),
        ArtefactFormat("aoti", ".pt2", _write_aoti, _open_aoti),
    )
}
"""By name: an exported program of PyTorch, ONNX, and a package compiled by AOTInductor."""
