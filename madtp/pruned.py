"""The pruned model: what :func:`madtp.rewrite` returns.

Start at :class:`PrunedModel`. It is called as the original is, returns what the original returns, and holds the
original's parameters under their own names; all that pruning adds lies under the one prefix ``madtp.``.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from madtp.calls import Call, Signature, normalise_call, signature
from madtp.config import PruningConfig
from madtp.control import PruningControl
from madtp.errors import CaptureError, ConfigError, MadtpError, RewriteError
from madtp.guidance import AlignmentTokens, alignment_loss, mean_over_images
from madtp.program import Program
from madtp.report import RewriteReport
from madtp.site import PruningSite, SiteSpec
from madtp.state import kept_positions

log = logging.getLogger("madtp")
PREFIX = "madtp"
CACHE = 16

Builder = Callable[[nn.Module, Call, int], Program]


@dataclass
class _Entry:
    program: Program
    signature: Signature


class Additions(nn.Module):
    """All that pruning adds to a model: alignment tokens, sites, constants of the captured graphs."""

    def __init__(self, specs: list[SiteSpec], keys: list[str], control: PruningControl, alignment_width: int) -> None:
        super().__init__()
        config = control.config
        if config.alignment:
            self.alignment = AlignmentTokens(config.alignment_tokens, alignment_width, seed=config.seed)
            control.alignment = self.alignment
        self.sites = nn.ModuleDict(
            {
                key: PruningSite(spec, control, alignment_width, config.seed + 1 + number)
                for number, (key, spec) in enumerate(zip(keys, specs, strict=True))
            }
        )
        self.constants = nn.Module()


class PrunedModel(nn.Module):
    """A drop-in for the original model that prunes tokens.

    Attributes:
        report: what was found and done; ``str()`` is a table.
        config: the :class:`~madtp.config.PruningConfig`.
        example: the call it was rewritten with, as :func:`madtp.recorded_call.record_call` keeps it.
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
        builder: Builder,
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
            ("_builder", builder),
            ("_programs", OrderedDict()),
            ("_last", None),
            ("_serial", 0),
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

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            host = self.__dict__.get("_host")
            if host is None or name.startswith("__"):
                raise
            return getattr(host, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model; arguments and return type are the original's."""
        call = normalise_call(self._host, args, kwargs)
        program = self._program(call)
        self._control.begin()
        leaves = call.flat()[0]
        object.__setattr__(self, "_last", (program, [_meta(x) for x in leaves]))
        return program.run(self._host, leaves)

    def train(self, mode: bool = True) -> PrunedModel:
        """Set training mode, as any module."""
        super().train(mode)
        self._host.training = mode
        return self

    def token_counts(self) -> dict[str, Tensor]:
        """Tokens kept of each sample at each site in the last forward: ``{site: [B]}`` (two images a sample:
        ``[2B]``)."""
        found = {}
        for name, state in self._recorded().items():
            counts = state.counts
            found[name] = torch.full((state.batch,), state.length) if counts is None else counts
        return found

    def kept_tokens(self) -> dict[str, Tensor]:
        """Which original tokens survive after each site in the last forward: ``{site: [B, N] bool}``; merged ones do
        not count."""
        return {name: kept_positions(state) for name, state in self._recorded().items()}

    def alignment_loss(self) -> Tensor:
        """L_align of the last forward (MAG): mean of 1 - cos between the modalities' pooled features; differentiable.

        Raises:
            MadtpError: no forward with gradients enabled and pruning on has run, or only one modality is pruned.
        """
        features = self._control.features
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
        """Multiply-accumulates per sample of the last forward, from the token counts it kept."""
        return sum(self.macs_by_module().values())

    def macs_by_module(self) -> dict[str, float]:
        """:meth:`macs`, by module path."""
        self._recorded()
        program, leaves = self._last
        counts = {n: s.counts for n, s in self._control.states.items() if s.counts is not None}
        return program.cost.price(leaves, counts, self._control.active, self._control.states)

    @contextmanager
    def dense(self) -> Iterator[PrunedModel]:
        """Pruning switched off inside the block."""
        before = self._control.temperature, self._control.forced
        self._control.temperature, self._control.forced = 0.0, None
        try:
            yield self
        finally:
            self._control.temperature, self._control.forced = before

    def code(self) -> str:
        """The rewritten forward of the last call as Python source."""
        self._recorded()
        return self._last[0].graph.python_code("self").src

    def _recorded(self) -> dict[str, Any]:
        if self._last is None:
            raise MadtpError("no forward has run yet; call the model first.")
        return self._control.states

    def _program(self, call: Call) -> Program:
        for cached in reversed(self._programs.values()):
            if signature(self._host, call, cached.program.dynamic) == cached.signature:
                return cached.program
        return self._capture(call)

    def _capture(self, call: Call) -> Program:
        log.info("capturing %s for a new call signature", type(self._host).__name__)
        additions = self._host._modules.pop(PREFIX)
        try:
            captured = _at_least_two(call)
            program = self._builder(self._host, captured, self._serial)
        finally:
            self._host._modules[PREFIX] = additions
        if captured is not call and _frozen_batch(program, captured):
            raise CaptureError(
                f"{type(self._host).__name__} was called with one sample, and torch.export froze its batch size, so a "
                "capture of two samples cannot serve it. Call it with at least 2 samples, or write x.shape[0] where "
                "forward says len(x) or int(...)."
            )
        self.adopt(program, call)
        return program

    def adopt(self, program: Program, call: Call) -> None:
        """Take a program into the cache as the one for calls like ``call``."""
        object.__setattr__(self, "_serial", self._serial + 1)
        program.cost.bind("alignment_tokens", self.config.alignment_tokens if self.config.alignment else 0)
        for name, value in program.constants.items():
            self._host._modules[PREFIX].constants.register_buffer(name, value, persistent=False)
        entry = _Entry(program, signature(self._host, call, program.dynamic))
        self._programs[self._serial] = entry
        while len(self._programs) > CACHE:
            self._programs.popitem(last=False)


def _strength(name: str, value: float) -> float:
    number = float(value)
    if not (0 <= number < float("inf")):
        raise ConfigError(f"{name} is {value!r}; it has to be a finite number of at least 0.")
    return number


def _meta(leaf: Any) -> Any:
    return torch.empty(leaf.shape, device="meta") if isinstance(leaf, Tensor) else leaf


def _frozen_batch(program: Program, call: Call) -> bool:
    leaves = zip(call.flat()[0], program.dynamic, strict=True)
    return any(isinstance(x, Tensor) and x.dim() > 0 and 0 not in free for x, free in leaves)


def _at_least_two(call: Call) -> Call:
    """A call of one sample doubled, so that the batch axis can be told from axes of size 1."""
    leaves, spec = call.flat()
    tensors = [x for x in leaves if isinstance(x, Tensor) and x.dim()]
    if not tensors or any(x.shape[0] != 1 for x in tensors):
        return call
    doubled = [torch.cat([x, x]) if isinstance(x, Tensor) and x.dim() else x for x in leaves]
    args, kwargs = pytree.tree_unflatten(doubled, spec)
    return Call(args, kwargs)
