"""The pruned model: what :func:`madtp.rewrite` returns.

Start at :class:`PrunedModel`. It is called as the original is, returns what the original returns, and holds the
original's parameters under their own names; all that pruning adds lies under the one prefix ``madtp.``.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, Literal

import torch
from torch import Tensor, nn

from madtp.calls.branches import OtherBranch
from madtp.calls.call import normalise_call
from madtp.calls.objects import object_kind
from madtp.calls.per_image import PerImageArguments
from madtp.config import PruningConfig
from madtp.errors import ConfigError, ContinuationError, MadtpError, RewriteError
from madtp.method.guidance import alignment_loss, mean_over_images
from madtp.programs.cache import MANY_WAYS, Builder, Programs
from madtp.programs.per_image_region import RegionApart
from madtp.programs.region import HostForward, Notes, Region, watching
from madtp.report import RewriteReport
from madtp.sites.additions import PREFIX, Additions
from madtp.sites.control import PruningControl
from madtp.sites.scoring import SiteSpec
from madtp.tokens.state import kept_positions

log = logging.getLogger("madtp")
OUTSIDE = "(outside the regions)"
Tokens = Literal["kept", "all", "none"]


class PrunedModel(nn.Module):
    """A drop-in for the original model that prunes tokens.

    Attributes:
        report: what was found and done; ``str()`` is a table.
        config: the :class:`~madtp.config.PruningConfig`.
        example: the call it was rewritten with, as :func:`madtp.calls.record.record_call` keeps it.
    """

    def __init__(
        self,
        host: nn.Module,
        specs: list[SiteSpec],
        keys: list[str],
        config: PruningConfig,
        report: RewriteReport,
        alignment_width: int,
        images: int,
        image_order: str,
    ) -> None:
        """Made by :func:`madtp.rewrite`; ``host`` is a copy of the original's module tree that this model owns."""
        super().__init__()
        if PREFIX in host._modules or PREFIX in host._parameters:
            raise RewriteError(f"the model has a child named {PREFIX!r}; that name is taken for what pruning adds.")
        control = PruningControl(config, temperature=config.temperature, gain=config.gain)
        additions = Additions(specs, keys, control, alignment_width)
        example = next(host.parameters(), None)
        if example is not None:
            additions.to(device=example.device, dtype=example.dtype if example.dtype.is_floating_point else None)
        additions.train(host.training)
        host._modules[PREFIX] = additions
        for name in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
            object.__setattr__(self, name, host.__dict__[name])
        for name, value in (
            ("_host", host),
            ("_control", control),
            ("_whole", None),
            ("_regions", {}),
        ):
            object.__setattr__(self, name, value)
        self.report = report
        self.config = config
        self.example: dict[str, Any] = {"args": [], "kwargs": {}}
        self._images, self._image_order = images, image_order
        self.training = host.training

    @property
    def temperature(self) -> float:
        """T of the threshold; 0 switches pruning off and reproduces the original."""
        return self._control.temperature

    @temperature.setter
    def temperature(self, value: float) -> None:
        self._control.temperature = _strength("temperature", value)

    @property
    def gain(self) -> float:
        """Factor on the threshold: 1 as in the paper, towards 0 approaches the dense model."""
        return self._control.gain

    @gain.setter
    def gain(self, value: float) -> None:
        self._control.gain = _strength("gain", value)

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether a forward with gradients keeps little of what lies between blocks, and the backward computes it again: less
        memory, about a third more time, the same gradients for the same tokens."""
        return self._control.gradient_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value: bool) -> None:
        self._control.gradient_checkpointing = bool(value)

    def stand_in(
        self,
        path: str,
        builder: Builder,
        *,
        inner: bool = False,
        written: str = "",
        apart: PerImageArguments | None = None,
    ) -> Programs:
        """Run the module at ``path`` of the host, "" for all of it, by programs of ``builder`` from now on.

        Args:
            inner: it lies in one for which that was asked already.
            written: place in its call of the tensor of which it has to be told where image features were written.
            apart: how its calls are taken apart into images.
        """
        programs = Programs(path, self._host.get_submodule(path), self._host, builder, inner=inner, apart=apart)
        if not path and apart is None:
            object.__setattr__(self, "_whole", programs)
            return programs
        notes = Notes(self.report.notes)
        self._regions[path] = programs
        programs.module.__dict__["forward"] = (
            Region(programs, self._control, notes, written)
            if apart is None
            else RegionApart(programs, apart, self._control, notes)
        )
        if not isinstance(self._host.__dict__.get("forward"), HostForward):
            self._host.__dict__["forward"] = HostForward(self._host, self._control, notes)
        self._host.__dict__["forward"].follows |= bool(written)
        return programs

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            host = self.__dict__.get("_host")
            if host is None or name.startswith("__"):
                raise
        value = getattr(host, name)
        if inspect.ismethod(value) and value.__self__ is host:
            return _as_one_call(value, self._control, self._watching(name))
        return value

    def _watching(self, method: str) -> Callable[[], AbstractContextManager[None]]:
        """Around calls of a method: a note where it runs blocks that hold sites as the original does."""
        if self._whole is None:
            return nullcontext
        blocks = {site.name.partition("#")[0] for site in self.report.sites}
        return functools.partial(watching, self._host, blocks, self._control, Notes(self.report.notes), method)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model; arguments and return type are the original's."""
        call = normalise_call(self._host, args, kwargs)
        if self._whole is None:
            return self._host(*args, **kwargs)
        for program in self._whole.candidates(call):
            with suppress(OtherBranch), self._control.call():
                self._control.begin_program()
                return self._whole.run(program, call)
        if self._whole.continues_pruned(call):
            raise ContinuationError(
                f"it goes on from what a pruned call has kept, which only programs can read, and {MANY_WAYS}."
            )
        Notes(self.report.notes).add(f"calls that run unpruned: {MANY_WAYS}")
        self._control.clear_record()
        return self._host(*args, **kwargs)

    def train(self, mode: bool = True) -> PrunedModel:
        """Set training mode, as any module."""
        super().train(mode)
        self._host.training = mode
        return self

    def token_counts(self) -> dict[str, Tensor]:
        """Tokens kept of each sample at each site in the last forward: ``{site: [B]}`` (two images a sample:
        ``[2B]``)."""
        return {name: state.counts for name, state in self._recorded().items()}

    def kept_tokens(self) -> dict[str, Tensor]:
        """Which original tokens survive after each site in the last forward: ``{site: [B, N] bool}``; merged ones do
        not count."""
        return {name: kept_positions(state) for name, state in self._recorded().items()}

    def surviving(self, tower: str) -> Tensor | None:
        """Which original tokens are left behind a module's last site in the last forward, [B, N] bool; None: it has no site.

        A model returns all tokens of a pruned stream, dropped ones as they were when they were. What reads them outside the
        model, such as a decoder that is called by itself, should see only these.

        Args:
            tower: path of the module, as in the names of its sites.
        """
        inside = [state for name, state in self._recorded().items() if name == tower or name.startswith(f"{tower}.")]
        return kept_positions(inside[-1]) if inside else None

    def aside(self) -> AbstractContextManager[None]:
        """Calls inside are not recorded: token counts, survivors, MACs and the alignment loss stay those of the forward
        before."""
        return self._control.unrecorded()

    def alignment_loss(self) -> Tensor:
        """L_align of the last forward (MAG): mean of 1 - cos between the modalities' pooled features; differentiable.

        Raises:
            MadtpError: no forward with gradients enabled and pruning on has run, or only one modality is pruned.
        """
        features = self._control.record.features
        sums: dict[str, Tensor] = {}
        for (_, modality), pooled in features.items():
            known = sums.get(modality)
            sums[modality] = pooled if known is None else known + pooled
        if "image" not in sums or "text" not in sums:
            raise MadtpError(
                f"the alignment loss needs features of image and text; the last forward has {sorted(sums) or 'none'}. Run a "
                "forward with gradients enabled and temperature above 0 on a model with sites in both towers."
            )
        image, text = sums["image"], sums["text"]
        images = self._images if self._images > 1 else max(1, image.shape[0] // text.shape[0])
        image = mean_over_images(image, images, self._image_order)  # type: ignore[arg-type]
        if text.shape[0] % image.shape[0] == 0:
            image = image.repeat_interleave(text.shape[0] // image.shape[0], 0)
        return alignment_loss(image, text)

    def macs(self) -> float:
        """Multiply-accumulates per sample of the last forward, from the token counts it kept.

        Where regions are rewritten, what runs outside them is counted too, but only for calls of the model itself:
        after ``generate`` and the like this is the sum over the regions.
        """
        return sum(self.macs_by_module().values())

    def macs_by_module(self, tokens: Tokens = "kept") -> dict[str, float]:
        """:meth:`macs`, by module path: as it was, or if all tokens, or none that may be pruned, had been kept."""
        self._recorded()
        control = self._control
        total: dict[str, float] = {} if control.record.outside_macs is None else {OUTSIDE: control.record.outside_macs}
        for run in control.record.runs:
            states = run.states if tokens == "kept" else {}
            counts = {} if tokens == "all" else {name: state.counts for name, state in run.states.items()}
            if tokens == "none":
                counts = {name: torch.zeros_like(count) for name, count in counts.items()}
            share = 1.0 if control.record.batch is None else run.batch() / control.record.batch
            active = control.active and tokens == "kept"
            for path, amount in run.program.cost.price(run.inputs, counts, active, states).items():
                total[path] = total.get(path, 0.0) + amount * share
        return total

    @torch.no_grad()
    def dense_macs(self, *args: Any, **kwargs: Any) -> float:
        """Multiply-accumulates per sample of a call with all tokens kept, which is run for that; see :meth:`aside`."""
        with self.aside(), self.dense():
            self.forward(*args, **kwargs)
            return self.macs()

    @contextmanager
    def dense(self) -> Iterator[PrunedModel]:
        """Pruning switched off inside the block."""
        with self._control.unpruned():
            yield self

    def code(self) -> str:
        """The rewritten forward of the last call as Python source; of several regions, one after the other."""
        self._recorded()
        programs = {id(run.program): run.program for run in self._control.record.runs}
        return "\n".join(p.graph.python_code("self").src for p in programs.values())

    def _recorded(self) -> dict[str, Any]:
        if not self._control.record.runs:
            raise MadtpError("no forward has run yet; call the model first.")
        return self._control.record.states


def _as_one_call(
    method: Callable[..., Any], control: PruningControl, watched: Callable[[], AbstractContextManager[None]]
) -> Callable[..., Any]:
    """A method of the host such that the record of the last forward spans all that one call of it runs."""

    @functools.wraps(method)
    def called(*args: Any, **kwargs: Any) -> Any:
        with control.call(), watched():
            try:
                return method(*args, **kwargs)
            except ContinuationError as error:
                if object_kind((args, kwargs)) is not None:
                    raise
                log.warning("%s runs once more, unpruned: %s", method.__name__, error)
            with control.running_original():
                return method(*args, **kwargs)

    return called


def _strength(name: str, value: float) -> float:
    number = float(value)
    if not (0 <= number < float("inf")):
        raise ConfigError(f"{name} is {value!r}; it has to be a finite number of at least 0.")
    return number
