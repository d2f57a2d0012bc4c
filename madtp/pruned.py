"""The pruned model: what :func:`madtp.rewrite` returns.

Start at :class:`PrunedModel`. It is called as the original is, returns what the original returns, and holds the original's
parameters under their own names. All that pruning adds lies under the one prefix ``madtp.``.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from madtp.calls.branches import OtherBranch
from madtp.calls.call import normalise_call
from madtp.calls.compiling import is_compiling, is_exporting
from madtp.calls.packed_images import PerImageArguments
from madtp.config import PruningConfig
from madtp.errors import ConfigError, ContinuationError, ExportError, MadtpError, RewriteError
from madtp.method.guidance import ImageOrder, alignment_loss, mean_over_images, sum_of_streams
from madtp.programs.host_forward import HostForward
from madtp.programs.host_methods import as_one_call
from madtp.programs.notes import Notes, noting_unpruned_blocks
from madtp.programs.packed_images_region import PerImageRegion
from madtp.programs.pricing import Tokens, macs_by_module
from madtp.programs.program_cache import MANY_WAYS, BuildProgram, ProgramCache
from madtp.programs.region import PrunedRegion
from madtp.report import RewriteReport
from madtp.sites.additions import PREFIX, Additions
from madtp.sites.control import PruningControl
from madtp.sites.spec import SiteSpec
from madtp.tokens.state import TokenState, kept_positions

HOW_TO_EXPORT = "Fix the counts with madtp.freeze(pruned, batches) first; madtp.export then writes a file."


@dataclass(frozen=True, kw_only=True)
class AlignmentSpec:
    """What the alignment tokens have to fit.

    Attributes:
        width: d_e, the width of the alignment tokens.
        images: number of images that belong to one text.
        image_order: how the images of a batch are stacked: ``"blocked"`` has the first images of all samples, then the second
            ones; ``"interleaved"`` keeps a sample's images together.
    """

    width: int
    images: int = 1
    image_order: ImageOrder = "blocked"


class PrunedModel(nn.Module):
    """A drop-in for the original model that prunes tokens.

    Call it as the original. Its output, parameter names, state dict, attributes and methods are the original's; parameters are
    shared with it. Attributes that are not listed here are those of the original.

    Attributes:
        report: what was found and done. ``str()`` of it is a table.
        config: how tokens are pruned, a :class:`~madtp.config.PruningConfig`. Strength is set by :attr:`gain` and
            :attr:`temperature`, which start from it.
        example: the call that the model was rewritten with, as :func:`madtp.calls.record.record_call` keeps it.

    Example::

        pruned = madtp.rewrite(model, inputs)
        madtp.calibrate(pruned, batches, reduction=0.5)
        output = pruned(**inputs)
        pruned.token_counts()  # {"visual_encoder.blocks.0": tensor([412, 397]), ...}
    """

    _host: nn.Module
    _control: PruningControl
    _whole: ProgramCache | None

    def __init__(
        self,
        host: nn.Module,
        *,
        sites: Mapping[str, SiteSpec],
        config: PruningConfig,
        report: RewriteReport,
        alignment: AlignmentSpec,
    ) -> None:
        """Add what pruning needs to a module tree. :func:`madtp.rewrite` does that.

        Args:
            host: a copy of the original's module tree, which this model owns.
            sites: the sites, by the names that they get as modules.
            config: how tokens are pruned.
            report: the report of the rewrite.
            alignment: what the alignment tokens have to fit.

        Raises:
            RewriteError: the host has a child named ``madtp``.
        """
        super().__init__()
        if PREFIX in host._modules or PREFIX in host._parameters:
            raise RewriteError(f"the model has a child named {PREFIX!r}; that name is taken for what pruning adds.")
        control = PruningControl(config, temperature=config.temperature, gain=config.gain)
        additions = Additions(list(sites.values()), list(sites), control, alignment.width)
        example = next(host.parameters(), None)
        if example is not None:
            additions.to(device=example.device, dtype=example.dtype if example.dtype.is_floating_point else None)
        additions.train(host.training)
        host._modules[PREFIX] = additions
        for name in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
            object.__setattr__(self, name, host.__dict__[name])
        # Past nn.Module, which would register the host as a child.
        object.__setattr__(self, "_host", host)
        self._control, self._whole = control, None
        self.report = report
        self.config = config
        self.example: dict[str, Any] = {"args": [], "kwargs": {}}
        self._images, self._image_order = alignment.images, alignment.image_order
        self.training = host.training

    @property
    def temperature(self) -> float:
        """Temperature T of the threshold: larger prunes more; 0 switches pruning off and reproduces the original."""
        return self._control.temperature

    @temperature.setter
    def temperature(self, value: float) -> None:
        self._control.temperature = _strength("temperature", value)

    @property
    def gain(self) -> float:
        """Factor on the threshold, which :func:`madtp.calibrate` sets: larger prunes more, 1 is the paper's threshold, and
        towards 0 the model approaches the dense one."""
        return self._control.gain

    @gain.setter
    def gain(self, value: float) -> None:
        self._control.gain = _strength("gain", value)

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether training recomputes the activations inside blocks in the backward pass, in place of storing them.

        It takes less memory and about a third more time, and gives the same gradients for the same tokens.
        """
        return self._control.gradient_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value: bool) -> None:
        self._control.gradient_checkpointing = bool(value)

    def replace_forward(
        self,
        path: str,
        build_program: BuildProgram,
        *,
        inner: bool = False,
        embeddings: str = "",
        per_image: PerImageArguments | None = None,
    ) -> ProgramCache:
        """Let programs run in place of a module of the host. :func:`madtp.rewrite` calls this.

        Args:
            path: the path of the module; empty for the whole host.
            build_program: builds a program for one more kind of call.
            inner: the module lies inside another one that programs replace.
            embeddings: path in its call of the text embeddings, if programs need to know at which positions these hold
                image features.
            per_image: which arguments hold the images, if calls are split into images. None if they are not.

        Returns:
            The program cache of the module, still empty.
        """
        programs = ProgramCache(path, self._host, build_program, inner=inner, per_image=per_image)
        if not path and per_image is None:
            self._whole = programs
            return programs
        notes = self._notes()
        programs.module.__dict__["forward"] = (
            PrunedRegion(programs, self._control, notes, embeddings=embeddings)
            if per_image is None
            else PerImageRegion(programs, per_image, self._control, notes)
        )
        host_forward = self._host.__dict__.get("forward")
        if not isinstance(host_forward, HostForward):
            host_forward = self._host.__dict__["forward"] = HostForward(self._host, self._control, notes)
        host_forward.follows_features |= bool(embeddings)
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
            return as_one_call(value, self._control, self._noting_unpruned_blocks(name))
        return value

    def _noting_unpruned_blocks(self, method: str) -> Callable[[], AbstractContextManager[None]]:
        """The context for calls of a method: it notes blocks with sites that run as the original does."""
        if self._whole is None:
            return nullcontext
        return functools.partial(
            noting_unpruned_blocks,
            self._host,
            {site.name.partition("#")[0] for site in self.report.sites},
            control=self._control,
            notes=self._notes(),
            method=method,
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model; arguments and return type are the original's."""
        if not is_compiling():
            if torch._C._is_tracing():
                how = "Use madtp.export." if self._control.counts_are_fixed() else HOW_TO_EXPORT
                raise ExportError(f"torch.jit.trace would keep what Python decides for one input. {how}")
            return self._forward(*args, **kwargs)
        shapes_vary = self._control.active and not self._control.counts_are_fixed()
        if shapes_vary and is_exporting():
            raise ExportError(f"token counts depend on the input, so shapes are not known. {HOW_TO_EXPORT}")
        host_forward = None if self._whole is not None else self._host.__dict__.get("forward")
        if isinstance(host_forward, HostForward) and not is_exporting():
            shapes_vary |= host_forward.follows_features or not host_forward.reproduces(args, kwargs)
        if shapes_vary:
            return _uncompiled_forward(self, *args, **kwargs)
        self._control.clear_record()
        if self._whole is None:
            return self._host(*args, **kwargs)
        return self._whole.run_compiled(normalise_call(self._host, args, kwargs, self._whole.parameters))

    def _notes(self) -> Notes:
        """Takes remarks on calls into the report."""
        return Notes(self.report, strict=self.config.strict)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._whole is None:
            normalise_call(self._host, args, kwargs)
            return self._host(*args, **kwargs)
        call = normalise_call(self._host, args, kwargs, self._whole.parameters)
        for program in self._whole.candidates(call):
            with suppress(OtherBranch), self._control.call():
                self._control.begin_program()
                return self._whole.run(program, call)
        if self._whole.continues_pruned(call):
            raise ContinuationError(
                f"it goes on from what a pruned call has kept, which only programs can read, and {MANY_WAYS}."
            )
        self._notes().unpruned(type(self._host).__name__, MANY_WAYS)
        self._control.clear_record()
        return self._host(*args, **kwargs)

    def train(self, mode: bool = True) -> PrunedModel:
        """Set training mode, as any module."""
        super().train(mode)
        self._host.training = mode
        return self

    def token_counts(self) -> dict[str, Tensor]:
        """Number of tokens that each sample kept at each site in the last forward.

        Returns:
            ``{site: [B]}``; ``[2B]`` in a vision tower that takes two images a sample.
        """
        return {name: state.counts for name, state in self._recorded().items()}

    def kept_tokens(self) -> dict[str, Tensor]:
        """Which original tokens survive each site in the last forward; merged ones do not count.

        Returns:
            ``{site: [B, N] bool}``.
        """
        return {name: kept_positions(state) for name, state in self._recorded().items()}

    def surviving(self, tower: str) -> Tensor | None:
        """Which original tokens are left after the last site of a module in the last forward.

        A tower returns all tokens of a pruned stream; a dropped token has the state that it had when it was dropped. Whatever
        reads these tokens outside the model, such as a decoder that is called by itself, should attend to the survivors only.

        Args:
            tower: path of the module, as in the names of its sites.

        Returns:
            ``[B, N]`` bool, or None if the module has no site.
        """
        inside = [state for name, state in self._recorded().items() if name == tower or name.startswith(f"{tower}.")]
        return kept_positions(inside[-1]) if inside else None

    def aside(self) -> AbstractContextManager[None]:
        """Keep the record of the last forward: calls inside the block do not change token counts, survivors, MACs and the
        alignment loss."""
        return self._control.unrecorded()

    def alignment_loss(self) -> Tensor:
        """Alignment loss L_align of the last forward (MAG): the mean of 1 - cos between the modalities' pooled features.

        It is zero, with a note in the report, where only one modality was pruned: there is nothing to align. Several views,
        frames or candidates of a sample count with their mean.

        Returns:
            A differentiable scalar.

        Raises:
            MadtpError: no forward with gradients enabled and pruning on has run, or the model has no alignment tokens.
        """
        features = self._control.record.features
        if not features or self._control.alignment is None:
            raise MadtpError(
                "the alignment loss needs features of image and text, and the last forward has none. Run a forward with "
                "gradients enabled and temperature above 0 on a model with alignment tokens."
            )
        order: ImageOrder = self._image_order if self._images > 1 else "interleaved"
        modalities = sorted({key.modality for key in features})
        if modalities != ["image", "text"]:
            self._notes().add(f"the alignment loss is zero: in this call only the {modalities[0]} is pruned")
            return 0.0 * self._control.alignment.tokens.sum()
        image, text = (
            sum_of_streams([pooled for key, pooled in features.items() if key.modality == one], order)
            for one in modalities
        )
        images = self._images if self._images > 1 else max(1, image.shape[0] // text.shape[0])
        image = mean_over_images(image, images, self._image_order)
        if text.shape[0] % image.shape[0] == 0:
            image = image.repeat_interleave(text.shape[0] // image.shape[0], 0)
        return alignment_loss(image, text)

    def macs(self) -> float:
        """Multiply-accumulates (MACs) per sample of the last forward, from the token counts that it kept.

        The field's tables print this number as "FLOPs". Where regions are rewritten, what runs outside them is counted too, but
        only for calls of the model itself: after ``generate`` and the like this is the sum over the regions.
        """
        return sum(self.macs_by_module().values())

    def macs_by_module(self, tokens: Tokens = "kept") -> dict[str, float]:
        """:meth:`macs`, by module path.

        Args:
            tokens: which tokens to count: those that were ``"kept"``, ``"all"`` as without pruning, or ``"none"`` of those
                that may be pruned.
        """
        self._recorded()
        return macs_by_module(self._control, tokens)

    @torch.no_grad()
    def dense_macs(self, *args: Any, **kwargs: Any) -> float:
        """Multiply-accumulates per sample of a call with all tokens kept.

        The call is run for that, but not recorded; see :meth:`aside`.
        """
        with self.aside(), self.dense():
            self.forward(*args, **kwargs)
            return self.macs()

    @contextmanager
    def dense(self) -> Iterator[PrunedModel]:
        """Switch pruning off inside the block."""
        with self._control.unpruned():
            yield self

    def code(self) -> str:
        """The rewritten forward of the last call as Python source; where regions are rewritten, of one after the other."""
        self._recorded()
        programs = {id(run.program): run.program for run in self._control.record.runs}
        return "\n".join(p.graph.python_code("self").src for p in programs.values())

    def _recorded(self) -> dict[str, TokenState]:
        if not self._control.record.runs:
            raise MadtpError("no forward has run yet; call the model first.")
        return self._control.record.states


def _strength(name: str, value: float) -> float:
    number = float(value)
    if not (0 <= number < float("inf")):
        raise ConfigError(f"{name} is {value!r}; it has to be a finite number of at least 0.")
    return number


# The forward where shapes, or the positions of image features, depend on values: torch.compile breaks the graph around it.
_uncompiled_forward: Callable[..., Any] = torch.compiler.disable(
    PrunedModel._forward, reason=f"token counts or image positions depend on the input. {HOW_TO_EXPORT}"
)
